"""The diffusion process: adding noise step by step, and removing it with a network.

Notation of the docstrings, that of arXiv 2006.11239 (DDPM): x_0 is an image, x_t the image after
timestep t, t = 0 .. T - 1; beta_t the variance that step t adds, and abar_t the product of
1 - beta_s over s <= t. So x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with eps ~ N(0, I), and
x_{t-1} at t = 0 is x_0.

The network is any callable `model(x, timesteps, **model_kwargs)`; nothing here depends on its kind.
"""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch as th

from .losses import discretized_gaussian_log_likelihood, normal_kl
from .runtime.errors import UserError
from .runtime.progress import progress_bar

Model = Callable[..., th.Tensor]
Terms = dict[str, th.Tensor]
Timesteps = TypeVar("Timesteps", float, th.Tensor)
# (x, timestep) -> standard normal noise of x's shape, dtype and device.
NoiseFn = Callable[[th.Tensor, Any], th.Tensor]

MAX_BETA = 0.999


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Variances beta_t of a named schedule, float64 [T].

    - `linear`: section 4 of arXiv 2006.11239, 1e-4 to 0.02 over 1000 steps; other lengths scale
      both ends by 1000 / T, so that the noise at the end stays about the same.
    - `cosine`: equation 17 of arXiv 2102.09672.

    :raises UserError: another name, or a length that the schedule does not allow.
    """
    if num_diffusion_timesteps < 1:
        raise UserError(
            f"{num_diffusion_timesteps} diffusion steps: give at least 1 (--diffusion_steps)"
        )
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        if scale * 0.02 > 1:
            raise UserError(
                f"a linear schedule needs at least 20 diffusion steps, not "
                f"{num_diffusion_timesteps}: take more steps or --noise_schedule cosine"
            )
        return np.linspace(scale * 1e-4, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(
            num_diffusion_timesteps,
            lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2,
        )
    raise UserError(f"unknown noise schedule '{schedule_name}': choose linear or cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = MAX_BETA
) -> np.ndarray:
    """Variances beta_t whose cumulative products follow the function abar, float64 [T].

    beta_t = min(1 - abar((t + 1) / T) / abar(t / T), max_beta), section 3.2 of arXiv 2102.09672.

    :param alpha_bar: falling function of time in [0, 1].
    :param max_beta: below 1, keeps the last step from being singular.
    """
    steps = num_diffusion_timesteps
    values = [alpha_bar(i / steps) for i in range(steps + 1)]
    ratios = [after / before for before, after in pairwise(values)]
    return np.minimum(1 - np.array(ratios, dtype=np.float64), max_beta)


def network_timesteps(t: Timesteps, num_timesteps: int, rescale: bool) -> Timesteps:
    """Timesteps of a process of `num_timesteps` in the units its network was trained with.

    :param rescale: the network expects numbers in [0, 1000) whatever the length of the process.
    """
    return t * (1000.0 / num_timesteps) if rescale else t


class ModelMeanType(enum.Enum):
    """What the network predicts: x_{t-1}, x_0 or the noise eps."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t): fixed to a bound, or predicted in extra channels.

    FIXED_SMALL is the posterior variance of q, FIXED_LARGE is beta_t (section 3.2 of
    arXiv 2006.11239); LEARNED is the log-variance itself; LEARNED_RANGE is a number in [-1, 1] that
    interpolates the logarithms of the two bounds (equation 15 of arXiv 2102.09672).
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()

    def is_learned(self) -> bool:
        """Whether the network's output has twice the channels of the image."""
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class LossType(enum.Enum):
    """The training objective.

    MSE: L_simple of arXiv 2006.11239 (equation 14), plus the variational term of the timestep for
    the variance where that is learned. RESCALED_MSE: that term times T / 1000, so that its mean
    over timesteps is 0.001 L_vlb: L_hybrid, equation 16 of arXiv 2102.09672. KL: the
    variational term alone; RESCALED_KL: T times that, whose mean is L_vlb.
    """

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """A discrete Gaussian diffusion with its training losses, likelihood bound and samplers.

    Tables over the timesteps are public float64 numpy arrays [T]: `betas`, `alphas_cumprod`,
    `posterior_variance` and so on. Arithmetic on images is in float32 (float64 where the images
    are), whatever the precision in which the network answers. The underscored methods are shared
    with the modules beside this one.

    :param betas: [T] variances in (0, 1], of x_0 -> x_1 first.
    :param model_mean_type: what the network predicts.
    :param model_var_type: where the variance of the reverse step comes from.
    :param loss_type: the objective of `training_losses`.
    :param rescale_timesteps: give the network floating-point timesteps in [0, 1000) for any T.
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps

        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise UserError(
                f"betas must be a non-empty list of numbers, not of shape {betas.shape}"
            )
        if not ((betas > 0) & (betas <= 1)).all():
            raise UserError(
                f"every beta must lie in (0, 1], these reach from {betas.min()} to {betas.max()}"
            )
        self.betas = betas
        self.num_timesteps = len(betas)

        alphas_cumprod = np.cumprod(1.0 - betas)
        if alphas_cumprod[-1] <= 0 and model_mean_type == ModelMeanType.EPSILON:
            raise UserError(
                "the last timestep is pure noise (beta = 1), from which predicted noise cannot "
                "tell the image: predict x_0 (--predict_xstart True) or take more diffusion steps"
            )
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(alphas_cumprod[1:], 0.0)

        # x_t given x_0, equation 4 of arXiv 2006.11239, and its inverses.
        self.sqrt_alphas_cumprod = np.sqrt(alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - alphas_cumprod)
        with np.errstate(divide="ignore"):
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / alphas_cumprod - 1)

        # x_{t-1} given x_t and x_0, equations 6 and 7 of arXiv 2006.11239.
        noise_kept = (1.0 - self.alphas_cumprod_prev) / (1.0 - alphas_cumprod)
        self.posterior_variance = betas * noise_kept
        # At t = 0 the posterior is a point; the logarithm there is that of t = 1.
        first = min(1, self.num_timesteps - 1)
        self.posterior_log_variance_clipped = np.log(
            np.append(self.posterior_variance[first] or betas[0], self.posterior_variance[1:])
        )
        self.posterior_mean_coef1 = (
            betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - alphas_cumprod)
        )
        self.posterior_mean_coef2 = np.sqrt(1.0 - betas) * noise_kept

        # The upper bound of the reverse variance, beta_t, and its logarithm. A fixed variance of
        # beta_0 at t = 0 would spoil the likelihood of the last step, so FIXED_LARGE takes there
        # what FIXED_SMALL takes.
        self.log_betas = np.log(betas)
        self._large_log_variance = np.append(
            self.posterior_log_variance_clipped[0], self.log_betas[1:]
        )
        self._large_variance = np.exp(self._large_log_variance)
        self._ddim_eta1_sigma = np.sqrt(noise_kept) * np.sqrt(
            1.0 - alphas_cumprod / self.alphas_cumprod_prev
        )
        self._device_tables: dict[tuple[str, th.device, th.dtype], th.Tensor] = {}

    # ---- Tables on the device, and the network ----

    def _at(self, name: str, t: th.Tensor, x: th.Tensor) -> th.Tensor:
        """Entries t of the table called `name`, shaped [N x 1 x ...] to multiply x.

        Each table is uploaded once per device, so that steps need no transfer or synchronisation.
        """
        dtype = th.float64 if x.dtype == th.float64 else th.float32
        key = (name, t.device, dtype)
        table = self._device_tables.get(key)
        if table is None:
            table = th.from_numpy(getattr(self, name)).to(dtype).to(t.device)
            self._device_tables[key] = table
        return table[t].reshape(-1, *[1] * (x.ndim - 1))

    def _network_timesteps(self, t: th.Tensor) -> th.Tensor:
        """What networks and guidance functions receive for the timesteps t [N]."""
        return network_timesteps(t, self.num_timesteps, self.rescale_timesteps)

    def _call(self, fn: Model, x: th.Tensor, t: th.Tensor, kwargs: dict | None) -> th.Tensor:
        """Output of a network or a guidance function at (x, t), in float32 or better."""
        return _at_least_float32(fn(x, self._network_timesteps(t), **(kwargs or {})))

    def _predict(
        self, model: Model, x: th.Tensor, t: th.Tensor, model_kwargs: dict | None
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """Call the network once: its prediction and its variance values, None if not learned."""
        output = self._call(model, x, t, model_kwargs)
        channels = x.shape[1]
        learned = self.model_var_type.is_learned()
        expected = (x.shape[0], channels * 2 if learned else channels, *x.shape[2:])
        if tuple(output.shape) != expected:
            raise UserError(
                f"the network's output has shape {tuple(output.shape)}, this diffusion expects "
                f"{expected}: give both the same learn_sigma and the same number of channels"
            )
        if not learned:
            return output, None
        prediction, variance_values = output.split(channels, dim=1)
        return prediction, variance_values

    # ---- The forward process q ----

    def q_mean_variance(
        self, x_start: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), equation 4 of arXiv 2006.11239.

        :param x_start: [N x C x ...] images x_0.
        :param t: int64 [N] timesteps.
        :return: three tensors of x_start's shape.
        """
        x_start = _at_least_float32(x_start)
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start)
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start,
            log_variance.exp().expand(x_start.shape),
            log_variance.expand(x_start.shape),
        )

    def q_sample(
        self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None
    ) -> th.Tensor:
        """A draw x_t from q(x_t | x_0), equation 4 of arXiv 2006.11239.

        :param x_start: [N x C x ...] images x_0.
        :param t: int64 [N] timesteps.
        :param noise: eps of x_start's shape; drawn where None.
        """
        x_start = _at_least_float32(x_start)
        if noise is None:
            noise = th.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} for images of {tuple(x_start.shape)}"
            )
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0).

        Equations 6 and 7 of arXiv 2006.11239. At t = 0 the variance is 0 and the log-variance that
        of t = 1.

        :param x_start: [N x C x ...] images x_0.
        :param x_t: likewise, x_t.
        :param t: int64 [N] timesteps.
        :return: three tensors of x_t's shape.
        """
        if x_start.shape != x_t.shape:
            raise ValueError(
                f"x_start of shape {tuple(x_start.shape)}, x_t of shape {tuple(x_t.shape)}"
            )
        return (
            self._posterior_mean(x_start, x_t, t),
            self._at("posterior_variance", t, x_t).expand(x_t.shape),
            self._at("posterior_log_variance_clipped", t, x_t).expand(x_t.shape),
        )

    def _posterior_mean(self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        return (
            self._at("posterior_mean_coef1", t, x_t) * x_start
            + self._at("posterior_mean_coef2", t, x_t) * x_t
        )

    # ---- The reverse process p ----

    def p_mean_variance(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        model_kwargs: dict | None = None,
    ) -> Terms:
        """The Gaussian p(x_{t-1} | x_t) and the predicted x_0, from one call of the network.

        :param model: callable (x, timesteps, **model_kwargs) -> [N x C x ...], or [N x 2C x ...]
            where the variance is learned.
        :param x: [N x C x ...] images x_t.
        :param t: int64 [N] timesteps.
        :param clip_denoised: clip the predicted x_0 to [-1, 1].
        :param denoised_fn: applied to the predicted x_0 before it is clipped.
        :param model_kwargs: further arguments of the network.
        :return: `mean`, `variance`, `log_variance`, `pred_xstart`, each of x's shape, in float32
            whatever the network's precision (float64 where x is).
        :raises UserError: the network's output has not the shape that the diffusion expects.
        """
        prediction, variance_values = self._predict(model, x, t, model_kwargs)
        return self._p_from_output(prediction, variance_values, x, t, clip_denoised, denoised_fn)

    def _p_from_output(
        self,
        prediction: th.Tensor,
        variance_values: th.Tensor | None,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None,
    ) -> Terms:
        """`p_mean_variance` from the two halves of the network's output."""
        x = _at_least_float32(x)
        variance, log_variance = self._p_variance(variance_values, x, t)
        pred_xstart = self._predict_xstart(prediction, x, t, clip_denoised, denoised_fn)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = prediction
        else:
            mean = self._posterior_mean(pred_xstart, x, t)
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def _predict_xstart(
        self,
        prediction: th.Tensor,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None,
    ) -> th.Tensor:
        """The x_0 that the network's prediction implies."""
        x = _at_least_float32(x)
        if self.model_mean_type == ModelMeanType.START_X:
            pred_xstart = prediction
        elif self.model_mean_type == ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x, t, prediction)
        else:
            pred_xstart = self._predict_xstart_from_xprev(x, t, prediction)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        return pred_xstart.clamp(-1, 1) if clip_denoised else pred_xstart

    def _p_variance(
        self, values: th.Tensor | None, x: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """Variance and log-variance of p(x_{t-1} | x_t), see `ModelVarType`."""
        if values is not None:
            log_variance = values
            if self.model_var_type == ModelVarType.LEARNED_RANGE:
                # Equation 15 of arXiv 2102.09672, with v = (values + 1) / 2.
                low = self._at("posterior_log_variance_clipped", t, x)
                high = self._at("log_betas", t, x)
                log_variance = th.lerp(low, high, (values + 1) / 2)
            return log_variance.exp(), log_variance
        if self.model_var_type == ModelVarType.FIXED_LARGE:
            names = "_large_variance", "_large_log_variance"
        else:
            names = "posterior_variance", "posterior_log_variance_clipped"
        variance, log_variance = (self._at(name, t, x).expand(x.shape) for name in names)
        return variance, log_variance

    def _predict_xstart_from_eps(self, x_t: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        """Equation 4 of arXiv 2006.11239 solved for x_0."""
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def _predict_eps_from_xstart(
        self, x_t: th.Tensor, t: th.Tensor, pred_xstart: th.Tensor
    ) -> th.Tensor:
        """Equation 4 of arXiv 2006.11239 solved for eps."""
        signal = self._at("sqrt_alphas_cumprod", t, x_t) * pred_xstart
        return (x_t - signal) / self._at("sqrt_one_minus_alphas_cumprod", t, x_t)

    def _predict_xstart_from_xprev(
        self, x_t: th.Tensor, t: th.Tensor, xprev: th.Tensor
    ) -> th.Tensor:
        """Equation 7 of arXiv 2006.11239, the posterior mean, solved for x_0."""
        rest = xprev - self._at("posterior_mean_coef2", t, x_t) * x_t
        return rest / self._at("posterior_mean_coef1", t, x_t)

    # ---- Guidance by the gradient of another model ----

    def condition_mean(
        self,
        cond_fn: Model,
        p_mean_var: Terms,
        x: th.Tensor,
        t: th.Tensor,
        model_kwargs: dict | None = None,
    ) -> th.Tensor:
        """The reverse mean shifted by variance times gradient, algorithm 1 of arXiv 2105.05233.

        :param cond_fn: callable (x, timesteps, **model_kwargs) -> gradient of log p(y | x_t) with
            respect to x_t, of x's shape. It receives the same timesteps as the network.
        :param p_mean_var: the result of `p_mean_variance` at (x, t).
        :return: the new mean, of x's shape.
        """
        gradient = self._call(cond_fn, x, t, model_kwargs)
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(
        self,
        cond_fn: Model,
        p_mean_var: Terms,
        x: th.Tensor,
        t: th.Tensor,
        model_kwargs: dict | None = None,
    ) -> Terms:
        """The prediction as if the score were that of p(x_t | y), algorithm 2 of arXiv 2105.05233.

        eps - sqrt(1 - abar_t) gradient takes the place of eps (section 4.2 there). For
        deterministic samplers, where shifting the mean has no meaning.

        :param cond_fn: as in `condition_mean`.
        :param p_mean_var: as in `condition_mean`.
        :return: p_mean_var with new `mean` and `pred_xstart`.
        """
        gradient = self._call(cond_fn, x, t, model_kwargs)
        x = _at_least_float32(x)
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        return {
            **p_mean_var,
            "pred_xstart": pred_xstart,
            "mean": self._posterior_mean(pred_xstart, x, t),
        }

    # ---- Ancestral sampling ----

    def p_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        noise_fn: NoiseFn | None = None,
    ) -> Terms:
        """A draw of x_{t-1} from p(x_{t-1} | x_t), algorithm 2 of arXiv 2006.11239.

        Other parameters as in `p_mean_variance`.

        :param x: [N x C x ...] images x_t.
        :param t: int64 [N] timesteps.
        :param cond_fn: gradient of a classifier, see `condition_mean`.
        :param noise_fn: callable (x, t) -> standard normal noise like x; `th.randn_like` if None.
        :return: `sample` (x_{t-1}; the mean where t = 0) and `pred_xstart`, of x's shape.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        noise = _noise_after(t, _draw(noise_fn, x, t))
        sample = out["mean"] + th.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        noise_fn: NoiseFn | None = None,
    ) -> th.Tensor:
        """Images [N x C x ...] sampled through every timestep, algorithm 2 of arXiv 2006.11239.

        Other parameters as in `p_sample`.

        :param shape: (N, C, ...) of the images.
        :param noise: x_T to start from; drawn where None.
        :param device: where to draw it; that of the noise or of the model where None.
        :param progress: show a progress bar.
        :param noise_fn: callable (x, timestep as int) -> standard normal noise like x, for the
            steps; `th.randn_like` where None.
        """
        args = (noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        steps = self.p_sample_loop_progressive(model, shape, *args, noise_fn=noise_fn)
        return _last(steps)["sample"]

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Terms]:
        """`p_sample_loop`, yielding the result of `p_sample` at every timestep, T - 1 first."""

        def step(x: th.Tensor, t: th.Tensor, noise_fn: NoiseFn | None) -> Terms:
            options = (clip_denoised, denoised_fn, cond_fn, model_kwargs)
            return self.p_sample(model, x, t, *options, noise_fn)

        return self._sample_loop(step, model, shape, noise, device, progress, noise_fn)

    # ---- DDIM ----

    def ddim_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
        noise_fn: NoiseFn | None = None,
    ) -> Terms:
        """One step of DDIM, equation 12 of arXiv 2010.02502.

        Other parameters as in `p_mean_variance`.

        :param x: [N x C x ...] images x_t.
        :param t: int64 [N] timesteps.
        :param cond_fn: gradient of a classifier, see `condition_score`.
        :param eta: 0 is deterministic, 1 has the variance of ancestral sampling (equation 16).
        :param noise_fn: callable (x, t) -> standard normal noise like x; `th.randn_like` if None.
        :return: `sample` (x_{t-1}) and `pred_xstart`, of x's shape.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        x = _at_least_float32(x)
        # Derived from the x_0 as clipped and guided, not from the network's own answer.
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        abar_prev = self._at("alphas_cumprod_prev", t, x)
        sigma = eta * self._at("_ddim_eta1_sigma", t, x)
        direction = (1 - abar_prev - sigma.square()).clamp(min=0).sqrt() * eps
        noise = _noise_after(t, _draw(noise_fn, x, t))
        sample = abar_prev.sqrt() * out["pred_xstart"] + direction + sigma * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
    ) -> Terms:
        """One step of DDIM towards the noise: x_{t+1} from x_t, section 4.3 of arXiv 2010.02502.

        Other parameters as in `p_mean_variance`.

        :param x: [N x C x ...] images x_t.
        :param t: int64 [N] timesteps.
        :param eta: must be 0, only the deterministic process can be reversed.
        :return: `sample` (x_{t+1}; the predicted noise at t = T - 1) and `pred_xstart`.
        """
        if eta != 0.0:
            raise UserError(f"DDIM can be reversed with eta 0 alone, not with eta {eta}")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        x = _at_least_float32(x)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        abar_next = self._at("alphas_cumprod_next", t, x)
        sample = abar_next.sqrt() * out["pred_xstart"] + (1 - abar_next).sqrt() * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_fn: NoiseFn | None = None,
    ) -> th.Tensor:
        """Images [N x C x ...] sampled by DDIM through every timestep, arXiv 2010.02502.

        Parameters as in `p_sample_loop` and `ddim_sample`.
        """
        args = (noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta)
        steps = self.ddim_sample_loop_progressive(model, shape, *args, noise_fn=noise_fn)
        return _last(steps)["sample"]

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Terms]:
        """`ddim_sample_loop`, yielding the result of `ddim_sample` at every timestep."""

        def step(x: th.Tensor, t: th.Tensor, noise_fn: NoiseFn | None) -> Terms:
            options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
            return self.ddim_sample(model, x, t, *options, noise_fn)

        return self._sample_loop(step, model, shape, noise, device, progress, noise_fn)

    def _sample_loop(
        self,
        step: Callable[[th.Tensor, th.Tensor, NoiseFn | None], Terms],
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None,
        device: th.device | str | None,
        progress: bool,
        noise_fn: NoiseFn | None,
    ) -> Iterator[Terms]:
        """Apply `step` at T - 1, ..., 0, each time to the last sample; no gradients."""
        x = starting_noise(model, shape, noise, device)
        for i, t in self._descending_timesteps(x, progress, "sampling"):
            step_noise = None if noise_fn is None else (lambda x, _, i=i: noise_fn(x, i))
            # Entered anew at every step: the caller's own code runs between two of them.
            with th.no_grad():
                out = step(x, t, step_noise)
            yield out
            x = out["sample"]

    def _descending_timesteps(
        self, x: th.Tensor, progress: bool, title: str
    ) -> Iterator[tuple[int, th.Tensor]]:
        """T - 1, ..., 0, each as a number and as int64 [N] for the batch x."""
        timesteps = reversed(range(self.num_timesteps))
        total = self.num_timesteps if progress else 0
        for i in progress_bar(total, desc=title, iterable=timesteps):
            yield i, th.full((x.shape[0],), i, device=x.device, dtype=th.int64)

    # ---- Training ----

    def training_losses(
        self,
        model: Model,
        x_start: th.Tensor,
        t: th.Tensor,
        model_kwargs: dict | None = None,
        noise: th.Tensor | None = None,
    ) -> Terms:
        """The terms of the training loss, one number per image.

        :param model: as in `p_mean_variance`.
        :param x_start: [N x C x ...] images in [-1, 1].
        :param t: int64 [N] timesteps.
        :param model_kwargs: further arguments of the network.
        :param noise: eps of x_start's shape; drawn where None.
        :return: `loss` [N], to be minimised, with what it consists of, see `LossType`: for the MSE
            losses `mse` [N] and, where the variance is learned, `vb` [N].
        """
        x_start = _at_least_float32(x_start)
        if noise is None:
            noise = th.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        prediction, variance_values = self._predict(model, x_t, t, model_kwargs)

        if self.loss_type.is_vb():
            p = self._p_from_output(prediction, variance_values, x_t, t, False, None)
            loss = self._vb_from_p(p, x_start, x_t, t)
            if self.loss_type == LossType.RESCALED_KL:
                loss = loss * self.num_timesteps
            return {"loss": loss}

        terms = {}
        if variance_values is not None:
            # The bound teaches the variance alone: section 3.1 of arXiv 2102.09672.
            p = self._p_from_output(prediction.detach(), variance_values, x_t, t, False, None)
            vb = self._vb_from_p(p, x_start, x_t, t)
            if self.loss_type == LossType.RESCALED_MSE:
                vb = vb * (self.num_timesteps / 1000.0)
            terms["vb"] = vb
        if self.model_mean_type == ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type == ModelMeanType.START_X:
            target = x_start
        else:
            target = self._posterior_mean(x_start, x_t, t)
        terms["mse"] = _mean_per_image((target - prediction).square())
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    # ---- The variational bound ----

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: th.Tensor,
        x_t: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> Terms:
        """One term of the variational bound in bits per dimension.

        L_{t-1} of equation 5 of arXiv 2006.11239, the divergence of p from the posterior of q; at
        t = 0 the negative log-likelihood of the 8-bit pixels (equation 13).

        :return: `output` [N] and `pred_xstart` of x_start's shape.
        """
        p = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        output = self._vb_from_p(p, x_start, x_t, t)
        return {"output": output, "pred_xstart": p["pred_xstart"]}

    def _vb_from_p(self, p: Terms, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        """The bits per dimension [N] of `_vb_terms_bpd`, from the result of `p_mean_variance`."""
        q_mean, _, q_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        divergence = normal_kl(q_mean, q_log_variance, p["mean"], p["log_variance"])
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=p["mean"], log_scales=0.5 * p["log_variance"]
        )
        nats = th.where(t == 0, _mean_per_image(decoder_nll), _mean_per_image(divergence))
        return nats / math.log(2.0)

    def _prior_bpd(self, x_start: th.Tensor) -> th.Tensor:
        """L_T of equation 5 of arXiv 2006.11239, bits per dimension [N]: what is left of the image
        at the last timestep. No network can change it."""
        last = self.num_timesteps - 1
        t = th.full((x_start.shape[0],), last, device=x_start.device, dtype=th.int64)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return _mean_per_image(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @th.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: th.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        progress: bool = False,
        noise_fn: NoiseFn | None = None,
    ) -> Terms:
        """The whole variational bound (equation 5 of arXiv 2006.11239), through every timestep.

        :param x_start: [N x C x ...] images in [-1, 1] that were 8-bit.
        :param progress: show a progress bar.
        :param noise_fn: callable (x_start, timestep as int) -> noise, `th.randn_like` where None.
        :return: in bits per dimension `total_bpd` [N], `prior_bpd` [N] and `vb` [N x T]; as mean
            squares `xstart_mse` [N x T] of the predicted x_0 and `mse` [N x T] of the noise. The
            columns run from timestep T - 1 to 0.
        """
        x_start = _at_least_float32(x_start)
        columns: dict[str, list[th.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i, t in self._descending_timesteps(x_start, progress, "likelihood"):
            noise = _draw(noise_fn, x_start, i)
            x_t = self.q_sample(x_start, t, noise=noise)
            out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(_mean_per_image((out["pred_xstart"] - x_start).square()))
            columns["mse"].append(_mean_per_image((eps - noise).square()))
        terms = {name: th.stack(values, dim=1) for name, values in columns.items()}
        terms["prior_bpd"] = self._prior_bpd(x_start)
        terms["total_bpd"] = terms["vb"].sum(dim=1) + terms["prior_bpd"]
        return terms


def starting_noise(
    model: Model,
    shape: Sequence[int],
    noise: th.Tensor | None = None,
    device: th.device | str | None = None,
) -> th.Tensor:
    """x_T of a sampler: the given noise, or standard normal numbers of the shape.

    :param device: where to put them; that of the noise, else of the model's parameters, else the
        CPU, where None.
    """
    if noise is not None:
        if tuple(noise.shape) != tuple(shape):
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} to start images of {tuple(shape)}"
            )
        return noise if device is None else noise.to(device)
    if device is None:
        parameters = model.parameters() if isinstance(model, th.nn.Module) else iter(())
        first = next(parameters, None)
        device = "cpu" if first is None else first.device
    return th.randn(*shape, device=device)


def _at_least_float32(x: th.Tensor) -> th.Tensor:
    """Half precision cannot hold the differences of nearly equal numbers that occur here."""
    return x if x.dtype == th.float64 else x.float()


def _draw(noise_fn: NoiseFn | None, x: th.Tensor, t: th.Tensor | int) -> th.Tensor:
    return th.randn_like(x) if noise_fn is None else noise_fn(x, t)


def _noise_after(t: th.Tensor, noise: th.Tensor) -> th.Tensor:
    """The noise, except where t = 0: the last step adds none."""
    return (t != 0).reshape(-1, *[1] * (noise.ndim - 1)) * noise


def _mean_per_image(x: th.Tensor) -> th.Tensor:
    """[N x ...] -> [N]"""
    return x.flatten(1).mean(dim=1)


def _last(items: Iterator[Terms]) -> Terms:
    for item in items:
        final = item
    return final
