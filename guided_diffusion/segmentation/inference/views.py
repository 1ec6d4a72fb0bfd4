"""Test-time augmentation: views of a radiograph, whose predictions are mapped back and averaged."""

from dataclasses import dataclass

import torch as th

from guided_diffusion.images.swaps import Swaps
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.inference.config import TTA

# in pixels of the network's image; odd, so that every level of a U-Net sees another grid
SHIFT = 3


@dataclass(frozen=True)
class View:
    """A radiograph shifted by (rows down, columns to the right), then perhaps mirrored.

    A shift repeats the border, and so does the shift back of the predictions. `swaps` are pairs of
    classes that change places in a mirrored image.
    """

    shift: tuple[int, int] = (0, 0)
    mirrored: bool = False
    swaps: Swaps = ()

    def apply(self, images: th.Tensor) -> th.Tensor:
        """`[... x H x W]` to the same shape."""
        moved = _move(images, *self.shift)
        return moved.flip(-1) if self.mirrored else moved

    def invert(self, classes: th.Tensor) -> th.Tensor:
        """Maps predictions `[... x C x H x W]` for the view back onto the original."""
        if self.mirrored:
            order = list(range(classes.shape[-3]))
            for one, other in self.swaps:
                order[one], order[other] = other, one
            classes = classes.flip(-1)[..., order, :, :]
        return _move(classes, -self.shift[0], -self.shift[1])


def _move(images: th.Tensor, down: int, right: int) -> th.Tensor:
    for axis, distance in ((-2, down), (-1, right)):
        if distance:
            length = images.shape[axis]
            source = (th.arange(length, device=images.device) - distance).clamp(0, length - 1)
            images = images.index_select(axis, source)
    return images


def mirrors(tta: str) -> bool:
    """Whether `--tta` exchanges left and right."""
    return tta in ("flips", "all")


def views_for(tta: str, swaps: Swaps = ()) -> tuple[View, ...]:
    """The views that `--tta` names; the first is the radiograph itself.

    flips: mirrored left to right. shifts: by SHIFT pixels of the network's image in each diagonal
    direction. all: both.
    """
    if tta not in TTA:
        raise UserError(f"--tta {tta}: choose one of {', '.join(TTA)}")
    shifts = [(0, 0)]
    if tta in ("shifts", "all"):
        shifts += [(down, right) for down in (-SHIFT, SHIFT) for right in (-SHIFT, SHIFT)]
    mirrored = (False, True) if mirrors(tta) else (False,)
    return tuple(View(shift, mirror, swaps) for shift in shifts for mirror in mirrored)
