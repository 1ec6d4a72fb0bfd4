"""Super-resolution: the small images to sharpen."""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch as th

from guided_diffusion.image_datasets import class_labels
from guided_diffusion.images.files import list_images
from guided_diffusion.images.reading import ReadingConfig, normalize
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.images import read_npz


def load_base_samples(
    path: str, reading: ReadingConfig, small_size: int, classes: Sequence[str]
) -> tuple[th.Tensor, list[int] | None]:
    """Small images to be sharpened, and their labels where they have some.

    :param path: an .npz file of a sampling script, or a folder or glob of images.
    :param reading: how the images of a folder are read.
    :param classes: the names of the network's classes; files of a folder have labels where all of
        their names tell one of them.
    :return: float32 `[N x C x small_size x small_size]` in [-1, 1].
    :raises UserError: if there are none, or not of that size and number of channels.
    """
    if not path:
        raise UserError("--base_samples is missing: name an .npz file or a folder of small images")
    if path.endswith(".npz"):
        images, labels = read_npz(path)
    else:
        reading = replace(reading, image_size=small_size)
        paths = list_images(path)
        images = np.stack([reading.load(file) for file in paths])
        try:
            labels = class_labels(paths, classes) if classes else None
        except UserError:
            labels = None
    wanted = (small_size, small_size, reading.in_channels)
    if images.shape[1:] != wanted:
        found, needed = ("x".join(map(str, shape)) for shape in (images.shape[1:], wanted))
        raise UserError(
            f"--base_samples {path}: the images are {found}, the network takes {needed}"
        )
    return normalize(images), labels


def fingerprint(images: th.Tensor) -> int:
    """A number that tells sets of images apart: the CRC-32 of their values."""
    return zlib.crc32(images.numpy().tobytes())
