"""The diffusion process against recorded numbers, and against the mathematics it stands for."""

import copy
import math

import numpy as np
import pytest
import torch as th
from diffusion_util import make_diffusion, toy_network
from golden_util import GOLDEN, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.runtime.errors import UserError

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


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_named_schedules_agree_with_recorded_numbers(golden, schedule, steps):
    expected = golden[f"betas/{schedule}/{steps}"]
    np.testing.assert_allclose(get_named_beta_schedule(schedule, steps), expected, rtol=1e-10)


@given(st.floats(0.3, 4), st.integers(1, 60))
@settings(deadline=None)
def test_betas_for_alpha_bar_follow_the_function(power, steps):
    betas = betas_for_alpha_bar(steps, lambda u: (1 - 0.7 * u) ** power)
    expected = (1 - 0.7 * np.arange(1, steps + 1) / steps) ** power
    np.testing.assert_allclose(np.cumprod(1 - betas), expected, rtol=1e-9)


def test_betas_for_alpha_bar_stop_short_of_pure_noise():
    assert betas_for_alpha_bar(4, lambda u: 1 - u)[-1] == 0.999
    assert betas_for_alpha_bar(4, lambda u: 1 - u, max_beta=0.5).max() == 0.5


def test_public_tables_are_float64():
    diffusion = make_diffusion("linear", 200)
    for name in (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "alphas_cumprod_next",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ):
        table = getattr(diffusion, name)
        assert table.dtype == np.float64
        assert table.shape == (diffusion.num_timesteps,)
        assert np.isfinite(table).all()


def test_posterior_is_that_of_bayes_rule():
    """q(x_{t-1} | x_t, x_0) by multiplying the densities of two Gaussians."""
    diffusion = make_diffusion("linear", 50)
    t = th.arange(1, 50)
    x_start, x_t = (
        tensor("bayes/x0", 49, 1, 2, 2).double(),
        tensor("bayes/xt", 49, 1, 2, 2).double(),
    )
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    abar = th.from_numpy(diffusion.alphas_cumprod)[t - 1].reshape(-1, 1, 1, 1)
    beta = th.from_numpy(diffusion.betas)[t].reshape(-1, 1, 1, 1)
    precision = 1 / (1 - abar) + (1 - beta) / beta
    weighted = abar.sqrt() * x_start / (1 - abar) + (1 - beta).sqrt() * x_t / beta
    assert th.allclose(variance, (1 / precision).expand_as(variance))
    assert th.allclose(mean, weighted / precision)
    assert th.allclose(log_variance.exp(), variance)


def test_q_mean_variance_describes_q_sample():
    diffusion = make_diffusion("linear", 200)
    x_start = tensor("q/x0", 3, 1, 4, 4).double()
    t = th.tensor([0, 60, 199])
    mean, variance, log_variance = diffusion.q_mean_variance(x_start, t)
    noise = tensor("q/noise", 3, 1, 4, 4).double()
    sample = diffusion.q_sample(x_start, t, noise=noise)
    assert th.allclose(sample, mean + variance.sqrt() * noise)
    assert th.allclose(log_variance.exp(), variance)


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
def test_perfect_network_recovers_the_image(mean_type):
    """Whatever it predicts: x_0 is found, and the mean is the posterior's."""
    diffusion = make_diffusion("linear", 200, mean_type=mean_type)
    x_start = tensor("perfect/x0", 3, 2, 4, 4).double()
    noise = tensor("perfect/noise", 3, 2, 4, 4).double()
    t = th.tensor([0, 60, 199])
    x_t = diffusion.q_sample(x_start, t, noise=noise)
    target = {
        ModelMeanType.EPSILON: noise,
        ModelMeanType.START_X: x_start,
        ModelMeanType.PREVIOUS_X: diffusion.q_posterior_mean_variance(x_start, x_t, t)[0],
    }[mean_type]
    out = diffusion.p_mean_variance(lambda x, t: target, x_t, t, clip_denoised=False)
    mean = diffusion.q_posterior_mean_variance(x_start, x_t, t)[0]
    assert th.allclose(out["pred_xstart"], x_start)
    assert th.allclose(out["mean"], mean)
    losses = diffusion.training_losses(lambda x, t: target, x_start, t, noise=noise)
    assert losses["loss"].max() < 1e-20


