"""One process at a time writes into a run's folder: the locks that this process holds.

The holder keeps `run.lock` in the folder (or `segm.pth.lock` beside the file); `lock_file` says
what that guarantees. Folders in the cloud have none of the operations which that needs: they are
locked against other processes of this machine only.
"""

import atexit
import contextlib
import hashlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from types import FrameType

from guided_diffusion.runtime.storage.lock_file import RunLock

LOCK_NAME = "run.lock"
# signals that end a process without its exit handlers
_ENDING = ("SIGTERM", "SIGUSR1", "SIGHUP")

_held: dict[str, RunLock] = {}  # this process's locks by path


def hold_folder(folder: str, instead: str) -> None:
    """Lock a folder until the end of `released`, or of the process; again is no error.

    :param instead: what a second process may do, such as "choose another --out_dir".
    :raises UserError: if another process holds it.
    """
    _hold(os.path.join(folder, LOCK_NAME), folder, instead)


def hold_file(path: str, instead: str) -> None:
    """Lock a file that will be written, and what belongs to it; see `hold_folder`."""
    _hold(f"{path}.lock", path, instead)


def release_folder(folder: str) -> None:
    """Release the lock of a folder."""
    release_all(set(_held) - {_local(os.path.join(folder, LOCK_NAME))})


def _local(path: str) -> str:
    """The path of a lock file; for the cloud, one in the folder of temporary files."""
    if "://" in path:
        name = hashlib.sha256(path.encode()).hexdigest()[:16]
        path = os.path.join(tempfile.gettempdir(), f"guided_diffusion_{name}.lock")
    return os.path.realpath(path)


def _hold(path: str, subject: str, instead: str) -> None:
    path = _local(path)
    if path in _held and _held[path]._pid == os.getpid():
        return
    lock = RunLock(path, subject, instead)
    lock.acquire()
    _held[path] = lock
    if threading.current_thread() is threading.main_thread():
        for number in _ending_signals():
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _end)


def check_held() -> None:
    """:raises UserError: if this process has lost one of its locks: it must not write any more."""
    for lock in list(_held.values()):
        if lock._pid == os.getpid():
            lock.check()


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Release, at the end, the locks that were taken inside."""
    before = set(_held)
    try:
        yield
    finally:
        release_all(before)


def release_all(but: set[str] | None = None) -> None:
    """Release this process's locks.

    :param but: paths of those to keep.
    """
    for path in set(_held) - (but or set()):
        _held.pop(path).release()
    if not _held:
        RunLock.stopping = False
        if threading.current_thread() is threading.main_thread():
            for number in _ending_signals():
                if signal.getsignal(number) is _end:
                    signal.signal(number, signal.SIG_DFL)


def note_stopping() -> None:
    """Let other processes know that this one has been asked to stop, and wait for it."""
    RunLock.stopping = True


def _end(number: int, frame: FrameType | None) -> None:
    """Release the locks, then end by the signal as if there had been no handler."""
    release_all()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _ending_signals() -> list[signal.Signals]:
    return [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]


atexit.register(release_all)
