"""Images out of a trained network, each a function of the seed and of its own number."""

from collections.abc import Callable, Sequence
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from guided_diffusion.images.image_io import write_image
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.solvers import sampler_named


def sample_images(
    model: Callable[..., th.Tensor],
    diffusion: Any,
    shape: Sequence[int],
    indices: Sequence[int],
    *,
    sampler: str = "dpm++2m",
    steps: int = 20,
    seed: int = 0,
    device: th.device | str = "cpu",
    **options: Any,
) -> th.Tensor:
    """Sample the images of the given numbers, whichever other images share the batch.

    All noise is drawn on the CPU: a GPU computes the same images, up to rounding.

    :param model: network in eval mode on `device`.
    :param shape: `[C, H, W]` of an image.
    :param indices: numbers of the images, from 0.
    :param sampler: a name of `solvers.SAMPLERS`.
    :param options: further arguments of the sampler.
    :return: float32 `[len(indices) x C x H x W]` in [-1, 1].
    """

    def noise(x: th.Tensor, t: int) -> th.Tensor:
        return rng.normal(seed, f"step {t}", indices, x.shape[1:]).to(x.device)

    with th.no_grad():
        return sampler_named(sampler)(
            diffusion,
            model,
            (len(indices), *shape),
            steps=steps,
            noise=rng.normal(seed, "sample", indices, shape).to(device),
            noise_fn=noise,
            device=device,
            **options,
        )


def preview_images(
    model: Callable[..., th.Tensor],
    diffusion: Any,
    shape: Sequence[int],
    count: int,
    device: th.device | str,
    model_kwargs: dict[str, th.Tensor] | None = None,
) -> th.Tensor:
    """The first `count` images in few steps, as training shows them; see `sample_images`.

    Noise at every step corrects the errors of a network that has not learnt much yet.
    """
    steps = min(20, diffusion.num_timesteps)
    chosen = {"steps": steps, "eta": 1.0, "device": device, "model_kwargs": model_kwargs}
    return sample_images(model, diffusion, shape, range(count), **chosen)


def to_uint8(images: th.Tensor) -> np.ndarray:
    """`[N x C x H x W]` in [-1, 1] to uint8 `[N x H x W x C]`, as the original rounds."""
    scaled = ((images + 1) * 127.5).clamp(0, 255).to(th.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def save_grid(path: str, images: th.Tensor, columns: int | None = None) -> None:
    """Write `[N x C x H x W]` in [-1, 1] as one PNG, row by row; atomically."""
    from torchvision.utils import make_grid  # takes seconds to import

    columns = columns or max(1, round(len(images) ** 0.5))
    grid = make_grid(images.cpu(), nrow=columns, padding=2, pad_value=-1.0)
    write_image(path, to_uint8(grid[None])[0])


def read_npz(path: str) -> tuple[np.ndarray, list[int] | None]:
    """The images uint8 `[N x H x W x C]` of a file that a sampling script wrote, and their labels.

    :raises UserError: if it is no such file.
    """
    try:
        with bf.BlobFile(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = arrays["arr_0"]
            labels = arrays["arr_1"].tolist() if "arr_1" in arrays else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no .npz file of a sampling script: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise UserError(
            f"{path}: arr_0 is {images.dtype} of shape {images.shape}, not uint8 [N x H x W x C]"
        )
    return images, labels
