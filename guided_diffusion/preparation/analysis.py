"""Statistics of a data set, from one pass over its files."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.image_io import ImageError, bit_depth, read_counted
from guided_diffusion.images.masks import MaskRule
from guided_diffusion.preparation.layouts import Item
from guided_diffusion.preparation.mask_repair import SetValues
from guided_diffusion.runtime.progress import track

BINS = 64


@dataclass
class ImageFacts:
    """One radiograph. Grey levels are shares of the file type's range, 0 to 1."""

    name: str
    split: str
    height: int
    width: int
    bits: int
    channels: int
    grey: bool
    mean: float
    spread: float
    low: float
    median: float
    high: float
    histogram: np.ndarray
    class_pixels: np.ndarray | None = None


@dataclass
class Analysis:
    """Facts about every readable image, and a message about each that is not.

    binary        whether all masks are drawn in black and white, so that white counts as class 1
    thickness     per class, how thick it is in each mask that shows it: share of the longer side
    lost_by_crop  per mask, the share of each class that a central square crop would lose
    """

    facts: list[ImageFacts] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    binary: bool = False
    thickness: dict[int, list[float]] = field(default_factory=dict)
    lost_by_crop: list[np.ndarray] = field(default_factory=list)

    def num_classes(self) -> int:
        """One more than the highest class in any mask; 0 without masks."""
        return max(
            (len(f.class_pixels) for f in self.facts if f.class_pixels is not None), default=0
        )


def analyze(items: Sequence[Item], ignore: tuple[int, ...] = ()) -> Analysis:
    """Read every image and mask; unreadable ones are listed instead of raising an error.

    :param ignore: values of mask pixels without a label, which no figure counts.
    """
    analysis = Analysis()
    whole = SetValues.of((item.mask for item in items if item.mask), MaskRule(None, ignore))
    analysis.binary = whole.black_and_white
    rule = MaskRule(None, ignore, analysis.binary)
    for item in track(items, "reading"):
        try:
            facts = _image_facts(item, *read_counted(item.image))
            if item.mask:
                _add_mask(analysis, facts, rule.read(item.mask))
        except ImageError as error:
            analysis.unreadable.append(str(error))
            continue
        analysis.facts.append(facts)
    return analysis


def _image_facts(item: Item, image: np.ndarray, counted: np.ndarray) -> ImageFacts:
    levels = counted / np.float32(255) if counted.dtype == np.uint8 else counted
    low, median, high = np.percentile(levels, [1, 50, 99])
    histogram, _ = np.histogram(levels, bins=BINS, range=(0, 1))
    return ImageFacts(
        name=item.name,
        split=item.split,
        height=image.shape[0],
        width=image.shape[1],
        bits=bit_depth(item.image),
        channels=1 if image.ndim == 2 else 3,
        grey=image.ndim == 2 or bool((image == image[..., :1]).all()),
        mean=float(levels.mean()),
        spread=float(levels.std()),
        low=float(low),
        median=float(median),
        high=float(high),
        histogram=histogram / histogram.sum(),
    )


def _add_mask(analysis: Analysis, facts: ImageFacts, mask: np.ndarray) -> None:
    labelled = mask[mask != IGNORE]
    pixels = np.bincount(labelled, minlength=1)
    facts.class_pixels = pixels
    for index in np.flatnonzero(pixels):
        region = mask == index
        # area over half the perimeter: the width of a long strip, half the side of a square
        across = np.count_nonzero(region[1:] != region[:-1])
        along = np.count_nonzero(region[:, 1:] != region[:, :-1])
        if across + along:
            share = 2 * pixels[index] / (across + along) / max(mask.shape)
            analysis.thickness.setdefault(int(index), []).append(share)
    side = min(mask.shape)
    top, left = (mask.shape[0] - side) // 2, (mask.shape[1] - side) // 2
    centre = mask[top : top + side, left : left + side]
    kept = np.bincount(centre[centre != IGNORE], minlength=len(pixels))
    analysis.lost_by_crop.append(np.divide(pixels - kept, np.maximum(pixels, 1)))


def class_counts(analysis: Analysis, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each class, and images that show it; both int [num_classes]."""
    counts = np.zeros((len(analysis.facts), num_classes), np.int64)
    for row, facts in zip(counts, analysis.facts):
        if facts.class_pixels is not None:
            row[: len(facts.class_pixels)] = facts.class_pixels
    return counts.sum(axis=0), (counts > 0).sum(axis=0)
