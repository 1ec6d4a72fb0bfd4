"""Ranks as processes, forked from a server with torch loaded, in a launcher's environment."""

import dataclasses
import multiprocessing
import os

import torch as th
from process_util import free_port

from guided_diffusion.runtime.ranks import failure, rendezvous

# Seconds. Nothing here takes more than a few, unless the machine is busy with other things.
HANGS_S = 90


@dataclasses.dataclass
class Ended:
    """How a rank ended: its exit code (-9: SIGKILL) and its stderr."""

    code: int
    said: str

    def errors(self):
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def _run_rank(script, env, path):
    """In the child process: run `script` with stderr going to the file `path`."""
    with open(path, "w") as file:
        os.dup2(file.fileno(), 2)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI", "RANK", "WORLD_SIZE", "MASTER_", "GUIDED")):
            del os.environ[name]
    os.environ.update(env, GUIDED_DIFFUSION_DEVICE="cpu")
    failure.GRACE_S = 1.0
    failure.ECHO_S = 1.5
    failure.COLLECT_S = 0.5
    rendezvous.PRINT_FIRST_S = 0.5
    th.set_num_threads(1)
    script()


def run_ranks(tmp_path, script, num_ranks=2, launcher="slurm", env=None):
    """Start the ranks as srun or torchrun would, and wait for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "hypothesis", "guided_diffusion.dist_util"])
    port = str(free_port())
    children = []
    for number in range(num_ranks):
        names = {
            "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
            "torchrun": ("RANK", "WORLD_SIZE"),
            "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        }[launcher]
        own = dict(zip(names, (str(number), str(num_ranks))))
        if launcher == "slurm":
            own |= {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "here"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(env or {})}
        own["TEST_DONE"] = str(tmp_path / "done")
        path = tmp_path / f"{port}_{number}.txt"
        child = context.Process(target=_run_rank, args=(script, own, path))
        child.start()
        children.append((child, path))
    try:
        for child, _ in children:
            child.join(HANGS_S)
        alive = [number for number, (child, _) in enumerate(children) if child.is_alive()]
    finally:
        (tmp_path / "done").touch()
        for child, _ in children:
            child.kill()
    ended = [Ended(child.exitcode, path.read_text()) for child, path in children]
    assert not alive, f"ranks {alive} hang: {ended}"
    return ended
