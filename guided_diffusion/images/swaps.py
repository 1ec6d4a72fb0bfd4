"""Classes that change places in a mirrored image, such as left and right."""

import re

import numpy as np

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.runtime.errors import UserError

# pairs of classes that are exchanged when an image is mirrored left to right
Swaps = tuple[tuple[int, int], ...]


def parse_swaps(text: str) -> Swaps:
    """`"1:2,5:6"` to the pairs of classes to exchange in a mirrored image; "none" to none."""
    if text.strip() == "none":
        return ()
    pairs: list[tuple[int, int]] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        pair = (int(match[1]), int(match[2])) if match else (IGNORE, IGNORE)
        if max(pair) >= IGNORE:
            raise UserError(f"--flip_swap {text}: expected pairs of classes such as 1:2, or none")
        if pair[0] == pair[1] or any(n in other for n in pair for other in pairs):
            raise UserError(f"--flip_swap {text}: a class can change places with one other only")
        pairs.append(pair)
    return tuple(pairs)


def check_swap_classes(swaps: Swaps, classes: int) -> None:
    """:raises UserError: if a pair names a class that is not below `classes`."""
    missing = sorted({n for pair in swaps for n in pair if n >= classes})
    if missing:
        raise UserError(
            f"--flip_swap names class {missing[0]}; the model has the classes 0 to {classes - 1}"
        )


def exchange(mask: np.ndarray, swaps: Swaps) -> np.ndarray:
    """The mask, uint8 of any shape, with the classes of each pair exchanged."""
    table = np.arange(256, dtype=np.uint8)
    for one, other in swaps:
        table[one], table[other] = other, one
    return table[mask]
