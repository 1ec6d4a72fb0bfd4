"""Few-step samplers over a GaussianDiffusion (or a SpacedDiffusion).

Every sampler is a free function of one signature, that of `Sampler`, and visits only timesteps that
the network was trained on. All see the network through the x_0 that it predicts, so clipping,
`denoised_fn`, guidance, respacing and every kind of prediction work alike in all of them.

With alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) and lambda_t = log(alpha_t / sigma_t), half
the logarithm of the signal-to-noise ratio, the probability flow from timestep s to t is

    x_t = sigma_t / sigma_s x_s + alpha_t integral exp(lambda - lambda_t) x_0(lambda) dlambda

over lambda from lambda_s to lambda_t (proposition 4.1 of arXiv 2211.01095); what tells the
deterministic samplers apart is how they guess x_0(lambda) between the timesteps that they visit.
The last step, from timestep 0 to the image, always takes the predicted x_0 as it is.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch as th
from tqdm.auto import tqdm

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Model, NoiseFn, starting_noise
from guided_diffusion.respace import space_timesteps
from guided_diffusion.runtime.errors import UserError

UNIPC_ORDER = 3
# Over a step that divides sigma / alpha by more, Heun's second slope does harm: it counts the
# change of x_0 half of this many times over. On mixtures, nothing changes from 10 steps on.
HEUN_MAX_GROWTH = 10.0
# Stands in for abar = 0, the last timestep of a schedule that ends in pure noise.
TINY_ABAR = 1e-18


class Sampler(Protocol):
    """The signature of every sampler."""

    def __call__(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        shape: Sequence[int],
        *,
        steps: int,
        noise: th.Tensor | None = None,
        noise_fn: NoiseFn | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> th.Tensor:
        """Sample images [N x C x ...].

        :param diffusion: the process, whose timesteps the steps are chosen from.
        :param model: callable (x, timesteps, **model_kwargs), as for the diffusion.
        :param shape: (N, C, ...) of the images.
        :param steps: number of steps, 1 to diffusion.num_timesteps; all of them call the network
            once, those of `heun`, with few exceptions, twice.
        :param noise: x_T to start from; drawn where None.
        :param noise_fn: callable (x, timestep as int) -> standard normal noise like x, for the
            samplers that add noise; `th.randn_like` where None.
        :param clip_denoised: clip every predicted x_0 to [-1, 1].
        :param denoised_fn: applied to every predicted x_0 before it is clipped.
        :param cond_fn: gradient of a classifier, see `condition_mean` (for `ddpm`) and
            `condition_score` (for the others) of GaussianDiffusion.
        :param device: where to draw x_T; that of the noise or of the model where None.
        :param progress: show a progress bar.
        :param eta: noise of `ddim` and `dpm++2m`: 0 is deterministic, 1 as much noise as in
            ancestral sampling; 0 for the others.
        :param callback: called after every step with a dict of `step` (0 first), `timestep`, the
            new `sample` and the `pred_xstart` it was made of.
        :raises UserError: a number of steps or an eta that the sampler cannot do.
        """


# ---- Which timesteps ----


def uniform_timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """Timesteps T - 1 to 0, evenly spread: those of `timestep_respacing` with one number."""
    last = diffusion.num_timesteps - 1
    if steps == 1:
        return [last]
    return sorted(space_timesteps(last + 1, [steps]), reverse=True)


def multistep_timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """Timesteps T - 1 to 0, evenly spread in log(1 + 10 alpha / sigma).

    That is even in log-SNR, in which the multistep methods are exponential integrators, wherever
    alpha / sigma is above 0.1. Below it the image hardly shows in x_t, the predicted x_0 changes in
    proportion to alpha, and steps even in alpha / sigma are enough; steps even in log-SNR would
    spend half of their number there with a cosine schedule, whose log-SNR falls without end.
    """
    return _nearest_timesteps(diffusion, steps, lambda lam: np.log1p(10 * np.exp(lam)))


def heun_timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """Timesteps T - 1 to 0, evenly spread in arctan(lambda / 3).

    Heun's method in sigma / alpha is hurt by steps over which that falls by a large factor, so it
    needs more of them at high noise than the multistep methods do, and it gains by denser steps
    where sigma and alpha are alike. EDM's own spacing (equation 5 of arXiv 2206.00364) is meant for
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


