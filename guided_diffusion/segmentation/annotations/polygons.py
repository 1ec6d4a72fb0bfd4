"""Regions of a mask as polygons along the borders of its pixels.

Pixel (row r, column c) covers the square from (x, y) = (c, r) to (c + 1, r + 1). It belongs to a
polygon if its centre does, so that a traced region gives its own pixels back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# a closed line, [N x 2] of (x, y) in pixels; the first point is not repeated at the end
Ring = np.ndarray

# Up to this tolerance, in pixels, no line passes the centre of a pixel on its other side, or nearer
# than _MARGIN: readers that round points to a fifth of a pixel, as pycocotools does, agree as well.
KEEPS_PIXELS = 0.5
_MARGIN = 0.15


@dataclass(frozen=True)
class Part:
    """A region whose pixels are connected by their sides.

    rings: its outline, then its holes. pixels: bool [h x w], cut out of the mask at row `top` and
    column `left`.
    """

    rings: list[Ring]
    pixels: np.ndarray
    top: int
    left: int

    @property
    def area(self) -> int:
        """In pixels."""
        return int(np.count_nonzero(self.pixels))


def trace_parts(region: np.ndarray, tolerance: float = 0.0) -> list[Part]:
    """The parts of a region, from left to right in the rows in which they begin.

    :param region: bool [H x W].
    :param tolerance: how far straight lines may pass the corners of pixels, to need fewer points;
        up to KEEPS_PIXELS pixels, the polygons still hold exactly the region's own.
    """
    from scipy import ndimage

    labels, _ = ndimage.label(region)
    parts = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        pixels = labels[rows, columns] == number
        rings = [
            np.add(ring, (columns.start, rows.start))
            for ring in _simplified(_rings(pixels), tolerance)
        ]
        parts.append(Part(rings, pixels, rows.start, columns.start))
    return parts


def without_holes(rings: Sequence[Ring]) -> Ring:
    """One ring for a region with holes, for formats that know none.

    A line from each hole to the left, through the region to what is next there, is followed to the
    hole and back: it has no width, so that the pixels within remain the same.
    """
    outline, *holes = rings
    for hole in sorted(holes, key=lambda ring: ring[:, 0].min()):
        hole = np.roll(hole, -int(hole[:, 0].argmin()), axis=0)
        edge, point = _left_of(outline, hole[0])
        bridged = [outline[: edge + 1], point[None], hole, hole[:1], point[None]]
        outline = np.concatenate([*bridged, outline[edge + 1 :]])
        outline = outline[(outline != np.roll(outline, 1, axis=0)).any(axis=1)]
    return outline


def _left_of(ring: Ring, point: np.ndarray) -> tuple[int, np.ndarray]:
    """The edge of a ring that is next to the left of a point, and the point on it."""
    (x0, y0), (x1, y1) = ring.T, np.roll(ring, -1, axis=0).T
    across = (np.minimum(y0, y1) <= point[1]) & (point[1] <= np.maximum(y0, y1)) & (y0 != y1)
    share = np.where(across, (point[1] - y0) / np.where(across, y1 - y0, 1), 0)
    x = np.where(across, x0 + share * (x1 - x0), -np.inf)
    x[x > point[0]] = -np.inf
    edge = int(x.argmax())
    return edge, np.array([x[edge], point[1]])


def _rings(pixels: np.ndarray) -> list[Ring]:
    """The rings of pixels that are connected by their sides, with points at their corners only."""
    import shapely

    if pixels.all():
        height, width = pixels.shape
        return [np.array([[0, 0], [width, 0], [width, height], [0, height]], float)]
    steps = np.diff(np.pad(pixels, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), (_, ends) = np.nonzero(steps == 1), np.nonzero(steps == -1)
    polygon = shapely.union_all(shapely.box(starts, rows, ends, rows + 1))
    return [
        _corners(np.asarray(ring.coords)[:-1]) for ring in (polygon.exterior, *polygon.interiors)
    ]


def _corners(ring: Ring) -> Ring:
    """The points of a ring at which it turns."""
    before, behind = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[(np.sign(before) != np.sign(behind)).any(axis=1)]


def _simplified(rings: Sequence[Ring], tolerance: float) -> list[Ring]:
    """Rings of fewer points; the rings themselves if the others would cross."""
    import shapely

    if not tolerance or all(len(ring) == 4 for ring in rings):
        return list(rings)
    simple = [_Border(ring, tolerance).simplified() for ring in rings]
    if shapely.is_valid(shapely.Polygon(simple[0], simple[1:])):
        return simple
    return list(rings)


class _Border:
    """A ring along the sides of pixels, in steps of one side, and the lines that may replace it.

    Straight lines, each as long as it can be, end in the middles of sides that stand alone, which
    are the steps of a slanted border, and in corners between longer ones; where this does not
    succeed, the corners between remain.
    """

    def __init__(self, ring: Ring, tolerance: float):
        self.ring, self.tolerance = ring, tolerance
        sides = np.roll(ring, -1, axis=0) - ring
        lengths = np.abs(sides).sum(axis=1).astype(int)
        alone = lengths == 1
        steps = np.repeat(sides / lengths[:, None], lengths, axis=0)
        points = ring[0] + np.concatenate([np.zeros((1, 2)), steps.cumsum(axis=0)[:-1]])
        corner = lengths.cumsum() - lengths
        turns, blunt = np.zeros(len(points), bool), np.zeros(len(points), bool)
        turns[corner], blunt[corner] = True, ~alone & ~np.roll(alone, 1)
        ends = _interleaved(blunt, np.repeat(alone, lengths))
        self.start = start = int(ends.argmax())

        def closed(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values[start:], values[: start + 1]])

        # the points between steps, and after each of them the middle of its step
        self.places = closed(_interleaved(points, points + steps / 2))
        self.turns = closed(_interleaved(turns, np.zeros_like(turns)))
        normals = steps[:, ::-1] * (-0.5, 0.5)  # to the centre of the pixel on the left
        self.normals = closed(_interleaved(normals, normals))
        self.ends = np.append(np.flatnonzero(np.roll(ends, -start)), len(ends))

    def simplified(self) -> Ring:
        if len(self.ends) < 4:
            return self.ring
        kept: list[int] = []
        at = 0
        while at < len(self.ends) - 1:
            first, to = self.ends[at], self._farthest(at)
            kept.append(first)
            if to == at + 1 and not self._fits(first, self.ends[to]):
                kept += (first + 1 + np.flatnonzero(self.turns[first + 1 : self.ends[to]])).tolist()
            at = to
        return self.places[kept] if len(kept) >= 3 else self.ring

    def _farthest(self, first: int) -> int:
        """The last end that a line from end `first` reaches, by trying ever longer ones."""
        reached, step = first + 1, 1
        while step:
            last = min(reached + step, len(self.ends) - 1)
            if last > reached and self._fits(self.ends[first], self.ends[last]):
                reached, step = last, 2 * step
            else:
                step //= 2
        return reached

    def _fits(self, first: int, last: int) -> bool:
        """Whether a straight line may replace the border between two places."""
        passed = self.places[first : last + 1] - self.places[first]
        line = passed[-1]
        length = float(np.hypot(*line))
        if length == 0:
            return False
        along = (passed @ line / length).clip(0, length)
        offsets = passed - along[:, None] * line / length
        if np.hypot(*offsets.T).max() > self.tolerance + 1e-9:
            return False
        if self.tolerance > KEEPS_PIXELS:
            return True
        middles = (np.arange(first, last + 1) + self.start) % 2 == 1
        normals = self.normals[first : last + 1][middles]
        left, right = passed[middles] + normals, passed[middles] - normals
        return bool(
            (_cross(line, left) > _MARGIN * length).all()
            and (_cross(line, right) < -_MARGIN * length).all()
        )


def _cross(line: np.ndarray, points: np.ndarray) -> np.ndarray:
    return line[0] * points[:, 1] - line[1] * points[:, 0]


def _interleaved(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.stack([one, other], axis=1).reshape(-1, *one.shape[1:])
