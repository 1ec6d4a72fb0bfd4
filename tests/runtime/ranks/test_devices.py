"""guided_diffusion.runtime.ranks.devices: a GPU for every rank."""

import pytest
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.networks.precision import choose_for
from guided_diffusion.runtime import session
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.ranks.devices import (
    Peer,
    choose_devices,
    chosen_device,
    describe_self,
    of_float64,
    share_cores,
)
from guided_diffusion.training.run import num_workers_of


class TestDevices:
    def peers(self, *gpus, device="cuda"):
        """One rank per pair (node, "the letters of its visible GPUs")."""
        return [Peer(node, node, device, tuple(letters)) for node, letters in gpus]

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
        with pytest.raises(UserError, match="DEVICE is cuda, but torch sees no GPU"):
            dist_util.dev()
        monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", "tpu")
        with pytest.raises(UserError, match="'tpu'; it may be cpu, cuda, cuda:N"):
            dist_util.dev()


@pytest.fixture
def machine(monkeypatch):
    """A machine with these devices, and the flag --device."""

    def make(gpus=0, mps=False, flag=""):
        monkeypatch.setattr(th.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(th.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(th.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(session, "_current", session.Session(device=flag))

    return make


class TestTheFlag:
    @pytest.mark.parametrize(
        ("flag", "chosen"), [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("", "cuda")]
    )
    def test_one_of_two_gpus(self, machine, flag, chosen):
        machine(gpus=2, flag=flag)
        assert dist_util.dev() == chosen_device() == th.device(chosen)

    def test_it_goes_before_the_variable(self, machine, monkeypatch):
        monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", "cuda")
        machine(flag="cpu")
        assert chosen_device() == th.device("cpu")

    def test_mps_is_used_where_asked_for(self, machine):
        machine(mps=True)
        assert chosen_device() == th.device("cpu")
        machine(mps=True, flag="mps")
        assert chosen_device() == th.device("mps")

    @pytest.mark.parametrize(
        ("gpus", "mps", "flag", "said"),
        [
            (0, False, "cuda", r"--device is cuda, but torch sees no GPU \(.*\) on .*: use cpu$"),
            (0, True, "cuda:0", r"sees no GPU .*: use mps or cpu$"),
            (1, False, "cuda:1", r"sees 1 GPU .*: use cuda or cpu$"),
            (2, False, "cuda:2", r"sees 2 GPUs .*: use cuda:0 or cuda:1 or cpu$"),
            (2, False, "mps", r"sees no Apple GPU on .*: use cuda:0 or cuda:1 or cpu$"),
        ],
    )
    def test_a_device_that_is_not_there(self, machine, gpus, mps, flag, said):
        machine(gpus, mps, flag)
        with pytest.raises(UserError, match=said):
            chosen_device()

    @pytest.mark.parametrize("flag", ["cuda:1", "mps"])
    def test_of_several_processes_each_has_its_own(self, machine, flag):
        machine(gpus=2, mps=True, flag=flag)
        with pytest.raises(UserError, match=f"the device {flag} is for one process"):
            describe_self()


class TestShareOfCores:
    """How many CPU cores a rank has."""

    def test_ranks_of_a_node_share_what_they_may_all_use(self):
        peers = [Peer(node, node, "cuda", cores=tuple(range(16))) for node in "aaab"]
        assert [share_cores(peers, rank) for rank in range(4)] == [5, 5, 5, 16]

    def test_cores_that_the_launcher_assigned_are_not_shared_again(self):
        peers = [Peer("a", "a", "cuda", cores=tuple(range(n, n + 4))) for n in (0, 4, 8)]
        assert [share_cores(peers, rank) for rank in range(3)] == [4, 4, 4]

    def test_one_at_least(self):
        assert share_cores([Peer("a", "a", "cpu")] * 3, 1) == 1

    def test_automatic_workers_are_shared_out(self, monkeypatch):
        monkeypatch.setattr(dist_util, "dev", lambda: th.device("cuda"))
        for cores, workers in ((64, 8), (5, 4), (1, 0)):
            monkeypatch.setattr(dist_util, "cores", lambda cores=cores: cores)
            assert num_workers_of(-1) == workers
            assert num_workers_of(3) == 3


def test_what_has_no_float64_sums_on_the_cpu():
    assert of_float64(th.device("mps")) == th.device("cpu")
    assert of_float64(th.device("cuda:1")) == th.device("cuda:1")


def test_float16_needs_cuda():
    with pytest.raises(UserError, match="fp16 needs a GPU of CUDA"):
        choose_for("mps", "fp16")
    assert choose_for("mps", "").precision == "fp32"
