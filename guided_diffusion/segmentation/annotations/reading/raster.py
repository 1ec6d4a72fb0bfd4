"""Shapes to pixels, by one rule: a pixel belongs to a shape if its centre lies inside.

Pixel (row r, column c) covers the square from (c, r) to (c + 1, r + 1); its centre is at
(c + 1/2, r + 1/2). Of a centre on an outline, the left and upper outlines belong to a polygon and
the right and lower ones do not, so that polygons side by side share no pixel and leave no gap.
"""

import math
from dataclasses import dataclass

import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.source import Size

_BLOCK = 1 << 20  # crossings computed at a time


@dataclass(frozen=True)
class Polygon:
    """Closed outlines; a point is inside if a ray from it crosses them an odd number of times.

    rings     each float [N x 2] of x, y; a ring in another one is a hole
    relative  whether coordinates are shares of the image's width and height
    """

    rings: tuple[np.ndarray, ...]
    relative: bool = False

    def draw(self, size: Size) -> np.ndarray:
        scale = np.array([size[1], size[0]]) if self.relative else 1.0
        rings = [np.asarray(ring, np.float64) * scale for ring in self.rings]
        corners = np.concatenate(rings)
        rows, columns = _box(size, corners.min(axis=0), corners.max(axis=0))
        toggles = np.zeros((rows.stop - rows.start, columns.stop - columns.start + 1), np.uint8)
        for ring in rings:
            _toggle(toggles, ring, rows.start, columns.start)
        found = np.zeros(size, bool)
        inside = np.bitwise_xor.accumulate(toggles[:, :-1], axis=1)
        found[rows, columns] = inside.astype(bool)
        return found


def _toggle(toggles: np.ndarray, ring: np.ndarray, top: int, left: int) -> None:
    """Flip the first pixel right of each crossing of an outline with the centre line of a row.

    :param toggles: uint8 [H x (W + 1)], changed; its first pixel is in row `top`, column `left`.
    """
    height, width = toggles.shape[0], toggles.shape[1] - 1
    following = np.roll(ring, -1, axis=0)
    # from above to below, so that an edge that two polygons share gives the same numbers
    falls = (ring[:, 1] <= following[:, 1])[:, None]
    x0, y0 = np.where(falls, ring, following).T
    x1, y1 = np.where(falls, following, ring).T
    # rows whose centre r + 1/2 lies in [upper, lower)
    first = np.ceil(y0 - 0.5).clip(top, top + height).astype(np.int64)
    last = np.ceil(y1 - 0.5).clip(top, top + height).astype(np.int64)
    counts = last - first
    ends = np.cumsum(counts)
    start = 0
    while start < len(ring):  # in blocks, as an outline may have many long edges
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _BLOCK, "right")))
        count = counts[start:stop]
        edge = np.repeat(np.arange(start, stop), count)
        row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        slope = (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
        x = x0[edge] + (row + 0.5 - y0[edge]) * slope
        column = np.ceil(x - 0.5).clip(left, left + width).astype(np.int64) - left
        places, times = np.unique((row - top) * (width + 1) + column, return_counts=True)
        toggles.reshape(-1)[places[times % 2 == 1]] ^= 1
        start = stop


def rectangle(x0: float, y0: float, x1: float, y1: float, angle: float = 0.0) -> Polygon:
    """A rectangle by two opposite corners.

    :param angle: by which it is turned about its centre, degrees clockwise as seen.
    """
    corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return Polygon((turned(corners, corners.mean(axis=0), angle),))


def turned(points: np.ndarray, about: np.ndarray, angle: float) -> np.ndarray:
    """Points [N x 2] turned about one of them, degrees clockwise as seen."""
    if not angle:
        return points
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    x, y = (points - about).T
    return np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=1) + about