@dataclass
class _Run:
    """One run of a sampler: the process at the timesteps it visits, and the network.

    Step k of the run goes from place k to place k + 1 of `alpha`, `sigma` and `log_snr` (half of
    it); the place after the last timestep is the image: alpha 1, sigma 0.
    """

    diffusion: GaussianDiffusion
    model: Model
    timesteps: list[int]
    noise_fn: NoiseFn | None
    clip_denoised: bool
    denoised_fn: Callable[[th.Tensor], th.Tensor] | None
    cond_fn: Model | None
    model_kwargs: dict | None
    eta: float
    progress: bool
    name: str
    callback: Callable[[dict[str, Any]], None] | None

    def __post_init__(self) -> None:
        abar = _abar(self.diffusion)[self.timesteps]
        self.last = len(self.timesteps) - 1
        self.alpha = np.append(np.sqrt(abar), 1.0)
        self.sigma = np.append(np.sqrt(1 - abar), 0.0)
        self.log_snr = np.append(_half_log_snr(abar), np.inf)

    def steps(self) -> Iterator[int]:
        steps = range(len(self.timesteps))
        return iter(tqdm(steps, desc=f"sampling, {self.name}", disable=not self.progress))

    def index(self, x: th.Tensor, k: int) -> th.Tensor:
        return th.full((x.shape[0],), self.timesteps[k], device=x.device, dtype=th.int64)

    def denoise(self, x: th.Tensor, k: int) -> th.Tensor:
        """The predicted x_0 of x at place k; calls the network."""
        t = self.index(x, k)
        out = self.diffusion.p_mean_variance(
            self.model, x, t, self.clip_denoised, self.denoised_fn, self.model_kwargs
        )
        if self.cond_fn is not None:
            out = self.diffusion.condition_score(self.cond_fn, out, x, t, self.model_kwargs)
        return out["pred_xstart"]

    def flow(self, x: th.Tensor, k: int, pred_xstart: th.Tensor) -> th.Tensor:
        """x of place k + 1 if x_0 stays what it is, exactly: DDIM's step."""
        scale = self.sigma[k + 1] / self.sigma[k]
        gain = self.alpha[k + 1] - self.alpha[k] * scale
        return float(scale) * x + float(gain) * pred_xstart

    def noise(self, x: th.Tensor, k: int) -> th.Tensor:
        return th.randn_like(x) if self.noise_fn is None else self.noise_fn(x, self.timesteps[k])

    def report(self, k: int, sample: th.Tensor, pred_xstart: th.Tensor) -> None:
        if self.callback is not None:
            self.callback(
                {
                    "step": k,
                    "timestep": self.timesteps[k],
                    "sample": sample,
                    "pred_xstart": pred_xstart,
                }
            )


def _sampler(
    name: str,
    choose_timesteps: Callable[[GaussianDiffusion, int], list[int]],
    takes_eta: bool = False,
) -> Callable[[Callable[[_Run, th.Tensor], th.Tensor]], Sampler]:
    """Give an algorithm (run, x_T) -> x_0 the signature of `Sampler`."""

    def decorate(algorithm: Callable[[_Run, th.Tensor], th.Tensor]) -> Sampler:
        @functools.wraps(algorithm)
        def sampler(
            diffusion: GaussianDiffusion,
            model: Model,
            shape: Sequence[int],
            *,
            steps: int,
            noise: th.Tensor | None = None,
            noise_fn: NoiseFn | None = None,
            clip_denoised: bool = True,
            denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
            cond_fn: Model | None = None,
            model_kwargs: dict | None = None,
            device: th.device | str | None = None,
            progress: bool = False,
            eta: float = 0.0,
            callback: Callable[[dict[str, Any]], None] | None = None,
        ) -> th.Tensor:
            if not 1 <= steps <= diffusion.num_timesteps:
                raise UserError(
                    f"{steps} sampling steps of a diffusion with {diffusion.num_timesteps} "
                    f"timesteps: take --steps 1 to {diffusion.num_timesteps}"
                )
            if eta != 0 and not takes_eta:
                raise UserError(
                    f"--eta {eta} is for --sampler ddim or dpm++2m, {name} takes --eta 0 alone"
                )
            run = _Run(
                diffusion=diffusion,
                model=model,
                timesteps=choose_timesteps(diffusion, steps),
                noise_fn=noise_fn,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                cond_fn=cond_fn,
                model_kwargs=model_kwargs,
                eta=eta,
                progress=progress,
                name=name,
                callback=callback,
            )
            x = starting_noise(model, shape, noise, device)
            with th.no_grad():
                return algorithm(run, x if x.dtype == th.float64 else x.float())

        # The signature to show is this one, not the algorithm's.
        del sampler.__wrapped__
        return sampler

    return decorate