@given(st.floats(-1, 1))
@settings(max_examples=20, deadline=None)
def test_learned_range_interpolates_the_bounds(value):
    diffusion = make_diffusion("linear", 200, var_type=ModelVarType.LEARNED_RANGE)
    x, t = tensor("range/x", 3, 1, 2, 2).double(), th.tensor([1, 60, 199])
    network = lambda x, t: th.cat([x, th.full_like(x, value)], dim=1)  # noqa: E731
    log_variance = diffusion.p_mean_variance(network, x, t)["log_variance"][:, 0, 0, 0].numpy()
    low, high = np.log(diffusion.posterior_variance[t]), np.log(diffusion.betas[t])
    np.testing.assert_allclose(log_variance, low + (value + 1) / 2 * (high - low), rtol=1e-9)


@pytest.mark.parametrize(
    ("var_type", "expected"),
    [
        (ModelVarType.FIXED_SMALL, lambda d: d.posterior_variance),
        (ModelVarType.FIXED_LARGE, lambda d: d.betas),
        (ModelVarType.LEARNED, lambda d: np.full(d.num_timesteps, math.exp(-1.25))),
    ],
)
def test_variance_of_each_type(var_type, expected):
    diffusion = make_diffusion("linear", 200, var_type=var_type)
    t = th.tensor([1, 60, 199])

    def network(x, t):
        return th.cat([x, th.full_like(x, -1.25)], dim=1) if var_type.is_learned() else x

    out = diffusion.p_mean_variance(network, tensor("var/x", 3, 1, 2, 2).double(), t)
    np.testing.assert_allclose(out["variance"][:, 0, 0, 0], expected(diffusion)[t], rtol=1e-12)
    assert th.allclose(out["log_variance"].exp(), out["variance"])


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.LEARNED_RANGE])
def test_half_precision_networks_are_heard_in_float32(dtype, var_type):
    """All arithmetic but the network's own: what is found is that of its answer made float32."""
    diffusion = make_diffusion("linear", 200, var_type=var_type, loss_type=LossType.RESCALED_MSE)
    x, t = tensor("half/x", 3, 1, 8, 8), th.tensor([0, 60, 199])
    answer = toy_network(var_type.is_learned())(x, t).to(dtype)

    def half(x, t):
        return answer

    def rounded(x, t):
        return answer.float()

    for found, expected in (
        (diffusion.p_mean_variance(half, x, t), diffusion.p_mean_variance(rounded, x, t)),
        (
            diffusion.training_losses(half, x, t, noise=x),
            diffusion.training_losses(rounded, x, t, noise=x),
        ),
        (
            diffusion.p_mean_variance(half, x.to(dtype), t),
            diffusion.p_mean_variance(half, x.to(dtype).float(), t),
        ),
    ):
        for key, value in found.items():
            assert value.dtype == th.float32
            assert th.equal(value, expected[key])


def test_autocast_changes_nothing():
    diffusion = make_diffusion(
        "linear", 200, var_type=ModelVarType.LEARNED_RANGE, loss_type=LossType.KL
    )
    x, t = tensor("autocast/x", 3, 1, 8, 8), th.tensor([0, 60, 199])
    toy = toy_network(learn=True)
    expected = diffusion.training_losses(toy, x, t, noise=x)["loss"]
    with th.autocast("cpu", dtype=th.bfloat16):
        found = diffusion.training_losses(toy, x, t, noise=x)["loss"]
    assert th.equal(found, expected)


