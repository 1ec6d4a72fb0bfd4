"""Arrays of label values to regions: what label maps, nnU-Net and their kin have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.source import Region, Size

_MOST_VALUE = 2**16


@dataclass(frozen=True)
class Label:
    """The pixels of one value in an array that is read when it is drawn."""

    read: Callable[[], np.ndarray]
    value: int
    where: str

    def draw(self, size: Size) -> np.ndarray:
        values = self.read()
        if values.shape != size:
            raise UserError(
                f"{self.where} has {values.shape[0]} x {values.shape[1]} pixels (height x width),"
                f" its image has {size[0]} x {size[1]}; export it in the geometry of the image"
            )
        return values == self.value


def values_of(values: np.ndarray, path: str) -> list[int]:
    """The label values in an array, without 0.

    :raises UserError: if they are no labels.
    """
    found = np.unique(values)
    if not np.isfinite(found).all() or not np.array_equal(found, np.rint(found)):
        raise UserError(f"{path} holds fractions; label maps hold whole numbers")
    if found[0] < 0 or found[-1] > _MOST_VALUE:
        raise UserError(
            f"{path} holds values from {found[0]:g} to {found[-1]:g}; labels are numbered from 1:"
            " is it an image?"
        )
    if len(found) > 256:
        raise UserError(f"{path} holds {len(found)} values; a label map has few: is it an image?")
    return [int(value) for value in found if value]


def regions(
    read: Callable[[], np.ndarray], names: Mapping[int, str] | None, path: str
) -> list[Region]:
    """A region for each value in the array that `read` returns, in their order.

    :param names: of the values; None: they have none, and are called class 1 and so on.
    :raises UserError: if a value has no name.
    """
    found = values_of(read(), path)
    if names is not None and (strange := [value for value in found if value not in names]):
        raise UserError(
            f"{path} holds the value {strange[0]}, which has no name among"
            f" {', '.join(map(str, sorted(names)[:12]))}; name it or correct the file"
        )
    named = {value: f"class {value}" for value in found} if names is None else names
    return [Region(named[v], f"{path} ({named[v]})", Label(read, v, path)) for v in found]
