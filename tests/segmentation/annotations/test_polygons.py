"""Regions to polygons and back, by an independent rasteriser."""

import numpy as np
import pytest
from annotations_util import by_pillow, hard_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.segmentation.annotations.polygons import trace_parts, without_holes
from guided_diffusion.segmentation.annotations.reading.raster import Polygon


def regions():
    mask = hard_mask()
    disc = np.hypot(*(np.mgrid[:90, :90] - 44.5)) < 40
    yield from ((f"class {label}", mask == label) for label in range(1, 5))
    yield "one pixel", np.ones((1, 1), bool)
    yield "all", np.ones((7, 5), bool)
    yield "none", np.zeros((4, 4), bool)
    yield "a row", np.array([[1, 1, 0, 1, 1, 1]], bool)
    yield "corners", np.eye(6, dtype=bool)
    yield "stairs", np.eye(20, dtype=bool) | np.eye(20, k=1, dtype=bool)
    yield "disc", disc
    yield "frame", ~disc


@pytest.mark.parametrize("tolerance", [0, 0.3, 0.5])
@pytest.mark.parametrize(
    ("name", "region"), list(regions()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_region_comes_back_exactly(name, region, tolerance):
    height, width = region.shape
    parts = trace_parts(region, tolerance)
    found, bridged = np.zeros_like(region), np.zeros_like(region)
    for part in parts:
        inside = by_pillow(part.rings, height, width)
        assert not (found & inside).any()
        assert np.array_equal(inside, Polygon(tuple(part.rings)).draw(region.shape))
        assert np.count_nonzero(inside) == part.area
        found |= inside
        bridged |= by_pillow([without_holes(part.rings)], height, width)
    assert np.array_equal(found, region)
    assert np.array_equal(bridged, region)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 14), st.integers(1, 14), st.floats(0.1, 0.9))
def test_any_region_comes_back_exactly(seed, height, width, share):
    region = np.random.default_rng(seed).random((height, width)) < share
    found = np.zeros_like(region)
    for part in trace_parts(region, 0.5):
        found ^= Polygon((without_holes(part.rings),)).draw(region.shape)
    assert np.array_equal(found, region)


def test_lines_stay_within_the_tolerance():
    shapely = pytest.importorskip("shapely")
    region = np.hypot(*(np.mgrid[:90, :90] - 44.5)) < 40
    (exact,), (simple,), (coarse,) = (trace_parts(region, t) for t in (0, 0.5, 2))
    assert len(coarse.rings[0]) < len(simple.rings[0]) < len(exact.rings[0]) / 2
    border = shapely.LinearRing(exact.rings[0])
    for part, tolerance in ((simple, 0.5), (coarse, 2)):
        line = shapely.LinearRing(part.rings[0])
        assert shapely.hausdorff_distance(border, line) <= tolerance + 1e-6


def test_corners_and_straight_sides_are_kept():
    region = np.zeros((30, 40), bool)
    region[5:20, 7:30] = True
    (part,) = trace_parts(region, 0.5)
    assert sorted(map(tuple, part.rings[0].tolist())) == [(7, 5), (7, 20), (30, 5), (30, 20)]
    assert (part.top, part.left, part.pixels.shape) == (5, 7, (15, 23))


def test_pixels_that_touch_by_a_corner_are_two_parts():
    assert len(trace_parts(np.eye(3, dtype=bool), 0.5)) == 3


def test_holes_are_rings_of_their_own():
    region = np.ones((9, 9), bool)
    region[2, 2] = region[5:7, 4:8] = False
    (part,) = trace_parts(region, 0.5)
    assert len(part.rings) == 3
    assert part.area == 81 - 9
