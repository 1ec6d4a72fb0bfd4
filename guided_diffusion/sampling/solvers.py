"""Diffusion samplers, most of them for few steps.

Every sampler is a function of a `Trajectory` (the network and the timesteps to visit) and x_T, and
an entry of `SAMPLERS`; `sample` runs them. They visit only timesteps that the network was trained
on and use only its prediction of x_0, so clipping, `denoised_fn`, guidance, respacing and every
parameterisation work the same in all of them.

With alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) and lambda_t = log(alpha_t / sigma_t), half
the logarithm of the signal-to-noise ratio, the probability flow from timestep s to t is

    x_t = sigma_t / sigma_s x_s + alpha_t integral exp(lambda - lambda_t) x_0(lambda) dlambda

over lambda from lambda_s to lambda_t (proposition 4.1 of arXiv 2211.01095). Deterministic samplers
differ in how they estimate x_0(lambda) between the timesteps that they visit. The last step, from
timestep 0 to the image, always takes the predicted x_0 as it is.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch as th

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Model, NoiseFn, starting_noise
from guided_diffusion.respace import respaced_betas, space_timesteps
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.sampling.config import TRAITS, WITH_ETA

UNIPC_ORDER = 3
# Where sigma / alpha shrinks by a larger factor within one step, Heun's correction hurts: it
# multiplies the change of x_0 by half this factor. No run of 10 or more steps in the tests has it.
HEUN_MAX_GROWTH = 10.0
# Stands in for abar = 0, the last timestep of a schedule that ends in pure noise.
TINY_ABAR = 1e-18


class StepReport(TypedDict):
    """Passed to the callback after each step: the new sample and the predicted x_0 behind it."""

    step: int  # 0 first
    timestep: int
    sample: th.Tensor
    pred_xstart: th.Tensor


@dataclass(frozen=True)
class SamplerOptions:
    """Options common to all samplers.

    :param noise_fn: callable (x, timestep as int) -> standard normal noise like x, for samplers
        that add noise; defaults to `th.randn_like`.
    :param clip_denoised: clip every predicted x_0 to [-1, 1].
    :param denoised_fn: applied to every predicted x_0 before it is clipped.
    :param cond_fn: gradient of a classifier, see `condition_mean` (for `ddpm`) and
        `condition_score` (for the others) of GaussianDiffusion.
    :param model_kwargs: further arguments of the network and of `cond_fn`.
    :param device: where to draw x_T; defaults to the device of the noise or the model.
    :param eta: noise level for samplers that take it: 0 is deterministic, 1 adds as much noise as
        ancestral sampling.
    :param progress: show a progress bar.
    :param callback: called after every step.
    """

    noise_fn: NoiseFn | None = None
    clip_denoised: bool = True
    denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None
    cond_fn: Model | None = None
    model_kwargs: dict[str, Any] | None = None
    device: th.device | str | None = None
    eta: float = 0.0
    progress: bool = False
    callback: Callable[[StepReport], None] | None = None


# ---- Which timesteps ----


def uniform_timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """Timesteps T - 1 to 0, evenly spread: those of `timestep_respacing` with one number."""
    last = diffusion.num_timesteps - 1
    if steps == 1:
        return [last]
    return sorted(space_timesteps(last + 1, [steps]), reverse=True)


def multistep_timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """Timesteps T - 1 to 0, evenly spread in log(1 + 10 alpha / sigma).

    Where alpha / sigma is above 0.1 that is even in log-SNR, in which the multistep methods are
    exponential integrators. Below, the image barely shows in x_t, the predicted x_0 changes in
    proportion to alpha, and steps even in alpha / sigma suffice; with a cosine schedule, whose
    log-SNR falls without bound, half of the steps would be spent there if even in log-SNR.
    """
    return _nearest_timesteps(diffusion, steps, lambda lam: np.log1p(10 * np.exp(lam)))


def heun_timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """Timesteps T - 1 to 0, evenly spread in arctan(lambda / 3).

    Steps over which sigma / alpha falls by a large factor hurt Heun's method, so it needs more of
    them at high noise than the multistep methods do, and it gains from denser steps where sigma and
    alpha are of similar size. EDM's own spacing (equation 5 of arXiv 2206.00364) is meant for
    sigma / alpha up to 80; a cosine schedule reaches 80000, and most steps would be lost there.
    """
    return _nearest_timesteps(diffusion, steps, lambda lam: np.arctan(lam / 3))


def _nearest_timesteps(
    diffusion: GaussianDiffusion, steps: int, warp: Callable[[np.ndarray], np.ndarray]
) -> list[int]:
    """Distinct timesteps, T - 1 first and 0 last, nearest to even steps of warp(lambda)."""
    last = diffusion.num_timesteps - 1
    if steps == 1:
        return [last]
    warped = warp(_half_log_snr(_abar(diffusion)))
    targets = np.linspace(warped[-1], warped[0], steps)
    timesteps = np.abs(warped[None] - targets[:, None]).argmin(axis=1)
    # Where the process is coarser than the steps: push duplicates down, then up from the end.
    place = np.arange(steps)
    timesteps = np.minimum.accumulate(timesteps + place) - place
    timesteps = np.maximum(timesteps, steps - 1 - place)
    return timesteps.tolist()


def _abar(diffusion: GaussianDiffusion) -> np.ndarray:
    return np.maximum(diffusion.alphas_cumprod, TINY_ABAR)


def _half_log_snr(abar: np.ndarray) -> np.ndarray:
    return 0.5 * (np.log(abar) - np.log1p(-abar))


# ---- What all samplers share ----


class Trajectory:
    """The timesteps that one run of a sampler visits, and the network at each of them.

    Step k goes from place k to place k + 1 of the tables `alpha`, `sigma` and `lam` (lambda); the
    place after the last timestep is the image: alpha 1, sigma 0.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        timesteps: list[int],
        options: SamplerOptions,
    ) -> None:
        self.diffusion = diffusion
        self.model = model
        self.timesteps = timesteps
        self.options = options
        self.last = len(timesteps) - 1
        abar = _abar(diffusion)[timesteps]
        self.alpha = np.append(np.sqrt(abar), 1.0)
        self.sigma = np.append(np.sqrt(1 - abar), 0.0)
        self.lam = np.append(_half_log_snr(abar), np.inf)

    def steps(self) -> Iterator[int]:
        """Numbers of the steps, 0 first."""
        total = len(self.timesteps) if self.options.progress else 0
        yield from progress_bar(total, desc="sampling", iterable=range(len(self.timesteps)))

    def index(self, x: th.Tensor, k: int) -> th.Tensor:
        """The timestep at place k for every image of the batch, int64 [N]."""
        return th.full((x.shape[0],), self.timesteps[k], device=x.device, dtype=th.int64)

    def denoise(self, x: th.Tensor, k: int) -> th.Tensor:
        """The x_0 predicted from x at place k, guided; calls the network."""
        t, options = self.index(x, k), self.options
        out = self.diffusion.p_mean_variance(
            self.model, x, t, options.clip_denoised, options.denoised_fn, options.model_kwargs
        )
        if options.cond_fn is not None:
            out = self.diffusion.condition_score(options.cond_fn, out, x, t, options.model_kwargs)
        return out["pred_xstart"]

    def flow(self, x: th.Tensor, k: int, pred_xstart: th.Tensor) -> th.Tensor:
        """x at place k + 1, exact if x_0 stays what it is: the step of DDIM."""
        scale = self.sigma[k + 1] / self.sigma[k]
        gain = self.alpha[k + 1] - self.alpha[k] * scale
        return float(scale) * x + float(gain) * pred_xstart

    def noise(self, x: th.Tensor, k: int) -> th.Tensor:
        """Standard normal noise like x for step k."""
        noise_fn = self.options.noise_fn
        return th.randn_like(x) if noise_fn is None else noise_fn(x, self.timesteps[k])

    def report(self, k: int, sample: th.Tensor, pred_xstart: th.Tensor) -> None:
        """Call the callback after step k."""
        if self.options.callback is not None:
            timestep = self.timesteps[k]
            self.options.callback(
                StepReport(step=k, timestep=timestep, sample=sample, pred_xstart=pred_xstart)
            )


