"""Other views of the same radiograph, whose predictions are brought back and averaged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch as th

from guided_diffusion.errors import UserError
from guided_diffusion.segmentation.categories import Category

TTA = ("none", "flips", "shifts", "all")
# in the network's pixels; odd, so that every level of a U-Net sees another grid
SHIFT = 3

Swaps = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class View:
    """A radiograph moved by `shift` = (rows down, columns to the right), then perhaps mirrored.

    What a shift brings in is the border repeated. On the way back the predictions at the border
    are repeated likewise. `swaps` are pairs of classes that change places in a mirrored image.
    """

    shift: tuple[int, int] = (0, 0)
    mirrored: bool = False
    swaps: Swaps = ()

    def apply(self, images: th.Tensor) -> th.Tensor:
        """`[... x H x W]` to the same shape."""
        moved = _move(images, *self.shift)
        return moved.flip(-1) if self.mirrored else moved

    def invert(self, classes: th.Tensor) -> th.Tensor:
        """Predictions `[... x C x H x W]` for what `apply` returned, laid over the original."""
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


def views_for(tta: str, swaps: Swaps = ()) -> tuple[View, ...]:
    """The views that `--tta` names; the radiograph itself is the first.

    flips: mirrored, left becoming right. shifts: moved by SHIFT pixels of the network's image in
    each diagonal direction. all: both.
    """
    if tta not in TTA:
        raise UserError(f"--tta {tta}: choose one of {', '.join(TTA)}")
    shifts = [(0, 0)]
    if tta in ("shifts", "all"):
        shifts += [(down, right) for down in (-SHIFT, SHIFT) for right in (-SHIFT, SHIFT)]
    mirrors = (False, True) if tta in ("flips", "all") else (False,)
    return tuple(View(shift, mirror, swaps) for shift in shifts for mirror in mirrors)


def check_swaps(categories: Sequence[Category], swaps: Swaps, given: bool) -> None:
    """Refuse to mirror radiographs whose classes have a side that nobody said how to exchange.

    :param given: whether somebody chose `swaps`, if only by choosing none.
    :raises UserError: also where a pair names a class that there is not.
    """
    missing = sorted({n for pair in swaps for n in pair if n >= len(categories)})
    if missing:
        raise UserError(
            f"--flip_swap names class {missing[0]}; the model has the classes 0 to "
            f"{len(categories) - 1}"
        )
    sided = [c for c in categories if re.search(r"\b(left|right)\b", c.name.lower())]
    if sided and not given:
        opposite = {"left": "right", "right": "left"}
        names = {c.name.lower(): c.index for c in sided}
        pairs = set()
        for name, index in names.items():
            other = names.get(re.sub(r"\b(left|right)\b", lambda m: opposite[m[1]], name))
            if other is not None:
                pairs.add((min(index, other), max(index, other)))
        advice = ",".join(f"{one}:{other}" for one, other in sorted(pairs)) or "1:2"
        raise UserError(
            f"--tta mirrors radiographs, and {sided[0].name!r} has a side: say which classes "
            f"change places, as in --flip_swap {advice}, or take --tta shifts"
        )
