"""Radiographs without masks, to be labelled by networks."""

import functools
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from guided_diffusion.images.files import list_radiographs
from guided_diffusion.images.image_io import check_images, read_image
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage.contents import digests
from guided_diffusion.segmentation.training.dataset import LabelledImages

# bytes of images to cache; the least recently used are read from disk again
_CACHE_BYTES = 2**30


class _OnDemand(Sequence[np.ndarray]):
    """A sequence of `length` arrays, each fetched by its index when it is accessed."""

    def __init__(self, length: int, fetch: Callable[[int], np.ndarray]):
        self.length, self.fetch = length, fetch

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self.fetch(i) for i in range(self.length)[index]]
        return self.fetch(range(self.length)[index])


def load_unlabelled(folder: str, reading: ReadingConfig) -> LabelledImages:
    """The radiographs under a folder, read on demand; masks are 0 inside them, IGNORE in padding.

    Their names are their paths, their digests those of the radiographs alone.

    :raises UserError: if there are none.
    """
    paths, note = list_radiographs(folder)
    if note:
        say(f"{folder}: {note}")
    check_images(paths)

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(paths[index], reading.in_channels, reading.intensity_rule())
        mask = reading.geometry().apply_mask(np.zeros(image.shape[:2], np.uint8))
        return reading.prepare(image), mask

    size = sum(array.nbytes for array in read(0))
    cached = functools.lru_cache(maxsize=max(1, _CACHE_BYTES // size))(read)
    images = _OnDemand(len(paths), lambda index: cached(index)[0])
    masks = _OnDemand(len(paths), lambda index: cached(index)[1])
    window = reading.geometry().height_width if reading.resize == "native" else None
    return LabelledImages(tuple(paths), images, masks, window, tuple(digests(paths)))
