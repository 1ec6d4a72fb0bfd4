"""The project's commands as processes of their own, forked from a server that has torch loaded."""

import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch as th
from paths import ROOT

from guided_diffusion.runtime.ranks import failure

# torch's optimizers import torch._dynamo, which takes seconds
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "guided_diffusion.training.run"]
LAUNCHERS = ("SLURM_", "OMPI_", "PMI", "RANK", "WORLD_SIZE", "MASTER_", "GUIDED_", "OPENAI_")
HOST = socket.gethostname()
LONGEST_S = 240  # far more than any command here takes on an idle machine


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def torchrun_environments(num_ranks: int) -> list[dict[str, str]]:
    """The variables that torchrun gives each of its ranks."""
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(num_ranks)
    ]


def _child(script: str, arguments: list, env: dict, said: str, before: Callable | None) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            del os.environ[name]
    os.environ.update({"GUIDED_DIFFUSION_DEVICE": "cpu", "OPENAI_LOG_FORMAT": "log,csv"}, **env)
    th.set_num_threads(1)
    failure.GRACE_S = 1.0
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    sys.argv = [script, *arguments]
    if before is not None:
        before()
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")


class Command:
    """A running command. `said`: what it has written to stdout and stderr."""

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        env: dict[str, str],
        said: Path,
        before: Callable[[], None] | None = None,
    ):
        """:param before: called in the process before the script, to disturb it."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._said = said
        self.process = context.Process(
            target=_child, args=(script, [*map(str, arguments)], env, str(said), before)
        )
        self.process.start()

    @property
    def said(self) -> str:
        return self._said.read_text() if self._said.exists() else ""

    def wait(self) -> int:
        """The exit code; -9 after SIGKILL."""
        self.process.join(LONGEST_S)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"{self._said.name} hangs: {self.said}")
        return self.process.exitcode

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Until `happened()`, while the command runs."""
        end = time.monotonic() + LONGEST_S
        while not happened():
            assert self.process.is_alive(), self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.005)

    def send(self, name: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, getattr(signal, name))


def mpiexec():
    """The command line of an mpiexec that starts two ranks here, beside this Python first."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    program = shutil.which("mpiexec", path=path)
    if program is None:
        pytest.skip("no mpiexec: pip install .[mpi]")
    version = ""
    with contextlib.suppress(subprocess.SubprocessError):
        command = [program, "--version"]
        version = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    flags = ["--allow-run-as-root", "--oversubscribe"] if "Open" in version else []
    return [program, *flags, "-n", "2", sys.executable]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a disk of that size, such as "200k", on a new folder; skips the test without rights."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
