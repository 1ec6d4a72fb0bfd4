"""guided_diffusion.runtime.ranks.rendezvous: the ranks find each other, under every launcher.

The launchers themselves are run once each.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch.distributed as dist
from paths import ROOT
from process_util import HOST, free_port, mpiexec
from ranks_util import run_ranks

from guided_diffusion import dist_util
from guided_diffusion.runtime import errors
from guided_diffusion.runtime.ranks import devices
from guided_diffusion.runtime.ranks.devices import Peer


def with_broken_mpi4py():
    sys.modules["mpi4py"] = None  # its import fails
    errors.command(dist_util.setup_dist)()


def test_mpiexec_without_mpi4py_is_one_line(tmp_path):
    ended = run_ranks(tmp_path, with_broken_mpi4py, launcher="mpi")
    assert [rank.code for rank in ended] == [2, 2]
    (line,) = ended[0].errors() + ended[1].errors()
    assert "mpi4py does not work" in line
    assert "pip install .[mpi]" in line
    assert ended[0].said.count("\n") == 1


def alone_with_broken_mpi4py():
    sys.modules["mpi4py"] = None
    with dist_util.failure_guard():
        dist_util.setup_dist()
        assert dist_util.world_size() == 1
        assert not dist.is_initialized()


@pytest.mark.parametrize("launcher", ["slurm", "torchrun", "mpi"])
def test_one_rank_needs_neither_mpi_nor_a_group(tmp_path, launcher):
    (ended,) = run_ranks(tmp_path, alone_with_broken_mpi4py, 1, launcher)
    assert (ended.code, ended.said) == (0, "")


def with_one_gpu():
    devices.describe_self = lambda: Peer("host", "host", "cuda", ("GPU-1",))
    errors.command(dist_util.setup_dist)()


def test_more_ranks_than_gpus_is_one_line(tmp_path):
    ended = run_ranks(tmp_path, with_one_gpu)
    assert [rank.code for rank in ended] == [2, 2]
    (line,) = ended[0].errors() + ended[1].errors()
    assert "2 ranks on host, but 1 visible GPU" in line
    assert ended[1].said == ""


# The launchers themselves

PROGRAM = """
    import sys
    from guided_diffusion import dist_util
    from guided_diffusion.runtime.errors import UserError, command

    @command
    def main():
        with dist_util.failure_guard():
            dist_util.setup_dist()
            print(f"{dist_util.all_gather_object(dist_util.rank())}\\n", end="", flush=True)
            if dist_util.rank() == 1 and sys.argv[1:] == ["fail"]:
                raise UserError("broken")
            dist_util.barrier()

    main()
"""


def start(tmp_path, launcher, *arguments):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GUIDED_DIFFUSION_DEVICE": "cpu",
    }
    return subprocess.run(
        [*launcher, str(path), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_torchrun(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = start(tmp_path, [*torchrun, "--master-port", str(free_port())])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[0, 1]\n" * 2


def test_mpiexec(tmp_path):
    ended = start(tmp_path, mpiexec(), "fail")
    if "mpi4py does not work" in ended.stderr or "use the mpiexec of that library" in ended.stderr:
        pytest.skip("mpi4py and mpiexec do not fit together")
    assert ended.stdout == "[0, 1]\n" * 2
    assert ended.returncode == 2, ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert said == [f"error: rank 1 ({HOST}): broken"]
