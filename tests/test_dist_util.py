"""guided_diffusion.dist_util: collective calls, with one rank and with several."""

import pickle
import sys
from pathlib import Path

import pytest
import torch as th
import torch.distributed as dist
from ranks_util import run_ranks

from guided_diffusion import dist_util, logger
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.ranks.devices import usable_cores


class TestAlone:
    """One process needs no group."""

    def test_everything_is_trivial(self):
        assert (dist_util.rank(), dist_util.world_size()) == (0, 1)
        assert dist_util.is_main()
        assert (dist_util.local_size(), dist_util.cores()) == (1, len(usable_cores()))
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
        with pytest.raises(UserError, match=r"none\.pt is missing"):
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


def everything():
    """Each collective call once, checked on the spot."""
    with dist_util.failure_guard():
        dist_util.setup_dist()
        dist_util.setup_dist()  # a second call does nothing
        rank, size = dist_util.rank(), dist_util.world_size()
        assert (size, dist_util.is_main()) == (2, rank == 0)
        assert dist.get_backend() == "gloo"
        logger.log("", level=logger.DEBUG)
        assert not {"mpi4py", "tensorboard", "tensorflow"} & set(sys.modules)
        assert dist_util.dev() == th.device("cpu")
        assert dist_util.local_size() == 2
        assert dist_util.cores() == max(1, len(usable_cores()) // 2)

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