# ---- The samplers ----


def sample_ddpm(path: Trajectory, x: th.Tensor) -> th.Tensor:
    """Ancestral sampling, DDPM: algorithm 2 of arXiv 2006.11239, over respaced timesteps (section 4
    of arXiv 2102.09672). Stochastic."""
    diffusion, options = path.diffusion, path.options
    respaced = GaussianDiffusion(
        betas=respaced_betas(diffusion.alphas_cumprod, path.timesteps[::-1]),
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
    )
    for k in path.steps():
        t = path.index(x, k)
        prediction, variance_values = diffusion._predict(path.model, x, t, options.model_kwargs)
        pred_xstart = diffusion._predict_xstart(
            prediction, x, t, options.clip_denoised, options.denoised_fn
        )
        respaced_t = th.full_like(t, path.last - k)
        mean = respaced._posterior_mean(pred_xstart, x, respaced_t)
        variance, log_variance = respaced._p_variance(variance_values, x, respaced_t)
        if options.cond_fn is not None:
            p = {"mean": mean, "variance": variance}
            mean = diffusion.condition_mean(options.cond_fn, p, x, t, options.model_kwargs)
        x = mean if k == path.last else mean + th.exp(0.5 * log_variance) * path.noise(x, k)
        path.report(k, x, pred_xstart)
    return x


