"""The few-step samplers against the exact probability flow of Gaussian mixtures."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch as th
from golden_util import tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.solvers import (
    SAMPLERS,
    exponential_weights,
    heun_timesteps,
    multistep_timesteps,
    sampler_named,
    uniform_timesteps,
)

DETERMINISTIC = ["ddim", "dpm++2m", "heun", "unipc"]


class Mixture:
    """Four Gaussians in three channels with unlike variances: its denoiser is known exactly."""

    def __init__(self):
        self.means = 0.6 * tensor("mixture/means", 4, 3).double()
        self.variances = th.tensor([0.25, 0.05, 0.01], dtype=th.float64)

    def denoise(self, x, alpha, sigma):
        """E[x_0 | x_t] for x_t [N x 3], alpha and sigma scalars or [N x 1]."""
        alpha, sigma = (th.as_tensor(v, dtype=x.dtype).reshape(-1, 1, 1) for v in (alpha, sigma))
        means, variances = self.means.to(x.dtype), self.variances.to(x.dtype)
        spread = alpha**2 * variances + sigma**2
        distance = x[:, None] - alpha * means
        share = th.softmax(-0.5 * (distance.square() / spread).sum(-1), dim=1)
        centres = means + alpha * variances / spread * distance
        return (share[..., None] * centres).sum(1)

    def flow(self, x, diffusion, intervals=1500):
        """x_T of the diffusion carried along the probability flow to timestep 0, then denoised.

        y = x / sigma follows dy / dlambda = exp(lambda) x_0(x, lambda); Runge-Kutta of order 4.
        """
        abar = diffusion.alphas_cumprod[[-1, 0]]
        first, last = 0.5 * (np.log(abar) - np.log1p(-abar))
        places = np.linspace(first, last, 2 * intervals + 1)
        h = (last - first) / intervals

        def alpha_sigma(lam):
            return 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))

        def slope(y, lam):
            alpha, sigma = alpha_sigma(lam)
            return np.exp(lam) * self.denoise(sigma * y, alpha, sigma)

        y = x / alpha_sigma(first)[1]
        for i in range(intervals):
            start, middle, end = places[2 * i : 2 * i + 3]
            k1 = slope(y, start)
            k2 = slope(y + h / 2 * k1, middle)
            k3 = slope(y + h / 2 * k2, middle)
            k4 = slope(y + h * k3, end)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        alpha, sigma = alpha_sigma(last)
        return self.denoise(sigma * y, alpha, sigma)

    def model(self, process, mean_type, learned=False):
        """The perfect network for a process without respacing, as (x [N x 3 x 1 x 1], t)."""
        alpha = th.from_numpy(process.sqrt_alphas_cumprod)
        sigma = th.from_numpy(process.sqrt_one_minus_alphas_cumprod)

        def network(x, t):
            a, s = alpha[t][:, None].to(x.dtype), sigma[t][:, None].to(x.dtype)
            x0 = self.denoise(x[:, :, 0, 0], a, s)[:, :, None, None]
            if mean_type == ModelMeanType.EPSILON:
                out = (x - a[..., None, None] * x0) / s[..., None, None]
            elif mean_type == ModelMeanType.PREVIOUS_X:
                out = process.q_posterior_mean_variance(x0, x, t)[0]
            else:
                out = x0
            return th.cat([out, th.zeros_like(out)], dim=1) if learned else out

        return network


MIXTURE = Mixture()
N = 48


def make_diffusion(
    schedule="cosine",
    steps=4000,
    mean_type=ModelMeanType.EPSILON,
    var_type=ModelVarType.FIXED_LARGE,
    spacing=None,
    rescale=False,
):
    settings = dict(
        betas=get_named_beta_schedule(schedule, steps),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=LossType.MSE,
        rescale_timesteps=rescale,
    )
    if spacing is None:
        return GaussianDiffusion(**settings)
    return SpacedDiffusion(space_timesteps(steps, spacing), **settings)


def toy(x, t):
    """A network with nothing special about it, for the shapes of these tests."""
    return 0.3 * x + 0.1 * th.sin(7 * x + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000)


def toy_learned(x, t):
    return th.cat([toy(x, t), 0.7 * th.cos(x)], dim=1)


@pytest.fixture(scope="module", params=["linear", "cosine"])
def problem(request):
    """A long diffusion with its perfect network, x_T, and where the probability flow takes that."""
    diffusion = make_diffusion(request.param)
    noise = tensor("solvers/noise", N, 3, 1, 1).double()
    exact = MIXTURE.flow(noise[:, :, 0, 0], diffusion)
    return diffusion, MIXTURE.model(diffusion, ModelMeanType.EPSILON), noise, exact


def run(name, diffusion, model, noise, **kwargs):
    kwargs = {"clip_denoised": False} | kwargs
    return SAMPLERS[name](diffusion, model, noise.shape, noise=noise, **kwargs)


def error(name, problem, steps):
    """Median over the samples of the distance from the exact solution: a sample that lands in
    another mode tells of the mixture's watersheds, not of the order."""
    diffusion, model, noise, exact = problem
    found = run(name, diffusion, model, noise, steps=steps)[:, :, 0, 0]
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


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("mean_type", list(ModelMeanType))
@pytest.mark.parametrize("name", SAMPLERS)
def test_all_predictions_give_the_same_image(name, mean_type, learned):
    noise = tensor("solvers/noise", 5, 3, 1, 1).double()
    drawn = {i: tensor(f"solvers/{i}", 5, 3, 1, 1).double() for i in range(100)}
    var_type = ModelVarType.LEARNED_RANGE if learned else ModelVarType.FIXED_SMALL
    results = []
    for kind in (ModelMeanType.START_X, mean_type):
        diffusion = make_diffusion("linear", 100, kind, var_type)
        model = MIXTURE.model(diffusion, kind, learned)
        results.append(run(name, diffusion, model, noise, steps=12, noise_fn=lambda x, i: drawn[i]))
    assert th.allclose(*results, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_respaced_diffusion_is_a_diffusion(name):
    """Over all timesteps of a respaced process: what the long process gives at those timesteps."""
    long = make_diffusion("linear", 300)
    model = MIXTURE.model(long, ModelMeanType.EPSILON)
    noise = tensor("solvers/noise", 5, 3, 1, 1).double()
    drawn = {i: tensor(f"solvers/{i}", 5, 3, 1, 1).double() for i in range(300)}
    steps = {"ddpm": uniform_timesteps, "ddim": uniform_timesteps, "heun": heun_timesteps}
    retained = steps.get(name, multistep_timesteps)(long, 15)
    short = SpacedDiffusion(
        retained,
        betas=long.betas,
        model_mean_type=long.model_mean_type,
        model_var_type=long.model_var_type,
        loss_type=long.loss_type,
    )
    expected = run(name, long, model, noise, steps=15, noise_fn=lambda x, i: drawn[i])
    found = run(
        name, short, model, noise, steps=15, noise_fn=lambda x, i: drawn[short.timestep_map[i]]
    )
    assert th.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_network_is_told_the_original_timesteps(name, rescale):
    seen = []

    def spy(x, t, label):
        assert label == "as given"
        seen.append(t)
        return toy(x, t)

    diffusion = make_diffusion(spacing="50", steps=400, rescale=rescale)
    model_kwargs = {"label": "as given"}
    SAMPLERS[name](diffusion, spy, (2, 3, 4, 4), steps=6, model_kwargs=model_kwargs)
    assert all(t.shape == (2,) and t.is_floating_point() == rescale for t in seen)
    scale = 1000 / 400 if rescale else 1
    allowed = {round(i * scale, 3) for i in diffusion.timestep_map}
    network_timesteps = [round(t[0].item(), 3) for t in seen]
    assert set(network_timesteps) <= allowed
    assert network_timesteps[0] == round(399 * scale, 3)
    assert network_timesteps[-1] == 0
    # Heun: twice a step, except the last one and those that are too long for it.
    assert (7 <= len(network_timesteps) <= 11) if name == "heun" else len(network_timesteps) == 6


@pytest.mark.parametrize("mean_type", [ModelMeanType.EPSILON, ModelMeanType.START_X])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_respaced_ddim(mean_type, eta):
    noise = tensor("solvers/image", 2, 3, 8, 8)
    drawn = {i: tensor(f"solvers/{i}", 2, 3, 8, 8) for i in range(300)}
    spaced = make_diffusion("linear", 300, mean_type, spacing="13")
    expected = spaced.ddim_sample_loop(
        toy,
        noise.shape,
        noise=noise,
        eta=eta,
        noise_fn=lambda x, i: drawn[spaced.timestep_map[i]],
    )
    found = SAMPLERS["ddim"](
        make_diffusion("linear", 300, mean_type),
        toy,
        noise.shape,
        steps=13,
        noise=noise,
        eta=eta,
        noise_fn=lambda x, i: drawn[i],
    )
    assert found.dtype == th.float32
    assert th.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("var_type", list(ModelVarType))
def test_ddpm_is_respaced_ancestral_sampling(var_type, guided):
    noise = tensor("solvers/image", 2, 3, 8, 8)
    drawn = {i: tensor(f"solvers/{i}", 2, 3, 8, 8) for i in range(300)}
    cond_fn = (lambda x, t: -x - t.reshape(-1, 1, 1, 1) / 300) if guided else None
    network = toy_learned if var_type.is_learned() else toy
    spaced = make_diffusion("cosine", 300, var_type=var_type, spacing="13")
    expected = spaced.p_sample_loop(
        network,
        noise.shape,
        noise=noise,
        cond_fn=cond_fn,
        noise_fn=lambda x, i: drawn[spaced.timestep_map[i]],
    )
    found = SAMPLERS["ddpm"](
        make_diffusion("cosine", 300, var_type=var_type),
        network,
        noise.shape,
        steps=13,
        noise=noise,
        cond_fn=cond_fn,
        noise_fn=lambda x, i: drawn[i],
    )
    assert th.allclose(found, expected, atol=2e-5)


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
    found = run(
        name, diffusion, model, noise_fn(None, None), steps=100, noise_fn=noise_fn, eta=eta
    )[:, :, 0, 0]
    means = MIXTURE.means
    expected = th.cov(means.T, correction=0) + th.diag(MIXTURE.variances)
    assert th.allclose(found.mean(0), means.mean(0), atol=0.04)
    assert th.allclose(th.cov(found.T), expected, atol=0.04)


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_is_near_float64(name):
    diffusion = make_diffusion("cosine", 1000)
    model = MIXTURE.model(diffusion, ModelMeanType.EPSILON)
    noise = tensor("solvers/noise", 5, 3, 1, 1)
    results = [
        run(name, diffusion, model, x, steps=20, noise_fn=lambda x, i: th.ones_like(x))
        for x in (noise, noise.double())
    ]
    assert results[0].dtype == th.float32
    assert th.allclose(results[0].double(), results[1], atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_clipping_and_denoised_fn(name):
    shape, diffusion = (2, 1, 4, 4), make_diffusion("cosine", 100)
    seen = []

    def denoised_fn(x):
        seen.append(x)
        return x * 0 + 3

    image = SAMPLERS[name](diffusion, toy, shape, steps=5, denoised_fn=denoised_fn)
    assert th.allclose(image, th.ones(shape))
    image = SAMPLERS[name](
        diffusion, toy, shape, steps=5, denoised_fn=denoised_fn, clip_denoised=False
    )
    assert th.allclose(image, th.full(shape, 3.0))
    assert len(seen) >= 2 * 5


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
    found = run(name, diffusion, prior, noise, steps=200, cond_fn=gradient)
    # The posterior of x_0 is N(0.4, 1/2); the flow of a Gaussian is affine in x_T.
    assert th.allclose(found, 0.4 + noise * 0.5**0.5, atol=0.05 if name == "ddim" else 0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step(name):
    seen = []
    diffusion = make_diffusion("linear", 100)
    image = SAMPLERS[name](diffusion, toy, (1, 1, 4, 4), steps=7, callback=seen.append)
    assert [item["step"] for item in seen] == list(range(7))
    timesteps = [item["timestep"] for item in seen]
    assert timesteps[0] == 99
    assert timesteps[-1] == 0
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert all(item["pred_xstart"].shape == (1, 1, 4, 4) for item in seen)
    assert th.equal(seen[-1]["sample"], image)
    assert th.equal(seen[-1]["pred_xstart"], image)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_draw_nothing(name):
    def refuse(x, i):
        raise AssertionError("drew noise")

    diffusion, noise = make_diffusion("linear", 100), tensor("solvers/one", 1, 1, 4, 4)
    state = th.get_rng_state()
    images = [
        SAMPLERS[name](diffusion, toy, noise.shape, steps=5, noise=noise, noise_fn=refuse)
        for _ in range(2)
    ]
    assert th.equal(*images)
    assert th.equal(th.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_do_not_depend_on_their_batch(name):
    diffusion, noise = make_diffusion("linear", 100), tensor("solvers/image", 3, 3, 4, 4)
    drawn = {i: tensor(f"solvers/batch/{i}", 3, 3, 4, 4) for i in range(100)}
    together = SAMPLERS[name](
        diffusion, toy, (3, 3, 4, 4), steps=9, noise=noise, noise_fn=lambda x, i: drawn[i]
    )
    alone = SAMPLERS[name](
        diffusion,
        toy,
        (1, 3, 4, 4),
        steps=9,
        noise=noise[1:2],
        noise_fn=lambda x, i: drawn[i][1:2],
    )
    assert th.allclose(together[1:2], alone, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("timesteps", [1, 2, 3, 30])
def test_any_number_of_steps(name, timesteps):
    diffusion = make_diffusion("cosine", timesteps)
    for steps in range(1, timesteps + 1):
        image = SAMPLERS[name](diffusion, toy, (1, 1, 4, 4), steps=steps)
        assert image.isfinite().all()
        assert image.abs().max() <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_schedule_that_ends_in_pure_noise(name):
    betas = get_named_beta_schedule("cosine", 50)
    betas[-1] = 1.0
    diffusion = GaussianDiffusion(
        betas=betas,
        model_mean_type=ModelMeanType.START_X,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    )
    image = SAMPLERS[name](diffusion, toy, (2, 1, 4, 4), steps=10, clip_denoised=False)
    assert image.isfinite().all()


@pytest.mark.parametrize("choose", [uniform_timesteps, multistep_timesteps, heun_timesteps])
@given(st.sampled_from(["linear", "cosine"]), st.integers(21, 300), st.data())
@settings(max_examples=40, deadline=None)
def test_timesteps_fall_from_last_to_first(choose, schedule, timesteps, data):
    steps = data.draw(st.integers(1, timesteps))
    chosen = choose(make_diffusion(schedule, timesteps), steps)
    assert len(chosen) == steps
    assert chosen[0] == timesteps - 1
    assert all(a > b for a, b in pairwise(chosen))
    if steps > 1:
        assert chosen[-1] == 0


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


def test_samplers_share_one_signature():
    signatures = {str(inspect.signature(sampler)) for sampler in SAMPLERS.values()}
    assert len(signatures) == 1
    assert all("arXiv" in sampler.__doc__ for sampler in SAMPLERS.values())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, 101])
def test_impossible_number_of_steps(name, steps):
    with pytest.raises(UserError, match=f"{steps} sampling steps.*--steps 1 to 100"):
        SAMPLERS[name](make_diffusion("linear", 100), toy, (1, 1, 4, 4), steps=steps)


def test_eta_is_for_ddim_alone():
    with pytest.raises(UserError, match=r"--eta 0\.5 is for --sampler ddim"):
        SAMPLERS["heun"](make_diffusion("linear", 100), toy, (1, 1, 4, 4), steps=3, eta=0.5)


def test_heun_survives_five_steps():
    """Of a cosine schedule, whose sigma / alpha spans six decades."""
    diffusion = make_diffusion("cosine")
    noise = tensor("solvers/noise", N, 3, 1, 1).double()
    exact = MIXTURE.flow(noise[:, :, 0, 0], diffusion)
    problem = diffusion, MIXTURE.model(diffusion, ModelMeanType.EPSILON), noise, exact
    assert error("heun", problem, 5) < 0.5


def test_unknown_name():
    assert sampler_named("unipc") is SAMPLERS["unipc"]
    with pytest.raises(UserError, match=r"'euler'.*ddpm, ddim, dpm\+\+2m, heun, unipc"):
        sampler_named("euler")
