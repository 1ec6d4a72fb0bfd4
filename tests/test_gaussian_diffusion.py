"""The diffusion process against recorded numbers, and against the mathematics it stands for."""

import copy
import math

import numpy as np
import pytest
import torch as th
from golden_util import GOLDEN, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from guided_diffusion.losses import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

STEPS = 50
SHAPE = (3, 3, 8, 8)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "diffusion.npz") as numbers:
        return dict(numbers)


def golden_cases():
    """Names of the recorded settings, each as (name, learn, predict_xstart, kl, rescale, spec)."""
    for learn, xs, kl, resc in np.ndindex(2, 2, 2, 2):
        if resc and (kl or not learn):
            continue
        for spec in ("full", "10", "ddim10"):
            name = f"d/learn{learn}_xs{xs}_kl{kl}_resc{resc}_{spec}"
            yield pytest.param(name, learn, xs, kl, resc, spec, id=name[2:])


def diffusion_of(learn, xs, kl, resc, spec):
    if kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if resc else LossType.MSE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(STEPS, str(STEPS) if spec == "full" else spec),
        betas=get_named_beta_schedule("cosine" if kl else "linear", STEPS),
        model_mean_type=ModelMeanType.START_X if xs else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn else ModelVarType.FIXED_LARGE,
        loss_type=loss_type,
        rescale_timesteps=bool(xs),
    )


def toy_network(learn):
    def toy(x, t):
        t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        out = 0.3 * x + 0.1 * th.sin(7 * x + t / 1000)
        return th.cat([out, 0.2 * th.cos(x)], dim=1) if learn else out

    return toy


def assert_close(actual, expected, bound=1e-5):
    """Within `bound` of the largest magnitude."""
    actual = actual.detach().numpy() if isinstance(actual, th.Tensor) else actual
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error <= bound


@pytest.mark.parametrize(("name", "learn", "xs", "kl", "resc", "spec"), list(golden_cases()))
def test_agrees_with_recorded_numbers(golden, name, learn, xs, kl, resc, spec):
    diffusion = diffusion_of(learn, xs, kl, resc, spec)
    toy = toy_network(learn)
    x_start, eps = tensor("x0", *SHAPE).clamp(-1, 1), tensor("eps", *SHAPE)
    t = th.tensor([0, 25, 49]).clamp(max=diffusion.num_timesteps - 1)

    x_t = diffusion.q_sample(x_start, t, noise=eps)
    found = {"q_sample": x_t}
    losses = diffusion.training_losses(toy, x_start, t, noise=eps)
    found |= {f"loss/{k}": v for k, v in losses.items()}
    found |= {f"pmv/{k}": v for k, v in diffusion.p_mean_variance(toy, x_t, t).items()}
    found["ddim_loop"] = diffusion.ddim_sample_loop(toy, SHAPE, noise=eps)
    if spec == "10":
        found["ddim_reverse"] = diffusion.ddim_reverse_sample(toy, x_t, t)["sample"]
        th.manual_seed(0)
        found["p_sample_loop_seed0"] = diffusion.p_sample_loop(toy, SHAPE, noise=eps)
        th.manual_seed(0)
        bpd = diffusion.calc_bpd_loop(toy, x_start)
        found |= {f"bpd_seed0/{k}": v for k, v in bpd.items()}

    expected = {k[len(name) + 1 :]: v for k, v in golden.items() if k.startswith(name + "/")}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value)