def sample_ddim(path: Trajectory, x: th.Tensor) -> th.Tensor:
    """DDIM: equation 12 of arXiv 2010.02502. First order; stochastic where eta is not 0."""
    alpha, sigma = path.alpha, path.sigma
    for k in path.steps():
        pred_xstart = path.denoise(x, k)
        # eta times the sigma_t of equation 16, with which DDIM is ancestral sampling.
        shrink = 1 - (alpha[k] / alpha[k + 1]) ** 2
        added = path.options.eta * (float(sigma[k + 1] / sigma[k]) * math.sqrt(shrink))
        if added == 0:
            x = path.flow(x, k, pred_xstart)
        else:
            eps = (x - float(alpha[k]) * pred_xstart) / float(sigma[k])
            kept = math.sqrt(max(sigma[k + 1] ** 2 - added**2, 0.0))
            x = float(alpha[k + 1]) * pred_xstart + kept * eps + added * path.noise(x, k)
        path.report(k, x, pred_xstart)
    return x


def sample_dpmpp_2m(path: Trajectory, x: th.Tensor) -> th.Tensor:
    """DPM-Solver++(2M): algorithm 2 of arXiv 2211.01095. Second order, one network call per step.

    With eta 1 it is that paper's SDE-DPM-Solver++(2M): as much noise is added on the way as is
    removed, so that later steps correct the errors that a poorly trained network makes in earlier
    ones.
    """
    lam, eta = path.lam, path.options.eta
    previous = None
    for k in path.steps():
        pred_xstart = path.denoise(x, k)
        ahead = pred_xstart
        if previous is not None and k < path.last:
            # x_0 half a step ahead, on the line through the last two predictions.
            half = (lam[k + 1] - lam[k]) / 2
            ratio = float(half / (lam[k] - lam[k - 1]))
            ahead = th.lerp(previous, pred_xstart, 1 + ratio)
        if eta == 0 or k == path.last:
            x = path.flow(x, k, ahead)
        else:
            step = float(lam[k + 1] - lam[k])
            scale = path.sigma[k + 1] / path.sigma[k] * math.exp(-eta * step)
            gain = path.alpha[k + 1] * -math.expm1(-(1 + eta) * step)
            added = path.sigma[k + 1] * math.sqrt(-math.expm1(-2 * eta * step))
            x = float(scale) * x + float(gain) * ahead + float(added) * path.noise(x, k)
        previous = pred_xstart
        path.report(k, x, pred_xstart)
    return x


def sample_heun(path: Trajectory, x: th.Tensor) -> th.Tensor:
    """Heun's method in sigma / alpha: algorithm 1 of EDM, arXiv 2206.00364. Second order, two
    network calls per step.

    The last step is Euler's, as in EDM; so is any over which sigma / alpha shrinks more than
    tenfold, which only runs of a few steps have.
    """
    for k in path.steps():
        pred_xstart = path.denoise(x, k)
        following = path.flow(x, k, pred_xstart)
        growth = math.exp(path.lam[k + 1] - path.lam[k])
        if growth < HEUN_MAX_GROWTH:
            # With s = sigma / alpha, y = x / alpha and slopes (y - x_0) / s at both ends, Heun's
            # mean of two slopes moves Euler's y by (s' / s - 1) / 2 s / s' times the change of x_0.
            # DDIM's step is Euler's, and in this form no large s is multiplied.
            change = path.denoise(following, k + 1) - pred_xstart
            following = following + float(path.alpha[k + 1]) * (growth - 1) / 2 * change
        x = following
        path.report(k, x, pred_xstart)
    return x


def sample_unipc(path: Trajectory, x: th.Tensor) -> th.Tensor:
    """UniPC, arXiv 2302.04867: the predictor UniP-3 and the corrector UniC-3, predicting x_0. Third
    order, fourth with the corrector.

    One network call per step, since the corrector uses the prediction that the next step needs
    anyway. The weights solve the paper's R a B(h) = phi at every order, so that its choice of B(h)
    cancels.
    """
    pred_xstart = path.denoise(x, 0)
    history: list[tuple[float, th.Tensor]] = []
    for k in path.steps():
        used = pred_xstart
        history = [(float(path.lam[k]), pred_xstart), *history][:UNIPC_ORDER]
        if k == path.last:
            x = pred_xstart
        else:
            predicted = _interpolated_flow(path, x, k, history)
            pred_xstart = path.denoise(predicted, k + 1)
            arrival = (float(path.lam[k + 1]), pred_xstart)
            x = _interpolated_flow(path, x, k, [arrival, *history])
        path.report(k, x, used)
    return x


