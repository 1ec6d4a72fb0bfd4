"""Super-resolution: small images as a condition, in training and in sampling."""

from collections.abc import Iterator

import torch.nn.functional as F

from guided_diffusion.image_datasets import Batch


def with_low_res(batches: Iterator[Batch], small_size: int) -> Iterator[Batch]:
    """Add "low_res" `[N x C x small_size x small_size]`, the images averaged down, to batches."""
    for images, cond in batches:
        yield images, {**cond, "low_res": F.interpolate(images, small_size, mode="area")}
