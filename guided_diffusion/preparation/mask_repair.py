"""Faults in the values of a mask, and their repair as far as it is possible."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from guided_diffusion.images.image_io import ImageError
from guided_diffusion.images.masks import (
    NEAR,
    MaskRule,
    black_and_white,
    has_gaps,
    in_block,
    list_values,
    mask_values,
)
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.visuals.color_masks import (
    indices_from_colors,
    read_color_mask,
    solid_share,
    unknown_colors,
)

STRAY_SHARE = 0.2
"""Strays per edge pixel above which edges count as blurred; see `_strays`.

Measured on phantoms of 48x48 to 128x128 pixels and on chest masks: hard edges, including those
resized by nearest neighbour, stay below 0.13; box and bilinear resizing give 0.22 or more.
"""
_JUDGED_SIDE = 40  # pixels; in smaller phantoms, structures of one pixel look like strays
UNKNOWN_COLORS = 0.15  # share of a colour mask that may be in colours of no class
UNKNOWN_SOLID = 0.25  # share of these pixels that may lie in 2 x 2 blocks of one colour


@dataclass(frozen=True)
class MaskFault:
    """kind: a key of `validation.KINDS`; text: a sentence whose subject is the file."""

    kind: str
    text: str


@dataclass(frozen=True)
class SetValues:
    """What the masks of a set hold together, as far as it explains a single one.

    levels  every value in any mask
    drawn   values that fill a 2 x 2 block in any mask, so that they were surely drawn
    mixed   whether a mask holds 255 beside class indices: then 255 means "ignore", not white
    black_and_white  whether every mask is surely drawn in black and white, and one shows white
    """

    levels: frozenset[int] = frozenset()
    drawn: frozenset[int] = frozenset()
    mixed: bool = False
    black_and_white: bool = False

    @classmethod
    def of(cls, paths: Iterable[str], rule: MaskRule) -> "SetValues":
        """Of all masks that can be read."""
        levels: set[int] = set()
        drawn: set[int] = set()
        mixed, drawings = False, True
        for path in paths:
            with contextlib.suppress(ImageError):
                values, lossy = mask_values(path)
                values = np.where(np.isin(values, rule.ignore), 0, values)
                found = np.unique(values).tolist()
                levels.update(found)
                drawn.update(np.unique(values[in_block(values)]).tolist())
                white = black_and_white(values, lossy) is not None
                mixed |= 255 in found and not white and not lossy
                drawings &= white or found == [0]
        single = len(levels) == 2 and 0 in levels and max(levels) > NEAR
        all_white = max(levels, default=0) > 0 and (drawings or single)
        return cls(frozenset(levels), frozenset(drawn), mixed, all_white)

    def has_gaps(self, rule: MaskRule) -> bool:
        """Whether the values are hardly class indices, though nothing says which there may be."""
        return rule.classes is None and has_gaps(self.levels)

    def is_white(self, value: int, rule: MaskRule) -> bool:
        """Whether a mask that holds only 0 and this value is surely drawn in black and white."""
        if value in (255, 65535):
            return not (self.mixed and value == 255)
        out_of_range = rule.classes is None or value >= rule.classes
        return out_of_range and value > NEAR and self.levels <= {0, value}


def examine_mask(
    path: str, rule: MaskRule, table: ClassTable, whole: SetValues | None = None
) -> tuple[np.ndarray | None, list[MaskFault]]:
    """Examine the values of a mask file.

    :param rule: the values that masks may hold.
    :param table: the class table that colour masks are drawn by; an empty one if none is known.
    :param whole: what the set that it belongs to holds; None: it stands alone.
    :return: the mask [H x W], repaired if necessary and if it is sure how, or None if the file
        cannot be used; its faults.
    """
    try:
        values, lossy = mask_values(path)
    except ImageError as error:
        return _examine_unreadable(path, str(error), table)
    alone = whole is None
    whole = whole or SetValues.of([path], rule)
    faults = []
    if lossy:
        faults.append(("lossy mask", f"is compressed as {lossy}, which blurs class indices"))
    ignored = np.isin(values, rule.ignore)
    labelled = np.where(ignored, 0, values)
    distinct = np.unique(labelled)
    top = 255 if rule.classes is None else rule.classes
    shown = list_values(labelled)
    white = black_and_white(labelled, lossy) if distinct[-1] >= top else None
    repaired: np.ndarray | None = values
    if len(distinct) == 2 and distinct[0] == 0 and whole.is_white(int(distinct[-1]), rule):
        faults.append(("black-and-white mask", f"holds the values {shown}"))
        repaired = np.where(ignored, values, labelled > 0)
    elif not lossy and white is None and distinct[-1] < 256 and whole.has_gaps(rule):
        text = f"holds the values {shown}: grey levels for display? See tools/rgb2tif.py"
        return values.astype(np.uint8), [MaskFault("values with gaps", text)]
    elif (
        distinct[-1] == 255
        and not lossy
        and (len(distinct) < 3 or distinct[-2] < top)
        and (white is None or len(distinct) < 3)
    ):
        text = f"holds the values {shown}: pixels to ignore? Then pass --ignore_index 255"
        return values.astype(np.uint8), [MaskFault("undeclared 255", text)]
    elif white is not None:
        if not faults:
            faults.append(("blurred mask", f"holds values between black and white: {shown}"))
        repaired = np.where(ignored, values, white)
    else:
        is_class_index = distinct[0] >= 0 and distinct[-1] <= 255
        strays = _strays(labelled) if is_class_index else None
        if strays is not None:
            filled = _fill_strays(labelled, strays)
            lost = np.setdiff1d(distinct, filled)
            if not alone and not _are_strays(lost.tolist(), rule, whole):
                text = (
                    f"holds {list_values(lost)} along edges only: stray values, or thin structures?"
                )
                return values.astype(np.uint8), [MaskFault("thin or stray values", text)]
            if not faults:
                faults.append(("blurred mask", "holds stray values along its edges"))
            labelled, repaired = filled, np.where(ignored, values, filled)
        # in a lossy file, neighbouring classes may have been swapped anywhere
        out_of_range = labelled.max() >= top or labelled.min() < 0
        if lossy or out_of_range:
            repaired = None
        if out_of_range:
            text = f"holds the values {shown}; classes go from 0 to {top - 1}"
            faults.append(("value out of range", text))
    if repaired is not None:
        repaired = repaired.astype(np.uint8)
        if not (repaired[~ignored] > 0).any():
            faults.append(("empty mask", "has no foreground"))
    return repaired, [MaskFault(kind, text) for kind, text in faults]


def _examine_unreadable(
    path: str, reason: str, table: ClassTable
) -> tuple[np.ndarray | None, list[MaskFault]]:
    try:
        colors = read_color_mask(path)
    except ImageError as error:
        # more than 8 bits: a grey file whose values are not class indices
        kind = "value out of range" if "8 bits" in str(error) else "unreadable mask"
        return None, [MaskFault(kind, reason.removeprefix(path).strip())]
    if (colors == colors[..., :1]).all():
        return None, [MaskFault("value out of range", reason.removeprefix(path).strip())]
    text, repaired = "is drawn in colours", None
    if table:
        unknown = unknown_colors(colors, table.entries)
        share = sum(unknown.values()) / colors[..., 0].size
        if unknown:
            text += f", {len(unknown)} of them of no class ({100 * share:.1f} % of the pixels)"
        if solid_share(colors, table.entries) > UNKNOWN_SOLID:
            text += ", drawn as areas: add them to the class table"
        elif share <= UNKNOWN_COLORS:
            repaired = indices_from_colors(colors, table)
    else:
        text += "; --categories or --num_classes say of which classes"
    faults = [MaskFault("colour mask", text)]
    if repaired is not None and not repaired.any():
        faults.append(MaskFault("empty mask", "has no foreground"))
    return repaired, faults


def _are_strays(values: Iterable[int], rule: MaskRule, whole: SetValues) -> bool:
    """Whether values are surely no classes, or not lost to the set if a mask loses them."""
    top = 255 if rule.classes is None else rule.classes
    return all(value >= top or value in whole.drawn for value in values)


def _strays(mask: np.ndarray) -> np.ndarray | None:
    """Pixels that interpolation left between two classes, bool [H x W]; None if edges are hard.

    None as well for masks too small to tell.

    Such a pixel lies strictly between its neighbours' extremes and in no 2 x 2 block of its value.
    """
    if min(mask.shape) < _JUDGED_SIDE:
        return None
    solid = in_block(mask)
    around = sliding_window_view(np.pad(mask, 1, mode="edge"), (3, 3))
    low, high = around.min(axis=(2, 3)), around.max(axis=(2, 3))
    strays = ~solid & (low < mask) & (mask < high)
    edges = np.count_nonzero(high.astype(np.int16) - low >= 2)
    return strays if strays.sum() > STRAY_SHARE * edges else None


def _fill_strays(mask: np.ndarray, strays: np.ndarray) -> np.ndarray:
    """The mask, with each stray pixel replaced by the commonest class of its neighbours."""
    result, known = mask.copy(), ~strays
    # a value that is solid nowhere is not a class
    known &= np.isin(mask, np.unique(mask[in_block(mask)]))
    while not known.all() and known.any():
        classes = np.unique(result[known])
        shown = [np.pad(known & (result == value), 1) for value in classes]
        votes = np.stack([sliding_window_view(one, (3, 3)).sum(axis=(2, 3)) for one in shown])
        decided = ~known & (votes.max(axis=0) > 0)
        result[decided] = classes[votes.argmax(axis=0)][decided]
        known |= decided
    return result
