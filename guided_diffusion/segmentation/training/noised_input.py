"""Training images as the diffusion shows them: at random timesteps, with the noise of each."""

import dataclasses

import numpy as np
import torch as th

from guided_diffusion.networks.config import DiffusionConfig, network_timestep
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError


def parse_range(text: str, steps: int) -> tuple[int, int] | None:
    """`"0,150"` to the lowest and the highest timestep; "" to None."""
    if not text:
        return None
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError:
        low, high = 0, -1
    if not 0 <= low <= high < steps:
        raise UserError(
            f"--timestep_range {text}: expected two timesteps LOW,HIGH of the diffusion's"
            f" 0 to {steps - 1}"
        )
    return low, high


class NoisedInput:
    """Takes training images to timesteps of the diffusion (arXiv 2006.11239, equation 4).

    :param diffusion: of the pretrained network.
    :param timestep: of all images, of the diffusion's steps, unless there is a `span`.
    :param span: lowest and highest timestep; each image gets one of them at random.
    :param noise: add the timestep's noise; otherwise the network is told the timestep alone.
    :param seed: of timesteps and noise.
    """

    def __init__(
        self,
        diffusion: DiffusionConfig,
        timestep: float,
        span: tuple[int, int] | None,
        noise: bool,
        seed: int = 0,
    ):
        self.diffusion = diffusion
        self.span = span
        self.low, self.high = span or (round(timestep), round(timestep))
        if not 0 <= self.high < diffusion.diffusion_steps:
            raise UserError(
                f"--timestep {timestep}: the diffusion has the timesteps 0 to"
                f" {diffusion.diffusion_steps - 1}"
            )
        self.noise = noise
        self.seed = seed
        process = dataclasses.replace(diffusion, timestep_respacing="").build()
        self.signal = np.sqrt(process.alphas_cumprod)

    def __call__(self, images: th.Tensor, first: int) -> tuple[th.Tensor, th.Tensor | None]:
        """Images `[N x C x H x W]` in [-1, 1] to noised ones and their timesteps `[N]`.

        :param first: number of the first image in the run, counted over all steps.
        :return: timesteps in the network's units; None where all images have the network's own.
        """
        numbers = range(first, first + len(images))
        share = rng.uniforms(self.seed, "timestep", numbers)
        steps = self.low + np.floor(share * (self.high - self.low + 1)).astype(int)
        if self.noise:
            signal = th.from_numpy(self.signal[steps]).to(images.dtype)[:, None, None, None]
            noise = rng.normal(self.seed, "noise", numbers, images.shape[1:])
            images = signal * images + (1 - signal**2).sqrt() * noise
        if self.span is None:
            return images, None
        network_timesteps = [network_timestep(float(step), self.diffusion) for step in steps]
        return images, th.tensor(network_timesteps)
