"""Sampling images, each of which is a function of the seed and its index alone."""

from collections.abc import Sequence
from dataclasses import replace

import blobfile as bf
import numpy as np
import torch as th

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Model
from guided_diffusion.images.image_io import write_image
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.pictures import image_grid
from guided_diffusion.sampling.solvers import SamplerOptions, sample


def sample_images(
    model: Model,
    diffusion: GaussianDiffusion,
    shape: Sequence[int],
    indices: Sequence[int],
    *,
    sampler: str = "dpm++2m",
    steps: int = 20,
    seed: int = 0,
    device: th.device | str = "cpu",
    options: SamplerOptions | None = None,
) -> th.Tensor:
    """Sample the images with these indices; the result does not depend on batching.

    All noise is drawn on the CPU, so a GPU gives the same images up to rounding.

    :param model: network in eval mode on `device`.
    :param shape: `[C, H, W]` of an image.
    :param indices: indices of the images, from 0.
    :param sampler: a key of `solvers.SAMPLERS`.
    :param options: see `SamplerOptions`; `noise_fn` and `device` are set here.
    :return: float32 `[len(indices) x C x H x W]` in [-1, 1].
    """

    def noise(x: th.Tensor, t: int) -> th.Tensor:
        return rng.normal(seed, f"step {t}", indices, x.shape[1:]).to(x.device)

    return sample(
        sampler,
        diffusion,
        model,
        (len(indices), *shape),
        steps=steps,
        noise=rng.normal(seed, "sample", indices, shape).to(device),
        options=replace(options or SamplerOptions(), noise_fn=noise, device=device),
    )


def preview_images(
    model: Model,
    diffusion: GaussianDiffusion,
    shape: Sequence[int],
    count: int,
    device: th.device | str,
    model_kwargs: dict[str, th.Tensor] | None = None,
) -> th.Tensor:
    """The first `count` images in at most 20 steps, for training previews; see `sample_images`.

    Stochastic sampling (eta 1) is more forgiving of an undertrained network.
    """
    steps = min(20, diffusion.num_timesteps)
    options = SamplerOptions(eta=1.0, model_kwargs=model_kwargs)
    return sample_images(
        model, diffusion, shape, range(count), steps=steps, device=device, options=options
    )


def to_uint8(images: th.Tensor) -> np.ndarray:
    """Convert `[N x C x H x W]` in [-1, 1] to uint8 `[N x H x W x C]`, truncating."""
    scaled = ((images + 1) * 127.5).clamp(0, 255).to(th.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def save_grid(path: str, images: th.Tensor, columns: int | None = None) -> None:
    """Write images `[N x C x H x W]` in [-1, 1] as a grid, in one PNG."""
    write_image(path, image_grid(to_uint8(images), columns=columns))


def read_npz(path: str) -> tuple[np.ndarray, list[int] | None]:
    """Read a sampling script's .npz file: images, uint8 `[N x H x W x C]`, and labels if any.

    :raises UserError: if it is not such a file.
    """
    try:
        with bf.BlobFile(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = arrays["arr_0"]
            labels = arrays["arr_1"].tolist() if "arr_1" in arrays else None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or 'it is damaged'}") from error
    except Exception as error:  # a damaged archive raises anything
        raise UserError(
            f"{path} is not an .npz file of a sampling script, or damaged: sample again"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise UserError(
            f"{path}: arr_0 is {images.dtype} of shape {images.shape}, not uint8 [N x H x W x C]"
        )
    return images, labels
