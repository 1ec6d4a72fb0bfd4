import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.images.geometry import IGNORE, KINDS, Geometry

LENGTHS = st.one_of(st.integers(1, 12), st.integers(1, 500))
SIZES = st.tuples(LENGTHS, st.one_of(st.integers(1, 12), st.integers(1, 700)))
TARGETS = st.tuples(st.integers(1, 300), st.integers(1, 300))
GEOMETRIES = st.builds(Geometry, st.sampled_from(KINDS), TARGETS)


def random_mask(size, seed, classes=7):
    return np.random.default_rng(seed).integers(0, classes, size, dtype=np.uint8)


def shown_places(geometry, size):
    """Number of the source pixel that each result pixel shows, -1 for padding: int64 [h x w]."""
    numbers = np.arange(size[0] * size[1], dtype=np.int64).reshape(size) + 1000
    shown = geometry.apply_mask(numbers)
    return np.where(shown == IGNORE, -1, shown - 1000)


def as_kept(geometry, size):
    """Which source pixels the result still shows: bool [H x W]."""
    places = shown_places(geometry, size)
    kept = np.zeros(size[0] * size[1], dtype=bool)
    kept[places[places >= 0]] = True
    return kept.reshape(size)


@settings(max_examples=250, deadline=None)
@given(GEOMETRIES, SIZES, st.integers(0, 2**32))
def test_the_inverse_returns_every_pixel_that_was_not_dropped(geometry, size, seed):
    mask = random_mask(size, seed)
    there = geometry.apply_mask(mask)
    back = geometry.invert_mask(there, size)
    assert there.shape == geometry.result_size(*size)
    assert there.dtype == back.dtype == np.uint8
    assert back.shape == size
    kept = as_kept(geometry, size)
    assert np.array_equal(back[kept], mask[kept])


@settings(max_examples=100, deadline=None)
@given(SIZES, st.floats(1, 4), st.sampled_from(["pad", "squash", "native"]))
def test_nothing_is_dropped_where_the_result_is_no_smaller(size, factor, kind):
    target = (min(900, int(size[0] * factor)), min(900, int(size[1] * factor)))
    geometry = Geometry(kind, target)
    if kind != "pad":  # padding may round one side down by half a pixel
        assert as_kept(geometry, size).all()
    mask = random_mask(size, 1)
    back = geometry.invert_mask(geometry.apply_mask(mask), size)
    kept = as_kept(geometry, size)
    assert np.array_equal(back[kept], mask[kept])
    assert kept.mean() > 0.5


@settings(max_examples=150, deadline=None)
@given(GEOMETRIES, SIZES, st.integers(0, 2**32))
def test_no_class_appears_that_was_not_there(geometry, size, seed):
    rng = np.random.default_rng(seed)
    classes = rng.choice(np.arange(1, 200, dtype=np.uint8), 3)
    mask = rng.choice(classes, size)
    there = geometry.apply_mask(mask)
    padding = {IGNORE} if geometry.kind == "pad" else set()
    assert set(np.unique(there)) <= set(classes) | padding
    outside = {0} if geometry.kind == "crop" else set()
    assert set(np.unique(geometry.invert_mask(there, size))) <= set(classes) | outside


@settings(max_examples=100, deadline=None)
@given(GEOMETRIES, SIZES, st.booleans())
def test_images_get_the_result_size_and_keep_their_type(geometry, size, colour):
    shape = (*size, 3) if colour else size
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for source in (image, image.astype(np.float32) / 255):
        result = geometry.apply_image(source)
        assert result.shape == (*geometry.result_size(*size), *shape[2:])
        assert result.dtype == source.dtype
    assert result.min() >= 0
    assert result.max() <= 1


@settings(max_examples=100, deadline=None)
@given(GEOMETRIES, SIZES)
def test_probabilities_remain_probabilities(geometry, size):
    rng = np.random.default_rng(0)
    there = rng.random((3, *geometry.result_size(*size)), dtype=np.float32)
    there /= there.sum(0)
    back = geometry.invert_probabilities(there, size)
    assert back.shape == (3, *size)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back.sum(0), 1, atol=1e-5)
    assert back.min() >= 0


@settings(max_examples=100, deadline=None)
@given(st.builds(Geometry, st.sampled_from(["crop", "pad", "squash"]), TARGETS), SIZES)
def test_masks_and_probabilities_are_cut_at_the_same_pixels(geometry, size):
    inside = geometry.invert_mask(np.ones(geometry.height_width, np.uint8), size) == 1
    certain = np.stack([np.zeros(geometry.height_width), np.ones(geometry.height_width)])
    back = geometry.invert_probabilities(certain.astype(np.float32), size)
    assert np.array_equal(back[1] == 1, inside)
    assert np.array_equal(back[0] == 1, ~inside)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["crop", "pad", "squash"]), TARGETS, SIZES)
