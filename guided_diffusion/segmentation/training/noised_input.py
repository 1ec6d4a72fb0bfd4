"""Training images at chosen or random timesteps of the diffusion, noised accordingly."""

import dataclasses

import numpy as np
import torch as th

from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.networks.process import network_timestep
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError


def parse_range(text: str, steps: int) -> tuple[int, int] | None:
    """Parse `"0,150"` into the lowest and highest timestep; "" gives None.

    :param steps: number of timesteps of the diffusion.
    :raises UserError: unless 0 <= low <= high < steps.
    """
    if not text:
        return None
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError:
        low, high = 0, -1
    if not 0 <= low <= high < steps:
        raise UserError(
            f"--timestep_range {text}: expected two timesteps LOW,HIGH between 0 and {steps - 1}"
        )
    return low, high


class NoisedInput:
    """Diffuses training images to given timesteps (arXiv 2006.11239, equation 4).

    :param diffusion: the pretrained network's diffusion process.
    :param timestep: timestep of all images, in the diffusion's steps; ignored if there is a `span`.
    :param span: lowest and highest timestep; each image's is drawn uniformly between them.
    :param noise: whether to noise the images; if not, only the network's timestep changes.
    :param seed: seeds timesteps and noise.
    :raises UserError: if a timestep is not one of the diffusion's.
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
        """Diffuse images `[N x C x H x W]`, in [-1, 1] before the noise.

        :param first: index of the first image within the run, counted over all steps.
        :return: the images, and their timesteps `[N]` in the network's units, or None where the
            network's default timestep applies.
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
