"""Faults in the values of a mask, and their repair as far as it is possible."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from guided_diffusion.images.files import open_file
from guided_diffusion.images.image_io import ImageError
from guided_diffusion.images.masks import read_mask
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.visuals.color_masks import (
    indices_from_colors,
    read_color_mask,
    unknown_colors,
)

STRAY_SHARE = 0.2
"""Strays per edge pixel above which edges count as blurred; see `_strays`.

Measured on phantoms of 48x48 to 128x128 pixels and on chest masks: hard edges, including those
resized by nearest neighbour, stay below 0.13; box and bilinear resizing give 0.22 or more.
"""
NEAR = 48  # grey levels from black or white that still count as black or white
GREY_EDGES = 0.4  # share of a blurred black-and-white mask that may be grey
UNKNOWN_COLORS = 0.15  # share of a colour mask that may be in colours of no class


@dataclass(frozen=True)
class MaskFault:
    """kind: a key of `validation.KINDS`; `repaired`: the mask as it should be, None if unknown."""

    kind: str
    text: str
    repaired: np.ndarray | None = None


def examine_mask(
    path: str, num_classes: int | None, categories: Sequence[Category]
) -> tuple[np.ndarray | None, list[MaskFault]]:
    """Examine the values of a mask file.

    :param num_classes: masks may hold 0 to `num_classes` - 1; if None, anything but 255.
    :param categories: the class table that colour masks are drawn by.
    :return: the mask [H x W], repaired if necessary, or None if that is impossible; its faults.
    """
    try:
        mask = read_mask(path)
    except ImageError as error:
        return _examine_unreadable(path, str(error), categories)
    faults = []
    lossy = _is_jpeg(path)
    if lossy:
        faults.append(("lossy mask", "is a JPEG file, which blurs class indices"))
    values = np.unique(mask)
    top = 255 if num_classes is None else num_classes
    shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
    repaired: np.ndarray | None = mask
    if values[-1] == 255 and set(values.tolist()) <= {0, 255}:
        faults.append(("black-and-white mask", f"holds the values {{{shown}}}"))
        repaired = (mask > 0).astype(np.uint8)
    elif values[-1] >= top and _black_and_white(mask):
        if not faults:
            faults.append(("blurred mask", f"holds values between black and white: {{{shown}}}"))
        repaired = (mask > 127).astype(np.uint8)
    else:
        strays = _strays(mask)
        if strays is not None:
            if not faults:
                faults.append(("blurred mask", "holds stray values along its edges"))
            mask = _fill_strays(mask, strays)
        # in a lossy file, neighbouring classes may have been swapped anywhere
        repaired = None if lossy or mask.max() >= top else mask
        if mask.max() >= top:
            text = f"holds the values {{{shown}}}; classes go from 0 to {top - 1}"
            faults.append(("value out of range", text))
    if repaired is not None and not repaired.any():
        faults.append(("empty mask", "has no foreground"))
    return repaired, [MaskFault(kind, text, repaired) for kind, text in faults]


def _examine_unreadable(
    path: str, reason: str, categories: Sequence[Category]
) -> tuple[np.ndarray | None, list[MaskFault]]:
    try:
        colors = read_color_mask(path)
    except ImageError as error:
        # more than 8 bits: a grey file whose values are not class indices
        kind = "value out of range" if "8 bits" in str(error) else "unreadable mask"
        return None, [MaskFault(kind, reason.removeprefix(path).strip())]
    if (colors == colors[..., :1]).all():
        return None, [MaskFault("value out of range", reason.removeprefix(path).strip())]
    unknown = unknown_colors(colors, categories)
    share = sum(unknown.values()) / colors[..., 0].size
    text = "is drawn in colours"
    if unknown:
        text += f", {len(unknown)} of them of no class ({100 * share:.1f} % of the pixels)"
    repaired = indices_from_colors(colors, categories) if share <= UNKNOWN_COLORS else None
    faults = [MaskFault("colour mask", text, repaired)]
    if repaired is not None and not repaired.any():
        faults.append(MaskFault("empty mask", "has no foreground", repaired))
    return repaired, faults


def _is_jpeg(path: str) -> bool:
    with open_file(path) as file:
        return file.read(2) == b"\xff\xd8"


def _black_and_white(mask: np.ndarray) -> bool:
    """Whether nearly all pixels are black or white, some white, and grey is confined to edges."""
    grey = (mask > NEAR) & (mask < 255 - NEAR)
    areas = np.count_nonzero(grey & _solid(mask))
    white = mask.max() >= 255 - NEAR
    confined = areas <= 0.1 * np.count_nonzero(grey)
    return bool(white and confined and grey.mean() <= GREY_EDGES)


def _strays(mask: np.ndarray) -> np.ndarray | None:
    """Pixels that interpolation left between two classes, bool [H x W]; None if edges are hard.

    Such a pixel lies strictly between its neighbours' extremes and in no 2 x 2 block of its value.
    """
    solid = _solid(mask)
    around = sliding_window_view(np.pad(mask, 1, mode="edge"), (3, 3))
    low, high = around.min(axis=(2, 3)), around.max(axis=(2, 3))
    strays = ~solid & (low < mask) & (mask < high)
    edges = np.count_nonzero(high.astype(np.int16) - low >= 2)
    return strays if strays.sum() > STRAY_SHARE * edges else None


def _solid(mask: np.ndarray) -> np.ndarray:
    """Pixels in a 2 x 2 block of one value."""
    corner = mask[:-1, :-1]
    block = (corner == mask[1:, 1:]) & (corner == mask[1:, :-1]) & (corner == mask[:-1, 1:])
    block = np.pad(block, 1)
    return block[1:, 1:] | block[1:, :-1] | block[:-1, 1:] | block[:-1, :-1]


def _fill_strays(mask: np.ndarray, strays: np.ndarray) -> np.ndarray:
    """The mask, with each stray pixel replaced by the commonest class of its neighbours."""
    result, known = mask.copy(), ~strays
    # a value that is solid nowhere is not a class
    known &= np.isin(mask, np.unique(mask[_solid(mask)]))
    while not known.all() and known.any():
        classes = np.unique(result[known])
        shown = [np.pad(known & (result == value), 1) for value in classes]
        votes = np.stack([sliding_window_view(one, (3, 3)).sum(axis=(2, 3)) for one in shown])
        decided = ~known & (votes.max(axis=0) > 0)
        result[decided] = classes[votes.argmax(axis=0)][decided]
        known |= decided
    return result
