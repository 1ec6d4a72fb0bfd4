"""guided_diffusion.stepper: one optimisation step."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.stepper import Stepper, annealed, first_not_finite, warmup_cosine


def network() -> nn.Module:
    th.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))


def batch(step: int, size: int = 6) -> th.Tensor:
    return th.from_numpy(np.random.default_rng(step).standard_normal((size, 4))).float()


def take(stepper: Stepper, steps, spoil=()) -> None:
    """Steps on a toy problem; the gradients of steps in `spoil` are not finite."""
    for step in steps:
        with stepper.autocast():
            loss = (stepper.model(batch(step)) - 1).square().mean()
        stepper.backward(loss * (float("nan") if step in spoil else 1.0))
        stepper.step()


def weights(stepper: Stepper) -> list[th.Tensor]:
    return stepper.copy_of_weights()


def equal(these, those) -> bool:
    return all(th.equal(a, b) for a, b in zip(these, those, strict=True))


def plain_adamw(lr: float, weight_decay: float):
    """torch's plainest implementation."""
    model = network()
    options = {"foreach": False, "fused": False, "weight_decay": weight_decay}
    return model, th.optim.AdamW(model.parameters(), lr=lr, **options)


def take_plainly(model, opt, steps, clip: float = math.inf) -> list[float]:
    """What `take` does, with torch alone; the norms."""
    norms = []
    for step in steps:
        opt.zero_grad()
        (model(batch(step)) - 1).square().mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        opt.step()
    return norms


class TestSteps:
    @pytest.mark.parametrize("clip", [0.0, 1.6])
    def test_it_is_adamw(self, clip):
        stepper = Stepper(network(), lr=1e-2, weight_decay=0.1, max_grad_norm=clip)
        norms = []
        for step in range(20):
            (stepper.model(batch(step)) - 1).square().mean().backward()
            norms.append(float(stepper.step()))
            assert all(p.grad is None for p in stepper.module.parameters())
        model, opt = plain_adamw(1e-2, 0.1)
        expected = take_plainly(model, opt, range(20), clip or math.inf)
        for ours, theirs in zip(weights(stepper), model.parameters()):
            th.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norms, expected, rtol=1e-5)
        assert min(norms) < 1.6 < max(norms)  # so the clipping clips some

    def test_the_learning_rate_of_a_step(self):
        stepper = Stepper(network(), lr=1e-2)
        before = weights(stepper)
        (stepper.model(batch(0)) - 1).square().mean().backward()
        stepper.step(0.0)
        assert equal(weights(stepper), before)

    def test_learning_rates_of_groups(self):
        model = network()
        groups = [
            {"params": list(model[0].parameters()), "lr_scale": 0.0},
            {"params": list(model[2].parameters())},
        ]
        stepper = Stepper(model, lr=1e-2, param_groups=groups)
        before = weights(stepper)
        take(stepper, range(2))
        changed = [not th.equal(a, b) for a, b in zip(weights(stepper), before)]
        assert changed == [False, False, True, True]

    def test_frozen_parameters_stay(self):
        model = network()
        model[0].requires_grad_(False)
        stepper = Stepper(model, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0, ema_rates=[0.5])
        before = weights(stepper)
        take(stepper, range(3))
        changed = [not th.equal(a, b) for a, b in zip(weights(stepper), before)]
        assert changed == [False, False, True, True]

    def test_unknown_precision(self):
        with pytest.raises(UserError, match="--precision fp8: choose one of fp32, fp16, bf16"):
            Stepper(network(), lr=1e-2, precision="fp8")


class TestNotFinite:
    @pytest.mark.parametrize("clip", [0.0, 1.0])
    def test_the_step_is_as_if_it_had_not_been(self, clip):
        spoilt = Stepper(network(), lr=1e-2, weight_decay=0.1, max_grad_norm=clip)
        take(spoilt, [0, 1, 77, 2, 78, 79, 3], spoil=[77, 78, 79])
        clean = Stepper(network(), lr=1e-2, weight_decay=0.1, max_grad_norm=clip)
        take(clean, [0, 1, 2, 3])
        assert equal(weights(spoilt), weights(clean))
        theirs, ours = clean.opt.state_dict()["state"], spoilt.opt.state_dict()["state"]
        assert all(equal(theirs[i].values(), ours[i].values()) for i in theirs)

    def test_they_are_counted(self):
        stepper = Stepper(network(), lr=1e-2)
        seen = []
        for step in range(6):
            take(stepper, [step], spoil=[1, 2, 4])
            seen.append(stepper.skipped())
        assert seen == [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3), (0, 3)]
        assert stepper.steps == 6

    def test_one_bad_number_suffices(self):
        stepper = Stepper(network(), lr=1e-2)
        before = weights(stepper)
        (stepper.model(batch(0)) - 1).square().mean().backward()
        stepper.module[2].bias.grad[1] = float("inf")
        assert not th.isfinite(stepper.step())
        assert equal(weights(stepper), before)
        assert stepper.skipped() == (1, 1)