def _interpolated_flow(
    path: Trajectory, x: th.Tensor, k: int, nodes: list[tuple[float, th.Tensor]]
) -> th.Tensor:
    """x at place k + 1 if x_0 is the polynomial in lambda through the nodes (lambda, x_0)."""
    start, end = float(path.lam[k]), float(path.lam[k + 1])
    weights = exponential_weights(end - start, [lam - start for lam, _ in nodes])
    x = float(path.sigma[k + 1] / path.sigma[k]) * x
    for weight, (_, pred_xstart) in zip(weights, nodes):
        x = x + float(path.alpha[k + 1] * weight) * pred_xstart
    return x


def exponential_weights(step: float, nodes: Sequence[float]) -> np.ndarray:
    """Weights w with sum w_m p(node_m) = integral over [0, step] of exp(u - step) p(u) du, for
    every polynomial p of a degree below the number of nodes.

    :param step: length of the interval, positive.
    :param nodes: distinct places, 0 being the start of the interval.
    """
    degree = np.arange(len(nodes))
    powers = (np.array(nodes) / step) ** degree[:, None]
    return np.linalg.solve(powers, _exponential_moments(step, len(nodes)))


def _exponential_moments(step: float, count: int) -> np.ndarray:
    """Integrals over [0, step] of exp(u - step) (u / step)^k du for k = 0 .. count - 1.

    Integration by parts ties neighbours: m_k = 1 - k / step m_{k-1}. Rounding grows on the way up
    where k / step is large, and dies out on the way down, whatever that starts from.
    """
    if step > 1:
        moments = [-math.expm1(-step)]
        for k in range(1, count):
            moments.append(1 - k / step * moments[-1])
        return np.array(moments)
    moment, moments = 0.0, []
    for k in range(count + 20, 0, -1):
        moment = step / k * (1 - moment)
        moments.append(moment)
    return np.array(moments[::-1][:count])


# ---- The table, and how to run an entry ----


@dataclass(frozen=True)
class Sampler:
    """A sampling algorithm and its default timesteps; see also `config.TRAITS`.

    :param run: the algorithm, (trajectory, x_T [N x C x ...]) -> images of that shape.
    :param choose_timesteps: (diffusion, steps) -> the timesteps to visit, T - 1 first.
    """

    run: Callable[[Trajectory, th.Tensor], th.Tensor]
    choose_timesteps: Callable[[GaussianDiffusion, int], list[int]]


SAMPLERS = {
    "ddpm": Sampler(sample_ddpm, uniform_timesteps),
    "ddim": Sampler(sample_ddim, uniform_timesteps),
    "dpm++2m": Sampler(sample_dpmpp_2m, multistep_timesteps),
    "heun": Sampler(sample_heun, heun_timesteps),
    "unipc": Sampler(sample_unipc, multistep_timesteps),
}


def sample(
    name: str,
    diffusion: GaussianDiffusion,
    model: Model,
    shape: Sequence[int],
    *,
    steps: int,
    noise: th.Tensor | None = None,
    options: SamplerOptions = SamplerOptions(),
) -> th.Tensor:
    """Sample images [N x C x ...].

    :param name: of a sampler, a key of `SAMPLERS`.
    :param diffusion: the process from whose timesteps the steps are chosen.
    :param model: callable (x, timesteps, **model_kwargs), as for the diffusion.
    :param shape: (N, C, ...) of the images.
    :param steps: 1 to diffusion.num_timesteps; each calls the network once, or nearly always twice
        for `heun`.
    :param noise: x_T to start from; drawn where None.
    :raises UserError: an unknown sampler, or a number of steps or an eta that it cannot take.
    """
    sampler = checked_sampler(name, diffusion, steps, options.eta)
    path = Trajectory(diffusion, model, sampler.choose_timesteps(diffusion, steps), options)
    x = starting_noise(model, shape, noise, options.device)
    with th.no_grad():
        return sampler.run(path, x if x.dtype == th.float64 else x.float())


def checked_sampler(name: str, diffusion: GaussianDiffusion, steps: int, eta: float) -> Sampler:
    """Look up a sampler and check that it supports the settings.

    :raises UserError: an unknown sampler, or a number of steps or an eta that it cannot take.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler '{name}': choose one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= diffusion.num_timesteps:
        raise UserError(
            f"--steps {steps}: the diffusion has {diffusion.num_timesteps} timesteps to visit, "
            f"choose from 1 to {diffusion.num_timesteps}"
        )
    if eta != 0 and not TRAITS[name].takes_eta:
        raise UserError(f"--eta {eta} is for --sampler {' or '.join(WITH_ETA)}, not for {name}")
    return SAMPLERS[name]