# ---- The samplers ----


@_sampler("ddpm", uniform_timesteps)
def sample_ddpm(run: _Run, x: th.Tensor) -> th.Tensor:
    """Ancestral sampling, DDPM: algorithm 2 of arXiv 2006.11239, over respaced timesteps (section 4
    of arXiv 2102.09672). Stochastic. Timesteps evenly spread. Parameters: see `Sampler`."""
    diffusion = run.diffusion
    coarse = _coarse_process(diffusion, run.timesteps)
    for k in run.steps():
        t = run.index(x, k)
        prediction, variance_values = diffusion._predict(run.model, x, t, run.model_kwargs)
        pred_xstart = diffusion._predict_xstart(
            prediction, x, t, run.clip_denoised, run.denoised_fn
        )
        place = th.full_like(t, run.last - k)
        mean = coarse._posterior_mean(pred_xstart, x, place)
        variance, log_variance = coarse._p_variance(variance_values, x, place)
        if run.cond_fn is not None:
            p = {"mean": mean, "variance": variance}
            mean = diffusion.condition_mean(run.cond_fn, p, x, t, run.model_kwargs)
        x = mean if k == run.last else mean + th.exp(0.5 * log_variance) * run.noise(x, k)
        run.report(k, x, pred_xstart)
    return x


def _coarse_process(diffusion: GaussianDiffusion, timesteps: list[int]) -> GaussianDiffusion:
    """The process over the given timesteps alone: equation 19 of arXiv 2102.09672."""
    abar = diffusion.alphas_cumprod[timesteps[::-1]]
    return GaussianDiffusion(
        betas=1 - abar / np.append(1.0, abar[:-1]),
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
    )


@_sampler("ddim", uniform_timesteps, takes_eta=True)
def sample_ddim(run: _Run, x: th.Tensor) -> th.Tensor:
    """DDIM: equation 12 of arXiv 2010.02502. First order. Timesteps evenly spread, those of
    `timestep_respacing` with one number. Parameters: see `Sampler`."""
    for k in run.steps():
        pred_xstart = run.denoise(x, k)
        added = run.eta * _ancestral_deviation(run, k)
        if added == 0:
            x = run.flow(x, k, pred_xstart)
        else:
            eps = (x - float(run.alpha[k]) * pred_xstart) / float(run.sigma[k])
            kept = math.sqrt(max(run.sigma[k + 1] ** 2 - added**2, 0.0))
            x = float(run.alpha[k + 1]) * pred_xstart + kept * eps + added * run.noise(x, k)
        run.report(k, x, pred_xstart)
    return x


def _ancestral_deviation(run: _Run, k: int) -> float:
    """The sigma_t that makes DDIM ancestral, equation 16 of arXiv 2010.02502."""
    shrink = 1 - (run.alpha[k] / run.alpha[k + 1]) ** 2
    return float(run.sigma[k + 1] / run.sigma[k]) * math.sqrt(shrink)


@_sampler("dpm++2m", multistep_timesteps, takes_eta=True)
def sample_dpmpp_2m(run: _Run, x: th.Tensor) -> th.Tensor:
    """DPM-Solver++(2M): algorithm 2 of arXiv 2211.01095. Second order, one call of the network a
    step. With eta 1 it is that paper's SDE-DPM-Solver++(2M): noise is removed and as much added on
    the way, by which later steps mend what a poorly trained network did wrong in earlier ones.
    Timesteps: `multistep_timesteps`. Parameters: see `Sampler`."""
    previous = None
    for k in run.steps():
        pred_xstart = run.denoise(x, k)
        ahead = pred_xstart
        if previous is not None and k < run.last:
            # x_0 half a step ahead, on the line through the last two predictions.
            half = (run.log_snr[k + 1] - run.log_snr[k]) / 2
            ratio = float(half / (run.log_snr[k] - run.log_snr[k - 1]))
            ahead = th.lerp(previous, pred_xstart, 1 + ratio)
        x = run.flow(x, k, ahead) if k == run.last else _noisy_flow(run, x, k, ahead)
        previous = pred_xstart
        run.report(k, x, pred_xstart)
    return x


