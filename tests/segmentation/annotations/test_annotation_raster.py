"""One pixel rule: a pixel belongs to a shape if its centre lies inside."""

import itertools

import numpy as np
import pytest
from matplotlib.path import Path

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.raster import (
    Bitmap,
    Ellipse,
    Line,
    Polygon,
    Runs,
    rectangle,
)

SIZE = (24, 31)
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
CENTRES = np.stack([COLUMNS.ravel(), ROWS.ravel()], axis=1)


def drawn(shape):
    return shape.draw(SIZE)


@pytest.mark.parametrize("seed", range(8))
def test_polygons_are_those_of_another_implementation(seed):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 11))
    radii = rng.uniform(2, 18, 11)
    ring = np.stack([15 + radii * np.cos(angles), 12 + radii * np.sin(angles)], axis=1)
    theirs = Path(np.concatenate([ring, ring[:1]]), closed=True).contains_points(CENTRES)
    assert np.array_equal(drawn(Polygon((ring,))), theirs.reshape(SIZE))
    assert np.array_equal(drawn(Polygon((ring[::-1],))), theirs.reshape(SIZE))


def test_neighbours_share_no_pixel_and_leave_no_gap():
    """Also where outlines run through centres of pixels."""
    x, y = [0, 4.5, 11, 20.5, 31], [0, 3.5, 9.25, 24]
    count = np.zeros(SIZE, int)
    for left, right in itertools.pairwise(x):
        for upper, lower in itertools.pairwise(y):
            count += drawn(rectangle(left, upper, right, lower))
    assert (count == 1).all()
    diagonal = np.array([(0, 0), (31, 24)])
    parts = [Polygon((np.array([*diagonal, corner]),)) for corner in ((0, 24), (31, 0))]
    assert (sum(map(drawn, parts)) == 1).all()


def test_a_rectangle_on_the_grid_covers_what_it_encloses():
    expected = np.zeros(SIZE, bool)
    expected[3:7, 5:11] = True
    assert np.array_equal(drawn(rectangle(5, 3, 11, 7)), expected)
    assert np.array_equal(drawn(rectangle(4.51, 2.51, 11.49, 7.49)), expected)
    # through centres of pixels: the left and upper ones belong to it
    assert np.array_equal(drawn(rectangle(5.5, 3.5, 11.5, 7.5)), expected)


def test_a_ring_in_a_ring_is_a_hole():
    outer, inner = (rectangle(a, a, b, b).rings[0] for a, b in ((2, 20), (6, 12)))
    both = drawn(Polygon((outer, inner)))
    assert np.array_equal(both, drawn(Polygon((outer,))) & ~drawn(Polygon((inner,))))
    # one outline that runs in along a bridge and out again, as YOLO writes holes
    bridged = np.concatenate([outer, outer[:1], inner[[0, 3, 2, 1, 0]], outer[:1]])
    assert np.array_equal(drawn(Polygon((bridged,))), both)


def test_what_lies_outside_is_cut_off():
    everything = np.array([(-1e6, -1e6), (1e6, -1e6), (1e6, 1e6), (-1e6, 1e6)])
    assert drawn(Polygon((everything,))).all()
    assert not drawn(Polygon((everything + np.array([3e6, 0]),))).any()
    assert drawn(rectangle(-5, 10, 3, 40)).sum() == 3 * 14
    assert not drawn(rectangle(40, 40, 50, 50)).any()
    assert drawn(Bitmap(np.ones((10, 10), bool), (-4, 28))).sum() == 6 * 3
    assert not drawn(Bitmap(np.ones((10, 10), bool), (90, -80))).any()


def test_relative_polygons_are_shares_of_the_size():
    ring = np.array([(0.25, 0.5), (0.75, 0.5), (0.75, 1), (0.25, 1)])
    covered = Polygon((ring,), relative=True).draw((8, 40))
    assert np.array_equal(covered, rectangle(10, 4, 30, 8).draw((8, 40)))


def test_ellipses():
    dx, dy = COLUMNS - 14, ROWS - 11
    assert np.array_equal(drawn(Ellipse((14, 11), (6, 6))), np.hypot(dx, dy) <= 6)
    flat = Ellipse((14, 11), (9, 4))
    assert np.array_equal(drawn(flat), (dx / 9) ** 2 + (dy / 4) ** 2 <= 1)
    assert np.array_equal(drawn(Ellipse((14, 11), (4, 9), 90)), drawn(flat))
    # clockwise as seen: the right end goes down
    tilted = drawn(Ellipse((14, 11), (9, 2), 45))
    assert tilted[16, 19]
    assert not tilted[5, 19]


def test_a_turned_rectangle():
    plain = drawn(rectangle(10, 5, 20, 11))
    assert np.array_equal(drawn(rectangle(12, 3, 18, 13, 90)), plain)
    tilted = drawn(rectangle(5, 10, 25, 13, 30))
    assert tilted[15, 22]
    assert not tilted[7, 22]


def test_lines():
    points = np.array([(3.5, 4.5), (20.5, 4.5), (20.5, 15.5)])
    expected = np.zeros(SIZE, bool)
    expected[4, 3:21] = True
    expected[4:16, 20] = True
    assert np.array_equal(drawn(Line(points, 1)), expected)
    thick = drawn(Line(points, 5))
    assert thick[2:7, 3:18].all()
    assert not thick[7, 3:18].any()
    assert drawn(Line(np.array([(9.5, 9.5), (9.5, 9.5)]), 2.5)).sum() == 5  # a dot


def test_run_lengths():
    expected = np.zeros(SIZE, bool)
    expected[2:4, 1:3] = True
    inner = Runs(np.array([0, 4]), (2, 2), "x", (2, 1))
    assert np.array_equal(drawn(inner), expected)
    flat = np.flatnonzero(np.diff(np.concatenate([[0], expected.T.ravel(), [0]])))
    counts = np.diff(np.concatenate([[0], flat, [expected.size]]))
    assert np.array_equal(drawn(Runs(counts, SIZE, "x", column_wise=True)), expected)
    for runs, said in (
        (Runs(np.array([0, 4]), (2, 2), "file 7"), "file 7 has a mask of 2 x 2 .* 24 x 31"),
        (Runs(np.array([0, 5]), (2, 2), "file 7", (0, 0)), "cover 5 pixels, 2 x 2 are 4"),
        (Runs(np.array([0, 4]), (2, 2), "file 7", (23, 0)), "rows 23 to 25"),
    ):
        with pytest.raises(UserError, match=said):
            drawn(runs)
