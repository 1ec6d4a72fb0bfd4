"""The few-step samplers against the exact probability flow of Gaussian mixtures."""

import numpy as np
import pytest
import torch as th
from diffusion_util import Mixture, make_diffusion, toy, toy_network
from golden_util import tensor
from solver_util import DETERMINISTIC, run, step_noise

from guided_diffusion.gaussian_diffusion import ModelMeanType, ModelVarType
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.sampling.solvers import SAMPLERS, exponential_weights

MIXTURE = Mixture()
N = 48


def problem_of(schedule):
    """A long diffusion with its perfect network, x_T, and where the probability flow takes that."""
    diffusion = make_diffusion(schedule, 4000)
    noise = tensor("solvers/noise", N, 3, 1, 1).double()
    exact = MIXTURE.flow(noise[:, :, 0, 0], diffusion)
    return diffusion, MIXTURE.model(diffusion, ModelMeanType.EPSILON), noise, exact


@pytest.fixture(scope="module", params=["linear", "cosine"])
def problem(request):
    return problem_of(request.param)


def error(name, problem, steps):
    """Median over the samples of the distance from the exact solution: a sample that lands in
    another mode tells of the mixture's watersheds, not of the order."""
    diffusion, model, noise, exact = problem
    found = run(name, diffusion, model, noise, steps, clip_denoised=False)[:, :, 0, 0]
    return (found - exact).norm(dim=1).median().item()


@pytest.mark.parametrize(
    ("name", "steps", "order"),
    [
        ("ddim", (50, 100, 200), 1),
        ("dpm++2m", (20, 40, 80), 2),
        ("heun", (20, 40, 80), 2),
        ("unipc", (12, 24, 48), 4),
    ],
)
def test_error_falls_with_the_order(problem, name, steps, order):
    errors = [error(name, problem, n) for n in steps]
    observed = np.log2(errors[:-1]) - np.log2(errors[1:])
    assert (observed > 0).all()
    # The slope over a fourfold number of steps; rounding to timesteps unsettles single doublings.
    assert observed.mean() > order - 0.25, (errors, observed)


def test_twenty_steps_of_dpmpp_2m_beat_a_hundred_of_ddim(problem):
    ddim = error("ddim", problem, 100)
    assert error("dpm++2m", problem, 20) < 0.8 * ddim
    assert error("unipc", problem, 20) < 0.5 * ddim


def test_every_deterministic_sampler_converges_to_the_same(problem):
    for name in DETERMINISTIC:
        assert error(name, problem, 400) < (6e-3 if name == "ddim" else 1e-3)