def test_variational_term_teaches_the_variance_alone():
    diffusion = make_diffusion("linear", 200, var_type=ModelVarType.LEARNED_RANGE)
    x, t = tensor("frozen/x", 3, 1, 4, 4), th.tensor([0, 60, 199])
    mean, variance = (tensor(f"frozen/{n}", 3, 1, 4, 4).requires_grad_() for n in "mv")
    losses = diffusion.training_losses(lambda x, t: th.cat([mean, variance], 1), x, t)
    losses["vb"].sum().backward()
    assert (mean.grad == 0).all()
    assert variance.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("loss_type", "factor"),
    [(LossType.KL, 1), (LossType.RESCALED_KL, 200), (LossType.RESCALED_MSE, 0.2)],
)
def test_scale_of_the_variational_losses(loss_type, factor):
    x, t = tensor("scale/x", 3, 1, 4, 4), th.tensor([0, 60, 199])
    toy = toy_network(learn=True)

    def losses(kind):
        diffusion = make_diffusion(
            "linear", 200, var_type=ModelVarType.LEARNED_RANGE, loss_type=kind
        )
        return diffusion.training_losses(toy, x, t, noise=x)

    found = losses(loss_type)["loss" if loss_type.is_vb() else "vb"]
    assert th.allclose(found, losses(LossType.MSE)["vb"] * factor, rtol=1e-4)


def test_denoised_fn_comes_before_clipping():
    diffusion, toy = make_diffusion("linear", 200), toy_network(learn=False)
    x, t = tensor("denoised/x", 3, 1, 4, 4), th.tensor([0, 60, 199])
    free = diffusion.p_mean_variance(toy, x, t, clip_denoised=False)["pred_xstart"]
    assert free.abs().max() > 1
    clipped = diffusion.p_mean_variance(toy, x, t)["pred_xstart"]
    assert th.equal(clipped, free.clamp(-1, 1))
    halved = diffusion.p_mean_variance(toy, x, t, denoised_fn=lambda x: x / 2)
    assert th.equal(halved["pred_xstart"], (free / 2).clamp(-1, 1))
    mean = diffusion.q_posterior_mean_variance(halved["pred_xstart"], x, t)[0]
    assert th.equal(halved["mean"], mean)


def test_network_hears_rescaled_timesteps_and_its_arguments():
    seen = []

    def spy(x, t, y):
        seen.append((t, y))
        return x

    x, t = tensor("spy/x", 2, 1, 2, 2), th.tensor([0, 150])
    for rescale in (False, True):
        diffusion = make_diffusion("linear", 200, rescale=rescale)
        diffusion.p_mean_variance(spy, x, t, model_kwargs={"y": 7})
        diffusion.training_losses(spy, x, t, model_kwargs={"y": 7})
    assert all(y == 7 for _, y in seen)
    for network_timesteps, _ in seen[:2]:
        assert th.equal(network_timesteps, t)
    for network_timesteps, _ in seen[2:]:
        assert th.allclose(network_timesteps, th.tensor([0.0, 750.0]))