@dataclass(frozen=True)
class Ellipse:
    """An ellipse with its outline.

    center  x, y
    radii   along its own axes
    angle   of the first axis, degrees clockwise as seen
    """

    center: tuple[float, float]
    radii: tuple[float, float]
    angle: float = 0.0

    def draw(self, size: Size) -> np.ndarray:
        (x, y), (rx, ry) = self.center, self.radii
        found = np.zeros(size, bool)
        reach = max(rx, ry)
        rows, columns = _box(size, (x - reach, y - reach), (x + reach, y + reach))
        if min(rx, ry) <= 0:
            return found
        dx, dy = np.arange(size[1])[columns] + 0.5 - x, np.arange(size[0])[rows, None] + 0.5 - y
        sine, cosine = math.sin(math.radians(self.angle)), math.cos(math.radians(self.angle))
        along, across = (dx * cosine + dy * sine) / rx, (dy * cosine - dx * sine) / ry
        found[rows, columns] = along**2 + across**2 <= 1
        return found


@dataclass(frozen=True)
class Line:
    """A line of some width with round ends, through points [N x 2] of x, y."""

    points: np.ndarray
    width: float

    def draw(self, size: Size) -> np.ndarray:
        radius = self.width / 2
        found = np.zeros(size, bool)
        for start, end in zip(self.points[:-1], self.points[1:]):
            low, high = np.minimum(start, end) - radius, np.maximum(start, end) + radius
            rows, columns = _box(size, low, high)
            x, y = np.arange(size[1])[columns] + 0.5, np.arange(size[0])[rows, None] + 0.5
            step = end - start
            length = float(step @ step)
            dx, dy = x - start[0], y - start[1]
            share = ((dx * step[0] + dy * step[1]) / length).clip(0, 1) if length else 0.0
            distance = (dx - share * step[0]) ** 2 + (dy - share * step[1]) ** 2
            found[rows, columns] |= distance <= radius**2
        return found


def _box(
    size: Size, low: "np.ndarray | tuple[float, float]", high: "np.ndarray | tuple[float, float]"
) -> tuple[slice, slice]:
    """The rows and columns whose centres may lie between two corners (x, y)."""
    spans = []
    for axis, length in ((1, size[0]), (0, size[1])):
        first, last = (int(min(max(value, 0), length)) for value in (low[axis], high[axis] + 1))
        spans.append(slice(first, last))
    return spans[0], spans[1]


@dataclass(frozen=True)
class Runs:
    """Run lengths of a bitmap, background first.

    counts       int [N]
    size         of the bitmap
    where        the annotation, for messages
    corner       its first row and column in the image; None if it has the image's size
    column_wise  whether runs follow columns rather than rows
    """

    counts: np.ndarray
    size: Size
    where: str
    corner: tuple[int, int] | None = None
    column_wise: bool = False

    def draw(self, size: Size) -> np.ndarray:
        height, width = self.size
        if self.corner is None and self.size != size:
            raise UserError(
                f"{self.where} has a mask of {height} x {width} pixels (height x width), its image"
                f" has {size[0]} x {size[1]}; export both at one size"
            )
        top, left = self.corner or (0, 0)
        if top < 0 or left < 0 or top + height > size[0] or left + width > size[1]:
            raise UserError(
                f"{self.where}: its mask covers rows {top} to {top + height} and columns {left} to"
                f" {left + width} of an image of {size[0]} x {size[1]} pixels (height x width);"
                " is it of another image?"
            )
        total = int(self.counts.sum())
        if total != height * width:
            raise UserError(
                f"{self.where}: its runs cover {total} pixels, {height} x {width} are"
                f" {height * width}; export it again"
            )
        values = np.repeat(np.arange(len(self.counts)) % 2 == 1, self.counts)
        shape = (width, height) if self.column_wise else (height, width)
        bitmap = values.reshape(shape)
        found = np.zeros(size, bool)
        found[top : top + height, left : left + width] = bitmap.T if self.column_wise else bitmap
        return found


@dataclass(frozen=True)
class Bitmap:
    """A mask, bool [H x W], at a place in the image; what protrudes from the image is cut off."""

    values: np.ndarray
    corner: tuple[int, int] = (0, 0)

    def draw(self, size: Size) -> np.ndarray:
        found = np.zeros(size, bool)
        spans, parts = [], []
        for start, length, limit in zip(self.corner, self.values.shape, size):
            first, last = max(start, 0), min(start + length, limit)
            spans.append(slice(first, max(first, last)))
            parts.append(slice(first - start, max(first, last) - start))
        found[spans[0], spans[1]] = self.values[parts[0], parts[1]]
        return found
