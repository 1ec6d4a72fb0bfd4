"""Windows and macOS lack modules and functions of Linux: the package imports and works without."""

import subprocess
import sys

from paths import ROOT

PROGRAM = """
import importlib, os, pkgutil, signal, socket, sys
# what other packages use of Linux is their business
import multiprocessing.forkserver, multiprocessing.popen_fork, subprocess, tempfile
import blobfile, matplotlib.pyplot, scipy.ndimage, torch.distributed, torch.utils.data, torchvision

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("resource", "fcntl", "termios", "pwd", "grp"):
            raise ModuleNotFoundError(f"no module {name}", name=name)

sys.meta_path.insert(0, Missing())
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules.pop(name, None)
GONE = {
    os: "fork register_at_fork getuid geteuid getpgid killpg setsid sysconf statvfs"
    " sched_getaffinity",
    signal: "SIGUSR1 SIGUSR2 SIGHUP SIGKILL SIGALRM alarm pthread_sigmask sigwait sigwaitinfo"
    " sigtimedwait setitimer",
    socket: "MSG_WAITALL",
}
for module, names in GONE.items():
    for name in names.split():
        delattr(module, name)

import guided_diffusion
for found in pkgutil.walk_packages(guided_diffusion.__path__, "guided_diffusion."):
    if not found.name.endswith("._native"):  # a C library, not a module
        importlib.import_module(found.name)

from guided_diffusion.images import cache
from guided_diffusion.runtime.ranks import devices, failure
from guided_diffusion.runtime.storage import files, run_lock
from guided_diffusion.runtime import memory, signals, workers

memory._status = lambda name: 0  # there is no /proc
assert memory.peak_of_process() == memory.held_by_process() == 0
exists = os.path.exists
os.path.exists = lambda path: False
assert cache.free_memory() > 0
os.path.exists = exists
assert len(devices.usable_cores()) == 1
with signals.StopRequest(), workers._signals_held_back():
    pass
signals.leave_to_parent()
one, other = socket.socketpair()
failure._Connection(one).send({"a": 1})
assert failure._receive_all(other, 5) == b'{"a":'
run_lock.hold_folder(sys.argv[1], "")
run_lock.release_all()

def refuse(*arguments):
    raise PermissionError("a folder")

os.open = refuse
files._sync_folder(sys.argv[1])
print("all there")
"""


def test_it_works_without_what_other_systems_lack(tmp_path):
    words = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all there\n"
    assert not any(tmp_path.iterdir())
