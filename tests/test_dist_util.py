"""guided_diffusion.runtime.launch, dist_util and failure: who am I, and who of us has failed?

Ranks are processes forked from a server that has torch loaded, started with the environment that a
launcher would give them; the launchers themselves are run once each.
"""

import dataclasses
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch as th
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from process_util import HOST, free_port, mpiexec

from guided_diffusion import dist_util, logger
from guided_diffusion.dist_util import _Peer, choose_devices
from guided_diffusion.runtime import errors, failure
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.launch import expand_nodelist, find_launch
from guided_diffusion.runtime.signals import EXIT_STOPPED

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu01", "MASTER_PORT": "29500"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
# What the batch script's own process sees: the job's variables, and no step.
SBATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "gpu[07-08]",
}


class TestLaunch:
    @pytest.mark.parametrize(
        ("env", "expected"),
        [
            ({}, ("alone", 0, 1)),
            (TORCHRUN, ("torchrun", 3, 8)),
            (OPEN_MPI, ("mpi", 1, 2)),
            ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}, ("mpi", 1, 2)),
            (MPICH, ("mpi", 1, 2)),
            ({"PMIX_RANK": "1"}, ("mpi", 1, None)),
            (SRUN, ("slurm", 5, 8)),
            (SBATCH, ("alone", 0, 1)),
            # salloc's shell is a step of its own kind
            (SBATCH | {"SLURM_STEP_ID": "4294967290", "PMIX_RANK": "0"}, ("alone", 0, 1)),
            (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ("slurm", 0, 1)),
            # one launcher inside the other: the inner one counts
            (SRUN | TORCHRUN, ("torchrun", 3, 8)),
            (SBATCH | OPEN_MPI, ("mpi", 1, 2)),
            (SRUN | MPICH, ("mpi", 1, 2)),
            # srun --mpi=pmi2 and --mpi=pmix: Slurm's variables say more
            (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, ("slurm", 5, 8)),
            (SRUN | {"PMIX_RANK": "5"}, ("slurm", 5, 8)),
        ],
    )
    def test_launchers(self, env, expected):
        launch = find_launch(env)
        assert (launch.kind, launch.rank, launch.world_size) == expected

    def test_torchrun_says_where_rank_0_is(self):
        assert find_launch(TORCHRUN).address == ("gpu01", 29500)

    def test_slurm_ranks_meet_on_the_first_node(self):
        host, port = find_launch(SRUN).address
        assert host == "gpu07"
        assert 15000 <= port < 30000
        one_node = SRUN | {"SLURM_STEP_NODELIST": "gpu07"}
        assert find_launch(one_node).address[0] == "127.0.0.1"
        assert find_launch(SRUN | {"SLURM_STEP_ID": "1"}).address[1] != port
        assert find_launch(SRUN | {"SLURM_JOB_ID": "78"}).address[1] != port

    def test_the_user_may_say_where(self):
        env = SRUN | {"MASTER_ADDR": "ib-gpu07", "MASTER_PORT": "1234"}
        assert find_launch(env).address == ("ib-gpu07", 1234)

    @pytest.mark.parametrize(
        ("env", "message"),
        [
            (TORCHRUN | {"RANK": "x"}, "RANK is 'x'"),
            (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
            (SRUN | {"SLURM_STEP_NODELIST": "gpu[a-b]"}, "set MASTER_ADDR"),
        ],
    )
    def test_what_cannot_be_is_refused(self, env, message):
        with pytest.raises(UserError, match=message):
            find_launch(env)

    @pytest.mark.parametrize(
        ("text", "hosts"),
        [
            ("gpu1", ["gpu1"]),
            ("a-1,b-2.org", ["a-1", "b-2.org"]),
            ("gpu[08-10,3],login", ["gpu08", "gpu09", "gpu10", "gpu3", "login"]),
            ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
            ("gpu[1-2]-ib,x", ["gpu1-ib", "gpu2-ib", "x"]),
        ],
    )
    def test_nodelist(self, text, hosts):
        assert expand_nodelist(text) == hosts

    @given(st.integers(1, 4), st.integers(0, 999), st.integers(0, 30))
    def test_nodelist_ranges_keep_their_zeros(self, width, first, more):
        text = f"n[{first:0{width}d}-{first + more:0{width}d}]"
        numbers = range(first, first + more + 1)
        assert expand_nodelist(text) == [f"n{number:0{width}d}" for number in numbers]


class TestDevices:
    def peers(self, *gpus, device="cuda"):
        """One rank a pair (node, "the letters of its visible GPUs")."""
        return [_Peer(node, node, device, tuple(letters)) for node, letters in gpus]

    def test_ranks_share_out_the_gpus_of_their_node(self):
        peers = self.peers(("a", "PQ"), ("a", "PQ"), ("b", "RS"), ("b", "RS"))
        assert choose_devices(peers) == [0, 1, 0, 1]

    def test_ranks_may_alternate_between_nodes(self):
        peers = self.peers(("a", "PQ"), ("b", "RS"), ("a", "PQ"), ("b", "RS"))
        assert choose_devices(peers) == [0, 0, 1, 1]

    def test_each_rank_may_see_a_gpu_of_its_own(self):
        assert choose_devices(self.peers(("a", "P"), ("a", "Q"), ("b", "R"))) == [0, 0, 0]

    def test_equal_gpu_names_on_two_nodes_are_two_gpus(self):
        assert choose_devices(self.peers(("a", "P"), ("b", "P"))) == [0, 0]

    @pytest.mark.parametrize("second", ["P", "PQ"])
    def test_more_ranks_than_gpus(self, second):
        peers = self.peers(("a", "P"), ("a", "P"), ("b", "R"))
        with pytest.raises(UserError, match=r"2 ranks on a, but 1 visible GPU"):
            choose_devices(peers)

    def test_overlapping_gpus(self):
        with pytest.raises(UserError, match="2 ranks on a, but 2 visible GPU"):
            choose_devices(self.peers(("a", "P"), ("a", "PQ")))

    def test_all_ranks_use_one_kind(self):
        peers = self.peers(("a", "P")) + self.peers(("b", ""), device="cpu")
        with pytest.raises(UserError, match=r"rank 0 \(a\) would use cuda, rank 1 \(b\) cpu"):
            choose_devices(peers)

    def test_the_cpu_has_no_number(self):
        assert choose_devices(self.peers(("a", ""), ("a", ""), device="cpu")) == [None, None]

    def test_environment(self, monkeypatch):
        monkeypatch.setattr(th.cuda, "is_available", lambda: True)
        assert dist_util.dev() == th.device("cuda")
        monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", "cpu")
        assert dist_util.dev() == th.device("cpu")
        monkeypatch.setattr(th.cuda, "is_available", lambda: False)
        monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", "cuda")
        with pytest.raises(UserError, match="torch sees no GPU"):
            dist_util.dev()
        monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", "tpu")
        with pytest.raises(UserError, match="'tpu'; it may be cpu or cuda"):
            dist_util.dev()


class TestAlone:
    """One process needs no group."""

    def test_everything_is_trivial(self):
        assert (dist_util.rank(), dist_util.world_size(), dist_util.local_rank()) == (0, 1, 0)
        assert dist_util.is_main()
        assert dist_util.all_gather_object("a") == ["a"]
        assert dist_util.broadcast_object("a") == "a"
        assert dist_util.agree_max(-3) == -3
        assert dist_util.Comm().gather("a") == ["a"]
        dist_util.barrier()
        dist_util.sync_params([th.ones(2)])
        agreement = dist_util.Agreement()
        assert agreement.result() == 0
        agreement.post(4)
        assert agreement.result() == 4

    def test_errors_pass_through_the_guard(self):
        with pytest.raises(KeyError), dist_util.failure_guard():
            raise KeyError


class TestLoadStateDict:
    def test_round_trip(self, tmp_path):
        path = str(tmp_path / "model.pt")
        th.save({"a": th.arange(3), "step": 7}, path)
        state = dist_util.load_state_dict(path)
        assert state["step"] == 7
        assert state["a"].tolist() == [0, 1, 2]
        meta = dist_util.load_state_dict(path, map_location="meta")
        assert meta["a"].device.type == "meta"

    def test_no_such_file(self, tmp_path):
        with pytest.raises(UserError, match=r"none.pt does not exist"):
            dist_util.load_state_dict(str(tmp_path / "none.pt"))

    @pytest.mark.parametrize("size", [0, 10, 300])
    def test_damaged(self, tmp_path, size):
        path = tmp_path / "model.pt"
        th.save({"a": th.arange(100)}, path)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match=r"model\.pt"):
            dist_util.load_state_dict(str(path))

    def test_other_than_plain_values(self, tmp_path):
        path = str(tmp_path / "model.pt")
        th.save({"a": Path("x")}, path)
        with pytest.raises(UserError, match="more than tensors and plain values"):
            dist_util.load_state_dict(path)
        path = str(tmp_path / "pickle.pt")
        Path(path).write_bytes(pickle.dumps(Path("x"), protocol=2))
        with pytest.raises(UserError, match=r"pickle\.pt"):
            dist_util.load_state_dict(path)