def test_images_and_masks_stay_aligned(kind, target, size):
    """A bright half of the image covers the same pixels as its class."""
    mask = np.zeros(size, np.uint8)
    mask[:, size[1] // 2 :] = 1
    geometry = Geometry(kind, target)
    image, there = geometry.apply_image(mask * 255), geometry.apply_mask(mask)
    counted = there != IGNORE
    assert (image[~counted] == 0).all()
    astray = counted & (np.abs(image - 255.0 * there) > 127)
    # halvings round sizes down, which moves an edge by a pixel, or by that much once enlarged
    assert astray.any(axis=0).sum() <= max(1, 2 * target[1] // size[1] + 1)


def test_probabilities_are_interpolated_between_pixel_centres():
    geometry = Geometry("squash", (1, 2))
    there = np.array([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=np.float32)
    back = geometry.invert_probabilities(there, (1, 4))
    np.testing.assert_allclose(back[1, 0], [0, 0.25, 0.75, 1])


def test_padding_never_mixes_into_probabilities():
    geometry = Geometry("pad", (4, 8))
    there = np.zeros((2, 4, 8), np.float32)
    there[0] = 1
    there[:, :, 2:6] = [[[0]], [[1]]]
    assert (geometry.invert_probabilities(there, (9, 9))[1] == 1).all()


def test_a_crop_is_undone_in_its_place_and_class_0_is_certain_elsewhere():
    geometry = Geometry("crop", 4)
    back = geometry.invert_probabilities(np.stack([np.zeros((4, 4)), np.ones((4, 4))]), (4, 10))
    assert (back[:, :, 3:7] == [[[0]], [[1]]]).all()
    assert (back[0, :, :3] == 1).all()
    assert (back[0, :, 7:] == 1).all()
    mask = geometry.invert_mask(np.full((4, 4), 5, np.uint8), (4, 10), outside=IGNORE)
    assert mask[0].tolist() == [IGNORE] * 3 + [5] * 4 + [IGNORE] * 3


def test_pad_centres_the_whole_picture():
    mask = Geometry("pad", 8).apply_mask(np.ones((10, 20), np.uint8))
    assert (mask[2:6] == 1).all()
    assert (mask[:2] == IGNORE).all()
    assert (mask[6:] == IGNORE).all()
    image = Geometry("pad", 8).apply_image(np.full((10, 20), 9, np.uint8))
    assert (image[2:6] == 9).all()
    assert (image[:2] == 0).all()


@pytest.mark.parametrize(
    ("size", "result", "steps", "left_top"),
    [  # (width, height) as Pillow has it; halved with BOX while twice too large, then BICUBIC
        ((103, 100), 50, [(51, 50), (51, 50)], (0, 0)),
        ((700, 500), 64, [(350, 250), (175, 125), (90, 64)], (13, 0)),
        ((31, 90), 30, [(30, 87)], (0, 28)),
        ((5, 9), 16, [(16, 29)], (0, 6)),
        ((128, 128), 32, [(64, 64), (32, 32), (32, 32)], (0, 0)),
    ],
)
def test_crop_halves_with_box_and_ends_with_bicubic(size, result, steps, left_top):
    image = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(image)
    for step in steps[:-1]:
        picture = picture.resize(step, Image.Resampling.BOX)
    picture = picture.resize(steps[-1], Image.Resampling.BICUBIC)
    left, top = left_top
    expected = np.asarray(picture.crop((left, top, left + result, top + result)))
    assert np.array_equal(Geometry("crop", result).apply_image(image), expected)
    assert np.array_equal(Geometry("crop", result).apply_image(image[..., 1]), expected[..., 1])


def test_a_picture_of_extreme_shape_needs_no_extreme_memory():
    line = np.linspace(0, 255, 200_000).astype(np.uint8)[None]
    result = Geometry("crop", 256).apply_image(line)
    assert result.shape == (256, 256)
    assert abs(int(result.mean()) - 127) <= 1


def test_native_is_the_identity():
    mask = random_mask((7, 5), 0)
    geometry = Geometry("native", 64)
    assert geometry.apply_mask(mask) is mask
    assert geometry.invert_mask(mask, (7, 5)) is mask
    assert geometry.apply_image(mask) is mask
    assert geometry.scaled_image(mask) is mask


def test_scaled_image_is_the_picture_before_the_cut():
    image = np.random.default_rng(0).integers(0, 256, (60, 91), dtype=np.uint8)
    geometry = Geometry("crop", 20)
    scaled = geometry.scaled_image(image)
    assert scaled.shape == (20, 30)
    assert np.array_equal(scaled[:, 5:25], geometry.apply_image(image))


@pytest.mark.parametrize(("kind", "size"), [("stretch", 4), ("crop", 0), ("pad", (4, -1))])
def test_impossible_geometries_are_refused(kind, size):
    with pytest.raises(ValueError, match=r"must be one of|at least 1"):
        Geometry(kind, size)
