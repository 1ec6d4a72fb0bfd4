"""guided_diffusion.runtime.ranks.launch: how this process was started."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.ranks.launch import expand_nodelist, find_launch

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