# Ranks

# Seconds. Nothing here takes more than a few, unless the machine is busy with other things.
HANGS_S = 90


@dataclasses.dataclass
class Ended:
    """How a rank ended: exit code (-9: SIGKILL), and what it said on stderr."""

    code: int
    said: str

    def errors(self):
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def _rank(script, env, path):
    """Runs in the child, whose stderr goes to a file."""
    with open(path, "w") as file:
        os.dup2(file.fileno(), 2)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI", "RANK", "WORLD_SIZE", "MASTER_", "GUIDED")):
            del os.environ[name]
    os.environ.update(env, GUIDED_DIFFUSION_DEVICE="cpu")
    failure.GRACE_S = 1.0
    failure.ECHO_S = dist_util.ECHO_S = 1.5
    failure.COLLECT_S = 0.5
    dist_util.FIRST_WORD_S = 0.5
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
        child = context.Process(target=_rank, args=(script, own, path))
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


def everything():
    """Each collective call once, checked on the spot."""
    with dist_util.failure_guard():
        dist_util.setup_dist()
        dist_util.setup_dist()  # a second call does nothing
        rank, size = dist_util.rank(), dist_util.world_size()
        assert (size, dist_util.local_rank(), dist_util.is_main()) == (2, rank, rank == 0)
        assert dist.get_backend() == "gloo"
        logger.log("", level=logger.DEBUG)
        assert not {"mpi4py", "tensorboard", "tensorflow"} & set(sys.modules)
        assert dist_util.dev() == th.device("cpu")

        assert dist_util.all_gather_object({"r": rank}) == [{"r": 0}, {"r": 1}]
        assert dist_util.broadcast_object(f"from {rank}") == "from 0"
        assert dist_util.Comm().gather(rank) == ([0, 1] if rank == 0 else None)
        assert dist_util.agree_max(10 * rank) == 10
        assert dist_util.agree_max(-5 - rank) == -5
        dist_util.barrier()

        agreement, results = dist_util.Agreement(), []
        for step in range(6):
            results.append(agreement.result())
            agreement.post(9 if step == 3 and rank == 1 else 0)
        assert results == [0, 0, 0, 0, 9, 0]

        dist_util.BUCKET_BYTES = 64  # several buckets
        base = th.arange(24.0).reshape(1, 2, 3, 4)
        params = [
            th.nn.Parameter(base + rank),
            th.nn.Parameter((base + rank).to(memory_format=th.channels_last)),
            (base + rank).double(),
            th.tensor(rank + 7),
            th.zeros(0),
            (base + rank).transpose(1, 2),
        ]
        strides = [param.stride() for param in params]
        dist_util.sync_params(iter(params))
        expected = [base, base, base.double(), th.tensor(7), th.zeros(0), base.transpose(1, 2)]
        for param, value, stride in zip(params, expected, strides):
            assert th.equal(param, value)
            assert param.stride() == stride
    assert not dist.is_initialized()
    assert dist_util.world_size() == 1