class TestAverages:
    def test_they_follow_their_formula(self):
        stepper = Stepper(network(), lr=1e-2, ema_rates=[0.9, 0.5], ema_warmup=False)
        expected = {rate: weights(stepper) for rate in (0.9, 0.5)}
        for step in range(5):
            take(stepper, [step])
            for rate, averages in expected.items():
                for average, weight in zip(averages, weights(stepper)):
                    average.copy_(rate * average + (1 - rate) * weight)
        for rate, averages in expected.items():
            for ours, theirs in zip(stepper.ema[rate], averages):
                th.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_the_start_is_forgotten_soon(self):
        stepper = Stepper(network(), lr=1e-2, ema_rates=[0.9])
        expected = weights(stepper)
        for step, rate in enumerate([1 / 10, 2 / 11, 3 / 12]):
            take(stepper, [step])
            for average, weight in zip(expected, weights(stepper)):
                average.copy_(rate * average + (1 - rate) * weight)
        for ours, theirs in zip(stepper.ema[0.9], expected):
            th.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        stepper.steps = 10_000  # (1 + n) / (10 + n) is above 0.9 then
        before = [average.clone() for average in stepper.ema[0.9]]
        take(stepper, [5])
        for ours, old, weight in zip(stepper.ema[0.9], before, weights(stepper)):
            th.testing.assert_close(ours, 0.9 * old + 0.1 * weight, rtol=1e-5, atol=1e-7)

    def test_a_skipped_step_leaves_them_unchanged(self):
        stepper = Stepper(network(), lr=1e-1, ema_rates=[0.9, 0.5])
        take(stepper, range(3))
        before = [average.clone() for averages in stepper.ema.values() for average in averages]
        take(stepper, [3], spoil=[3])
        assert stepper.skipped() == (1, 1)
        assert equal([a for averages in stepper.ema.values() for a in averages], before)
        take(stepper, [4])
        assert not equal([a for averages in stepper.ema.values() for a in averages], before)

    def test_running_statistics_of_batch_norm_are_averaged_too(self):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        stepper = Stepper(model, lr=1e-2, ema_rates=[0.9], ema_warmup=False)
        expected = model[1].running_mean.clone()
        for step in range(4):
            take(stepper, [step])
            expected = 0.9 * expected + 0.1 * model[1].running_mean
        own = model[1].running_mean.clone()
        state = stepper.weights_as_state_dict(stepper.ema[0.9])
        assert list(state) == list(model.state_dict())
        th.testing.assert_close(state["1.running_mean"], expected)
        with stepper.averaged_weights(0.9):
            th.testing.assert_close(model[1].running_mean, expected)
            assert not model.training
        assert th.equal(model[1].running_mean, own)
        other = Stepper(copy.deepcopy(model), lr=1e-2, ema_rates=[0.9])
        other.load_ema(0.9, state)
        assert equal(other.ema[0.9], stepper.ema[0.9])

    def test_a_look_through_them(self):
        stepper = Stepper(network(), lr=1e-2, ema_rates=[0.9])
        take(stepper, range(3))
        own = weights(stepper)
        inside = None
        with pytest.raises(KeyError), stepper.averaged_weights(0.9) as model:  # noqa: PT012
            inside = [p.detach().clone() for p in model.parameters()]
            assert not model.training
            raise KeyError
        assert equal(inside, stepper.ema[0.9])
        assert not equal(inside, own)
        assert equal(weights(stepper), own)
        assert stepper.module.training

    def test_as_a_state_dict(self):
        stepper = Stepper(network(), lr=1e-2, ema_rates=[0.9])
        take(stepper, range(3))
        state = stepper.weights_as_state_dict(stepper.ema[0.9])
        assert list(state) == list(stepper.module.state_dict())
        other = Stepper(network(), lr=1e-2, ema_rates=[0.9])
        other.load_ema(0.9, state)
        assert equal(other.ema[0.9], stepper.ema[0.9])
        assert not equal(other.ema[0.9], weights(stepper))


def simulate_float16(stepper: Stepper, growth_interval: int = 3) -> Stepper:
    """The loss scaling of a float16 run, around float32 arithmetic."""
    stepper.scaler = th.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=growth_interval)
    stepper.precision = "fp16"
    stepper.autocast = lambda: th.autocast("cpu", enabled=False)
    return stepper


