"""Distributions over timesteps: what they draw, and that all ranks agree on them."""

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion import resample
from guided_diffusion.resample import (
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from guided_diffusion.runtime.errors import UserError


class Process:
    """All that a sampler asks of a diffusion."""

    num_timesteps = 6


def warmed_up(losses=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), history=2):
    sampler = LossSecondMomentResampler(Process(), history_per_term=history)
    for _ in range(history):
        sampler.update_with_all_losses(list(range(6)), list(losses))
    return sampler


def test_names():
    assert type(create_named_schedule_sampler("uniform", Process())) is UniformSampler
    found = create_named_schedule_sampler("loss-second-moment", Process())
    assert type(found) is LossSecondMomentResampler
    with pytest.raises(UserError, match="'uniformly': choose uniform or loss-second-moment"):
        create_named_schedule_sampler("uniformly", Process())


def test_draws_follow_the_weights():
    sampler = warmed_up()
    uniforms = (np.arange(60000) + 0.5) / 60000
    indices, weights = sampler.sample(60000, "cpu", uniforms=uniforms)
    assert indices.dtype == th.int64
    assert weights.dtype == th.float32
    expected = sampler.weights() / sampler.weights().sum()
    np.testing.assert_allclose(np.bincount(indices, minlength=6) / 60000, expected, atol=1e-4)
    np.testing.assert_allclose(weights, 1 / (6 * expected[indices]), rtol=1e-6)
    # Importance weights make the mean unbiased.
    assert weights.mean().item() == pytest.approx(1, abs=1e-3)


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_one_number_decides_one_timestep(uniform):
    indices, weights = UniformSampler(Process()).sample(1, "cpu", uniforms=np.array([uniform]))
    assert indices.item() == int(uniform * 6) or abs(uniform * 6 - round(uniform * 6)) < 1e-9
    assert weights.item() == pytest.approx(1)


def test_a_timestep_of_no_weight_is_never_drawn():
    class Odd(UniformSampler):
        def weights(self):
            return np.array([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])

    uniforms = np.array([0.0, 0.5, np.nextafter(1, 0)])
    indices, _ = Odd(Process()).sample(3, "cpu", uniforms=uniforms)
    assert indices.tolist() == [1, 3, 3]


def test_draws_are_those_of_numpys_choice():
    """The same global seed gives the same timesteps as a weighted choice by numpy itself."""
    sampler = warmed_up()
    p = sampler.weights() / sampler.weights().sum()
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.choice(6, size=50, p=p)  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    assert sampler.sample(50, "cpu")[0].tolist() == expected.tolist()


def test_a_wrong_number_of_uniforms():
    with pytest.raises(ValueError, match="4 uniform numbers expected"):
        UniformSampler(Process()).sample(4, "cpu", uniforms=np.zeros(3))


def test_uniform_until_every_timestep_is_known():
    sampler = LossSecondMomentResampler(Process(), history_per_term=2)
    for _ in range(5):
        sampler.update_with_all_losses([0, 1, 2, 3, 4], [9.0, 1, 1, 1, 1])
        assert (sampler.weights() == 1).all()
    sampler.update_with_all_losses([5], [1.0])
    assert (sampler.weights() == 1).all()
    sampler.update_with_all_losses([5], [1.0])
    assert sampler.weights()[0] > 8 * sampler.weights()[1]


def test_weights_are_root_mean_squares_of_the_latest():
    sampler = LossSecondMomentResampler(Process(), history_per_term=2, uniform_prob=0.1)
    history = np.arange(18.0).reshape(3, 6)
    for losses in history:
        sampler.update_with_all_losses(list(range(6)), losses.tolist())
    rms = np.sqrt((history[1:] ** 2).mean(0))
    np.testing.assert_allclose(sampler.weights(), 0.9 * rms / rms.sum() + 0.1 / 6)
    assert sampler.weights().sum() == pytest.approx(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_leave_no_trace(bad):
    sampler = warmed_up()
    before = sampler.weights().copy()
    sampler.update_with_local_losses(th.tensor([2]), th.tensor([bad]))
    assert (sampler.weights() == before).all()


def test_losses_that_are_all_zero_are_no_division_by_zero():
    assert (warmed_up([0.0] * 6).weights() == 1).all()


def test_without_process_group():
    sampler, expected = warmed_up(), warmed_up()
    losses = th.tensor([7.0, 8.0, 0.5], requires_grad=True)
    sampler.update_with_local_losses(th.tensor([0, 0, 3]), losses)
    expected.update_with_all_losses([0, 0, 3], [7.0, 8.0, 0.5])
    assert (sampler.weights() == expected.weights()).all()
    assert not (sampler.weights() == warmed_up().weights()).all()


def test_what_ranks_exchange_lies_on_the_device_of_the_losses(monkeypatch):
    """NCCL refuses tensors of a CPU; the trainer keeps the timesteps there."""
    devices = []

    def gather(values):
        devices.append(values.device.type)
        return th.zeros(len(values), dtype=values.dtype)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(resample, "_gather", gather)
    warmed_up().update_with_local_losses(th.tensor([1, 2]), th.zeros(2, device="meta"))
    assert devices == ["meta", "meta"]


def _of_a_rank(rank, store, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sampler = warmed_up()
    ts, losses = ([0, 5, 1], [7.0, 8.0, 9.0]) if rank == 0 else ([0], [0.25])
    sampler.update_with_local_losses(th.tensor(ts), th.tensor(losses))
    queue.put(sampler.weights().tolist())
    dist.destroy_process_group()


def test_ranks_with_unlike_batches_agree(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.start_processes(_of_a_rank, args=(tmp_path / "store", queue), nprocs=2)
    expected = warmed_up()
    expected.update_with_all_losses([0, 5, 1, 0], [7.0, 8.0, 9.0, 0.25])
    for _ in range(2):
        assert queue.get() == expected.weights().tolist()


def test_state_goes_on_where_it_was():
    sampler = warmed_up(history=3)
    sampler.update_with_all_losses([1, 1], [10.0, 11.0])
    state = sampler.state_dict()
    assert all(isinstance(value, th.Tensor) for value in state.values())
    resumed = LossSecondMomentResampler(Process(), history_per_term=3)
    resumed.load_state_dict(state)
    # What happens afterwards must not write into the state that was taken.
    for one in (sampler, resumed):
        one.update_with_all_losses([1, 4], [12.0, 13.0])
    assert (resumed.weights() == sampler.weights()).all()
    again = LossSecondMomentResampler(Process(), history_per_term=3)
    again.load_state_dict(state)
    assert not (again.weights() == sampler.weights()).all()


def test_state_of_another_run():
    sampler = warmed_up(history=3)
    with pytest.raises(UserError, match=r"shape \(6, 2\), this run's \(6, 3\)"):
        sampler.load_state_dict(warmed_up(history=2).state_dict())
    with pytest.raises(UserError, match="shape none"):
        sampler.load_state_dict(UniformSampler(Process()).state_dict())
    uniform = UniformSampler(Process())
    uniform.load_state_dict(uniform.state_dict())
    with pytest.raises(UserError, match="keeps no state"):
        uniform.load_state_dict(sampler.state_dict())