def test_guidance_shifts_mean_and_score():
    diffusion = make_diffusion("linear", 200, var_type=ModelVarType.FIXED_SMALL)
    x, t = tensor("guide/x", 3, 1, 2, 2).double(), th.tensor([5, 60, 199])
    toy = toy_network(learn=False)
    gradient = tensor("guide/g", 3, 1, 2, 2).double()

    def cond_fn(x, network_timesteps, y):
        assert y == 3
        assert th.equal(network_timesteps, t)
        return gradient

    before = diffusion.p_mean_variance(toy, x, t, clip_denoised=False)
    mean = diffusion.condition_mean(cond_fn, before, x, t, model_kwargs={"y": 3})
    assert th.allclose(mean, before["mean"] + before["variance"] * gradient)

    after = diffusion.condition_score(cond_fn, before, x, t, model_kwargs={"y": 3})
    abar = th.from_numpy(diffusion.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    # The score -eps / sqrt(1 - abar) grows by the gradient.
    eps = toy(x, t) - (1 - abar).sqrt() * gradient
    x_start = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    assert th.allclose(after["pred_xstart"], x_start)
    assert th.allclose(after["mean"], diffusion.q_posterior_mean_variance(x_start, x, t)[0])
    assert after["variance"] is before["variance"]


def test_tables_are_uploaded_once_and_serve_after_inference_mode():
    diffusion, toy = make_diffusion("linear", 200), toy_network(learn=False)
    x, t = tensor("once/x", 2, 1, 4, 4), th.tensor([5, 60])
    with th.inference_mode():
        diffusion.p_mean_variance(toy, x, t)
    tables = dict(diffusion._device_tables)
    weight = th.ones((), requires_grad=True)
    for _ in range(2):
        losses = diffusion.training_losses(lambda x, t: weight * toy(x, t), x, t)
        losses["loss"].sum().backward()
        out = diffusion.p_mean_variance(lambda x, t: weight * toy(x, t), x, t)
        out["mean"].sum().backward()
    assert tables
    assert all(diffusion._device_tables[key] is table for key, table in tables.items())
    assert th.isfinite(weight.grad)


def test_diffusion_can_be_copied():
    diffusion, toy = make_diffusion("linear", 200), toy_network(learn=False)
    x, t = tensor("copy/x", 2, 1, 4, 4), th.tensor([5, 60])
    expected = diffusion.p_mean_variance(toy, x, t)["mean"]
    assert th.equal(copy.deepcopy(diffusion).p_mean_variance(toy, x, t)["mean"], expected)


# ---- what the caller can get wrong ----


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("cosines", 100, "unknown noise schedule 'cosines': choose linear or cosine"),
        ("linear", 19, "at least 20 diffusion steps, not 19"),
        ("cosine", 0, "0 diffusion steps: give at least 1"),
    ],
)
def test_impossible_schedules(name, steps, message):
    with pytest.raises(UserError, match=message):
        get_named_beta_schedule(name, steps)


def test_impossible_betas():
    kwargs = dict(
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )
    with pytest.raises(UserError, match=r"reach from -0\.1 to 0\.2"):
        GaussianDiffusion(betas=[-0.1, 0.2], **kwargs)
    with pytest.raises(UserError, match="non-empty"):
        GaussianDiffusion(betas=[], **kwargs)
    with pytest.raises(UserError, match="pure noise"):
        GaussianDiffusion(betas=[0.1, 1.0], **kwargs)


@pytest.mark.parametrize("learned", [False, True])
def test_output_of_the_wrong_width(learned):
    var_type = ModelVarType.LEARNED_RANGE if learned else ModelVarType.FIXED_LARGE
    diffusion, network = make_diffusion("linear", 200, var_type=var_type), toy_network(not learned)
    x, t = tensor("width/x", 2, 3, 4, 4), th.tensor([0, 1])
    for call in (diffusion.p_mean_variance, diffusion.training_losses):
        with pytest.raises(UserError, match=r"\(2, (3|6), 4, 4\).*learn_sigma"):
            call(network, x, t)


def test_other_mistakes():
    diffusion, toy = make_diffusion("linear", 200), toy_network(learn=False)
    x, t = tensor("wrong/x", 2, 1, 4, 4), th.tensor([0, 1])
    with pytest.raises(UserError, match=r"eta 0\.5"):
        diffusion.ddim_reverse_sample(toy, x, t, eta=0.5)
    with pytest.raises(ValueError, match="noise of shape"):
        diffusion.q_sample(x, t, noise=x[:1])
    with pytest.raises(ValueError, match="noise of shape"):
        diffusion.p_sample_loop(toy, (1, 1, 4, 4), noise=x)
    with pytest.raises(ValueError, match="x_start of shape"):
        diffusion.q_posterior_mean_variance(x, x[:1], t)