@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
def test_collectives(tmp_path, launcher):
    for ended in run_ranks(tmp_path, everything, launcher=launcher):
        assert ended.code == 0, ended.said
        assert ended.said == ""


def fail(action):
    """Ranks that do small collective calls until rank 1, or all, take `action`."""
    with dist_util.failure_guard():
        dist_util.setup_dist()
        tensor = th.ones(1)
        for step in range(100_000):
            if step == 5:
                action(dist_util.rank())
            dist.all_reduce(tensor)


def on_rank_1(rank):
    if rank == 1:
        raise UserError("img_3.png\nis broken")


def on_all_ranks(rank):
    raise UserError("no such folder")


def on_rank_1_a_bug(rank):
    if rank == 1:
        raise KeyError("x")


def kill_rank_0(rank):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_rank_1(rank):
    if rank == 1:
        if os.fork() == 0:  # like a data loader's worker, which outlives its parent for a while
            while not os.path.exists(os.environ["TEST_DONE"]):
                time.sleep(0.1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def freeze_rank_1(rank):
    if rank == 1:
        time.sleep(2 * HANGS_S)


def interrupt_all(rank):
    raise KeyboardInterrupt


def stop_all(rank):
    sys.exit(EXIT_STOPPED)


def leave_rank_1(rank):
    if rank == 1:
        sys.exit(3)


@dataclasses.dataclass(frozen=True)
class Fail:
    action: object

    def __call__(self):
        errors.command(self.main)()

    def main(self):
        fail(self.action)


@pytest.mark.parametrize(
    ("action", "codes", "lines"),
    [
        (on_rank_1, (2, 2), [f"error: rank 1 ({HOST}): img_3.png is broken"]),
        (on_all_ranks, (2, 2), ["error: no such folder"]),
        (on_rank_1_a_bug, (1, 1), [f"error: rank 1 ({HOST}): KeyError: 'x'"]),
        (kill_rank_0, (-9, 1), [f"error: rank 0 ({HOST}): {failure.DIED}"]),
        (kill_rank_1, (1, -9), [f"error: rank 1 ({HOST}): {failure.DIED}"]),
        (interrupt_all, (130, 130), ["error: interrupted"]),
        (stop_all, (EXIT_STOPPED, EXIT_STOPPED), []),
        (leave_rank_1, (3, 3), [f"error: rank 1 ({HOST}): left by sys.exit(3)"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failure_ends_all_with_one_line(tmp_path, action, codes, lines):
    ended = run_ranks(tmp_path, Fail(action))
    assert tuple(rank.code for rank in ended) == codes
    assert ended[0].errors() + ended[1].errors() == lines
    # Only a bug is worth a traceback, and only that of the rank that has it.
    traces = sum("Traceback" in rank.said for rank in ended)
    assert traces == (action is on_rank_1_a_bug)


def test_a_rank_that_hangs_is_named_at_the_timeout(tmp_path):
    ended = run_ranks(tmp_path, Fail(freeze_rank_1), 3, env={"GUIDED_DIFFUSION_TIMEOUT": "4"})
    assert [rank.code for rank in ended] == [1, 1, 1]
    (line,) = ended[0].errors() + ended[1].errors() + ended[2].errors()
    assert f"timed out waiting for rank 1 ({HOST})" in line
    assert "no answer within 4 s (fail, " in line


def without_guard():
    dist_util.setup_dist()
    if dist_util.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(0.1)  # in no collective call at all


def test_the_watch_needs_no_guard_and_no_collective_call(tmp_path):
    ended = run_ranks(tmp_path, without_guard)
    assert [rank.code for rank in ended] == [1, -9]
    assert ended[0].errors() == [f"error: rank 1 ({HOST}): {failure.DIED}"]


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
    dist_util._describe_self = lambda: _Peer("host", "host", "cuda", ("GPU-1",))
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
            print(f"{dist_util.all_gather_object(dist_util.local_rank())}\\n", end="", flush=True)
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
