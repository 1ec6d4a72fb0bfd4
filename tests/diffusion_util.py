"""Diffusions for the tests, with networks that are toys or perfect."""

import numpy as np
import torch as th
from golden_util import tensor

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion, space_timesteps


def process(
    schedule="linear",
    steps=100,
    mean_type=ModelMeanType.EPSILON,
    var_type=ModelVarType.FIXED_LARGE,
    loss_type=LossType.MSE,
    rescale=False,
):
    """The arguments of a GaussianDiffusion."""
    return dict(
        betas=get_named_beta_schedule(schedule, steps),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale,
    )


def make_diffusion(
    schedule="linear", steps=100, mean_type=ModelMeanType.EPSILON, *, spacing=None, **kwargs
):
    """The diffusion of `process`, respaced where `spacing` says how."""
    arguments = process(schedule, steps, mean_type, **kwargs)
    if spacing is None:
        return GaussianDiffusion(**arguments)
    return SpacedDiffusion(space_timesteps(steps, spacing), **arguments)


def toy(x, t):
    """A network with nothing special about it."""
    return 0.3 * x + 0.1 * th.sin(7 * x + t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000)


def toy_network(learn):
    """`toy`, with values for a learned variance where `learn`."""
    return (lambda x, t: th.cat([toy(x, t), 0.2 * th.cos(x)], dim=1)) if learn else toy


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
