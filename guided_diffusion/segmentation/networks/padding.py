"""Padding images to the multiples of pixels that a network needs, and cropping its scores back."""

import torch as th
import torch.nn.functional as F


def pad_to_multiple(images: th.Tensor, multiple: int) -> th.Tensor:
    """Repeat the last row and column of `[N x C x H x W]` until `multiple` divides both sides."""
    missing = [-side % multiple for side in images.shape[2:]]
    if not any(missing):
        return images
    return F.pad(images, [0, missing[1], 0, missing[0]], mode="replicate")


def crop_to(scores: th.Tensor, images: th.Tensor) -> th.Tensor:
    """Undo the padding: scores `[N x C x H' x W']` at the size of the images `[... x H x W]`."""
    return scores[..., : images.shape[-2], : images.shape[-1]]