def _noisy_flow(run: _Run, x: th.Tensor, k: int, pred_xstart: th.Tensor) -> th.Tensor:
    """x of place k + 1 if x_0 stays what it is, with noise as eta says; `run.flow` with eta 0."""
    if run.eta == 0:
        return run.flow(x, k, pred_xstart)
    step = float(run.log_snr[k + 1] - run.log_snr[k])
    scale = run.sigma[k + 1] / run.sigma[k] * math.exp(-run.eta * step)
    gain = run.alpha[k + 1] * -math.expm1(-(1 + run.eta) * step)
    added = run.sigma[k + 1] * math.sqrt(-math.expm1(-2 * run.eta * step))
    return float(scale) * x + float(gain) * pred_xstart + float(added) * run.noise(x, k)


@_sampler("heun", heun_timesteps)
def sample_heun(run: _Run, x: th.Tensor) -> th.Tensor:
    """Heun's method in sigma / alpha: algorithm 1 of EDM, arXiv 2206.00364. Second order, two calls
    of the network a step. The last step is Euler's, as in EDM; so is one over which sigma / alpha
    falls more than tenfold, which only runs of a few steps have. Timesteps: `heun_timesteps`.
    Parameters: see `Sampler`."""
    for k in run.steps():
        pred_xstart = run.denoise(x, k)
        following = run.flow(x, k, pred_xstart)
        growth = math.exp(run.log_snr[k + 1] - run.log_snr[k])
        if growth < HEUN_MAX_GROWTH:
            # With s = sigma / alpha, y = x / alpha and slopes (y - x_0) / s at both ends, Heun's
            # mean of two slopes moves Euler's y by (s' / s - 1) / 2 s / s' times the change of x_0.
            # DDIM's step is Euler's, and in this form no large s is multiplied.
            change = run.denoise(following, k + 1) - pred_xstart
            following = following + float(run.alpha[k + 1]) * (growth - 1) / 2 * change
        x = following
        run.report(k, x, pred_xstart)
    return x


@_sampler("unipc", multistep_timesteps)
def sample_unipc(run: _Run, x: th.Tensor) -> th.Tensor:
    """UniPC, arXiv 2302.04867: the predictor UniP-3 and the corrector UniC-3, x_0 being predicted.
    Third order, fourth with the corrector; one call of the network a step, since the corrector uses
    the prediction that the next step needs anyway. The weights solve the paper's R a B(h) = phi at
    every order, so that its choice of B(h) cancels. Timesteps: `multistep_timesteps`. Parameters:
    see `Sampler`."""
    pred_xstart = run.denoise(x, 0)
    history: list[tuple[float, th.Tensor]] = []
    for k in run.steps():
        used = pred_xstart
        history = [(float(run.log_snr[k]), pred_xstart), *history][:UNIPC_ORDER]
        if k == run.last:
            x = pred_xstart
        else:
            predicted = _interpolated_flow(run, x, k, history)
            pred_xstart = run.denoise(predicted, k + 1)
            arrival = (float(run.log_snr[k + 1]), pred_xstart)
            x = _interpolated_flow(run, x, k, [arrival, *history])
        run.report(k, x, used)
    return x


def _interpolated_flow(
    run: _Run, x: th.Tensor, k: int, nodes: list[tuple[float, th.Tensor]]
) -> th.Tensor:
    """x of place k + 1 if x_0 is the polynomial in lambda through the nodes (lambda, x_0)."""
    start, end = float(run.log_snr[k]), float(run.log_snr[k + 1])
    weights = exponential_weights(end - start, [place - start for place, _ in nodes])
    x = float(run.sigma[k + 1] / run.sigma[k]) * x
    for weight, (_, pred_xstart) in zip(weights, nodes):
        x = x + float(run.alpha[k + 1] * weight) * pred_xstart
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


SAMPLERS: dict[str, Sampler] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpm++2m": sample_dpmpp_2m,
    "heun": sample_heun,
    "unipc": sample_unipc,
}


def sampler_named(name: str) -> Sampler:
    """The sampler of that name.

    :raises UserError: there is none.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler '{name}': choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
