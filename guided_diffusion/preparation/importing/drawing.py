"""Regions to an index mask; masks of several people to one."""

from collections.abc import Sequence

import numpy as np

from guided_diffusion.preparation.importing.classes import Classes
from guided_diffusion.segmentation.annotations.reading.source import Drawing, Size, Source


def draw(
    drawing: Drawing, size: Size, classes: Classes, unlabelled: int, source: Source | None = None
) -> np.ndarray:
    """The index mask of one person's annotations, uint8 [H x W].

    :param unlabelled: the value of pixels that no region covers.
    :param source: notes the regions that cover no pixel.
    """
    kept = []
    for region in drawing.regions:
        value = classes.value[region.name]
        if value is not None:
            kept.append((classes.rank.get(value, 0), value, region))
    kept.sort(key=lambda entry: entry[0])
    mask = np.full(size, unlabelled, np.uint8)
    for _, value, region in kept:
        covered = region.shape.draw(size)
        mask[covered] = value
        if source is not None and not covered.any():
            source.omit(region.where, "it covers the centre of no pixel of the image")
    return mask


def vote(masks: Sequence[np.ndarray], unlabelled: int) -> np.ndarray:
    """What more than half of the masks [H x W] say of each pixel; elsewhere `unlabelled`."""
    found = np.full(masks[0].shape, unlabelled, np.uint8)
    stacked = np.stack(masks)
    for value in np.unique(stacked):
        found[2 * (stacked == value).sum(axis=0) > len(masks)] = value
    return found