def test_heun_survives_five_steps():
    """Of a cosine schedule, whose sigma / alpha spans six decades."""
    assert error("heun", problem_of("cosine"), 5) < 0.5


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("mean_type", list(ModelMeanType))
@pytest.mark.parametrize("name", SAMPLERS)
def test_all_predictions_give_the_same_image(name, mean_type, learned):
    noise = tensor("solvers/noise", 5, 3, 1, 1).double()
    var_type = ModelVarType.LEARNED_RANGE if learned else ModelVarType.FIXED_SMALL
    options = {"noise_fn": step_noise, "clip_denoised": False}
    results = []
    for kind in (ModelMeanType.START_X, mean_type):
        diffusion = make_diffusion("linear", 100, kind, var_type=var_type)
        model = MIXTURE.model(diffusion, kind, learned)
        results.append(run(name, diffusion, model, noise, 12, **options))
    assert th.allclose(*results, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_respaced_diffusion_is_a_diffusion(name):
    """Over all timesteps of a respaced process: what the long process gives at those timesteps."""
    long = make_diffusion("linear", 300)
    model = MIXTURE.model(long, ModelMeanType.EPSILON)
    noise = tensor("solvers/noise", 5, 3, 1, 1).double()
    retained = SAMPLERS[name].choose_timesteps(long, 15)
    short = SpacedDiffusion(
        retained,
        betas=long.betas,
        model_mean_type=long.model_mean_type,
        model_var_type=long.model_var_type,
        loss_type=long.loss_type,
    )
    expected, found = (
        run(name, diffusion, model, noise, 15, noise_fn=noise_fn, clip_denoised=False)
        for diffusion, noise_fn in (
            (long, step_noise),
            (short, lambda x, i: step_noise(x, short.timestep_map[i])),
        )
    )
    assert th.allclose(found, expected, atol=1e-9)


def against_loop(name, loop, network, schedule, **kwargs):
    """A sampler's 13 steps beside those of the loop over the respaced diffusion."""
    noise = tensor("solvers/image", 2, 3, 8, 8)
    process = {key: kwargs.pop(key) for key in ("mean_type", "var_type") if key in kwargs}
    spaced = make_diffusion(schedule, 300, spacing="13", **process)
    expected = getattr(spaced, loop)(
        network,
        noise.shape,
        noise=noise,
        noise_fn=lambda x, i: step_noise(x, spaced.timestep_map[i]),
        **kwargs,
    )
    whole = make_diffusion(schedule, 300, **process)
    found = run(name, whole, network, noise, 13, noise_fn=step_noise, **kwargs)
    assert found.dtype == th.float32
    assert th.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("mean_type", [ModelMeanType.EPSILON, ModelMeanType.START_X])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_respaced_ddim(mean_type, eta):
    against_loop("ddim", "ddim_sample_loop", toy, "linear", mean_type=mean_type, eta=eta)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("var_type", list(ModelVarType))
def test_ddpm_is_respaced_ancestral_sampling(var_type, guided):
    cond_fn = (lambda x, t: -x - t.reshape(-1, 1, 1, 1) / 300) if guided else None
    network = toy_network(var_type.is_learned())
    kwargs = {"var_type": var_type, "cond_fn": cond_fn}
    against_loop("ddpm", "p_sample_loop", network, "cosine", **kwargs)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_stochastic_samplers_reproduce_the_distribution(name):
    """Mean and covariance of the mixture, from 4000 ancestral samples of 100 steps."""
    diffusion = make_diffusion("linear", 1000)
    model = MIXTURE.model(diffusion, ModelMeanType.EPSILON)
    generator = th.Generator().manual_seed(1)
    shape = (4000, 3, 1, 1)

    def noise_fn(x, i):
        return th.randn(shape, generator=generator, dtype=th.float64)

    eta = 1.0 if name == "ddim" else 0.0
    options = {"noise_fn": noise_fn, "eta": eta, "clip_denoised": False}
    found = run(name, diffusion, model, noise_fn(None, None), 100, **options)[:, :, 0, 0]
    means = MIXTURE.means
    expected = th.cov(means.T, correction=0) + th.diag(MIXTURE.variances)
    assert th.allclose(found.mean(0), means.mean(0), atol=0.04)
    assert th.allclose(th.cov(found.T), expected, atol=0.04)


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_is_near_float64(name):
    diffusion = make_diffusion("cosine", 1000)
    model = MIXTURE.model(diffusion, ModelMeanType.EPSILON)
    noise = tensor("solvers/noise", 5, 3, 1, 1)
    options = {"noise_fn": lambda x, i: th.ones_like(x), "clip_denoised": False}
    results = [run(name, diffusion, model, x, 20, **options) for x in (noise, noise.double())]
    assert results[0].dtype == th.float32
    assert th.allclose(results[0].double(), results[1], atol=1e-3)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_guidance_moves_towards_the_gradient(name):
    """Guided by an observation, the prior N(0, 1) becomes the posterior that Bayes' rule gives."""
    diffusion = make_diffusion("linear", 1000)
    sigma2 = th.from_numpy(1 - diffusion.alphas_cumprod)
    alpha = th.from_numpy(diffusion.sqrt_alphas_cumprod)

    def prior(x, t):
        """eps of x_0 ~ N(0, 1): x_t is N(0, 1) at every t."""
        return sigma2[t].sqrt().reshape(-1, 1, 1, 1) * x

    def gradient(x, t):
        """Of log p(y | x_t), where y = x_0 + N(0, 1) is observed as 0.8. Given x_t, x_0 is
        N(alpha x_t, 1 - alpha^2), so y is N(alpha x_t, 2 - alpha^2)."""
        a = alpha[t].reshape(-1, 1, 1, 1)
        return a * (0.8 - a * x) / (2 - a**2)

    noise = tensor("solvers/guided", 500, 1, 1, 1).double()
    found = run(name, diffusion, prior, noise, 200, cond_fn=gradient, clip_denoised=False)
    # The posterior of x_0 is N(0.4, 1/2); the flow of a Gaussian is affine in x_T.
    assert th.allclose(found, 0.4 + noise * 0.5**0.5, atol=0.05 if name == "ddim" else 0.01)


@pytest.mark.parametrize("step", [1e-4, 1e-2, 0.3, 0.99, 1.01, 4.0, 12.0])
@pytest.mark.parametrize("places", [[0.0], [0.0, -0.7], [1.0, 0.0, -0.4], [1.0, 0.0, -1.0, -2.5]])
def test_exponential_weights_integrate_polynomials(step, places):
    weights = exponential_weights(step, [step * place for place in places])
    points, gauss = np.polynomial.legendre.leggauss(60)
    u = step * (points + 1) / 2
    for degree in range(len(places)):
        integral = step / 2 * (gauss * np.exp(u - step) * (u / step) ** degree).sum()
        quadrature = (weights * np.array(places) ** degree).sum()
        assert quadrature == pytest.approx(integral, rel=1e-9)