class TestState:
    @pytest.mark.parametrize("scaled", [False, True])
    def test_a_stepper_goes_on_where_another_was(self, scaled):
        def new():
            stepper = Stepper(
                network(), lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, ema_rates=[0.9, 0.99]
            )
            return simulate_float16(stepper) if scaled else stepper

        spoil = [3, 9, 10]
        whole = new()
        take(whole, range(20), spoil)
        first = new()
        take(first, range(11), spoil)
        state = copy.deepcopy(
            {
                "model": first.weights_as_state_dict(),
                "ema": {r: first.weights_as_state_dict(a) for r, a in first.ema.items()},
                "opt": first.opt.state_dict(),
                "rest": first.state_dict(),
            }
        )
        second = new()
        second.module.load_state_dict(state["model"])
        for rate, averages in state["ema"].items():
            second.load_ema(rate, averages)
        second.load_optimizer(state["opt"])
        second.load_state_dict(state["rest"])
        assert second.skipped() == (2, 3)
        take(second, range(11, 20), spoil)
        assert equal(weights(second), weights(whole))
        for rate in whole.ema:
            assert equal(second.ema[rate], whole.ema[rate])
        theirs, ours = whole.opt.state_dict()["state"], second.opt.state_dict()["state"]
        assert all(equal(theirs[i].values(), ours[i].values()) for i in theirs)
        assert second.state_dict() == whole.state_dict()

    def test_the_loss_scale(self):
        stepper = simulate_float16(Stepper(network(), lr=1e-2))
        scales = []
        for step in range(8):
            take(stepper, [step], spoil=[1, 2])
            scales.append(math.log2(stepper.loss_scale()))
        # halved by what overflows, doubled after three steps that do not
        assert scales == [16, 15, 14, 14, 14, 15, 15, 15]
        other = simulate_float16(Stepper(network(), lr=1e-2))
        other.load_state_dict(stepper.state_dict())
        take(other, [8])
        assert math.log2(other.loss_scale()) == 16  # two of the three were before
        assert stepper.skipped() == (0, 2)

    def test_the_loss_scale_leaves_no_trace_in_the_weights(self):
        scaled = simulate_float16(Stepper(network(), lr=1e-2, max_grad_norm=0.3))
        plain = Stepper(network(), lr=1e-2, max_grad_norm=0.3)
        take(scaled, range(5))
        take(plain, range(5))
        assert equal(weights(scaled), weights(plain))  # powers of two scale without rounding

    def test_float16_on_a_cpu_is_float32(self):
        stepper = Stepper(network(), lr=1e-2, precision="fp16")
        assert stepper.precision == "fp32"
        assert stepper.loss_scale() == 1
        # the state of a float16 run is of no use here, and does no harm
        stepper.load_state_dict(simulate_float16(Stepper(network(), lr=1e-2)).state_dict())
        take(stepper, range(2))

    def test_the_optimizer_of_the_original_package(self):
        """Its files hold AdamW of torch 1.7: steps are ints, later options are missing."""
        model, opt = plain_adamw(3e-2, 0.0)
        take_plainly(model, opt, range(5))
        old = copy.deepcopy(opt.state_dict())
        for values in old["state"].values():
            values["step"] = int(values["step"])
        (group,) = old["param_groups"]
        known = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
        old["param_groups"] = [{name: group[name] for name in known}]

        stepper = Stepper(copy.deepcopy(model), lr=1e-2, weight_decay=0.1)
        stepper.load_optimizer(old)
        take(stepper, range(5, 9))
        opt.param_groups[0].update(lr=1e-2, weight_decay=0.1)
        take_plainly(model, opt, range(5, 9))
        for ours, theirs in zip(weights(stepper), model.parameters()):
            th.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)

    def test_an_optimizer_of_another_network(self):
        masters = th.optim.AdamW([nn.Parameter(th.zeros(3)), nn.Parameter(th.zeros(1, 5))])
        with pytest.raises(UserError, match=r"\[2\] tensors, the network has \[4\]"):
            Stepper(network(), lr=1e-2).load_optimizer(masters.state_dict())

    def test_an_optimizer_of_another_width(self):
        other = nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 2))
        stepper = Stepper(other, lr=1e-2)
        take(stepper, range(1))
        with pytest.raises(UserError, match="belongs to another network"):
            Stepper(network(), lr=1e-2).load_optimizer(stepper.opt.state_dict())


class TestSchedules:
    def test_annealed(self):
        assert [annealed(2.0, step, 4) for step in range(6)] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
        assert annealed(2.0, 10**6, 0) == 2.0

    def test_warmup_cosine(self):
        factors = [warmup_cosine(step, 12, 4) for step in range(14)]
        assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert factors[8] == pytest.approx(0.5)
        assert factors[12:] == pytest.approx([0.0, 0.0], abs=1e-12)

    @given(st.integers(1, 1000), st.data())
    def test_warmup_cosine_stays_in_bounds(self, steps, data):
        warmup = data.draw(st.integers(0, steps))
        step = data.draw(st.integers(0, steps - 1))
        assert 0 <= warmup_cosine(step, steps, warmup) <= 1
        assert warmup_cosine(0, steps, warmup) > 0


class TestFirstNotFinite:
    def test_it_names_the_layer(self):
        model = network()
        assert first_not_finite(model, lambda: model(batch(0))) == ""
        model[2].weight.data[0, 0] = float("inf")
        assert first_not_finite(model, lambda: model(batch(0))) == "2"
        model[0].bias.data[3] = float("nan")
        assert first_not_finite(model, lambda: model(batch(0))) == "0"
        assert not any(module._forward_hooks for module in model.modules())


def test_a_step_does_not_import_torchs_compiler():
    """It takes seconds and 150 MB."""
    program = """
import sys, torch as th
from guided_diffusion.stepper import Stepper
stepper = Stepper(th.nn.Linear(2, 2), lr=0.1, ema_rates=[0.9])
stepper.backward(stepper.model(th.ones(1, 2)).sum())
stepper.step()
stepper.load_optimizer(stepper.opt.state_dict())
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
