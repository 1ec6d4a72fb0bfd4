"""Augmentation: image and mask stay together, no class appears."""

from dataclasses import replace

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.swaps import parse_swaps
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.training.augment import (
    LEVELS,
    Augmentation,
    _Elastic,
    check_flips,
    strong_intensity,
)


def picture(height: int, width: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0, 2, 5], np.uint8), (height, width))
    return (mask * 40)[..., None], mask


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(LEVELS),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**62),
)
def test_no_class_appears_and_shapes_stay(level, height, width, seed):
    image, mask = picture(height, width)
    changed, moved = Augmentation(level, "both")(image, mask, seed)
    assert changed.shape == image.shape
    assert changed.dtype == moved.dtype == np.uint8
    assert set(np.unique(moved)) <= {0, 2, 5, IGNORE}


@pytest.mark.parametrize("level", LEVELS)
def test_a_seed_decides_everything(level):
    image, mask = picture(24, 24)
    augment = Augmentation(level, "horizontal")
    one, other = augment(image, mask, 3), augment(image, mask, 3)
    assert all(np.array_equal(a, b) for a, b in zip(one, other))
    if level != "none":
        assert any(not np.array_equal(augment(image, mask, s)[0], one[0]) for s in range(4, 12))


def test_image_and_mask_move_together():
    """Geometry alone: wherever the mask is known, the image still shows that class's grey."""
    image, mask = np.zeros((48, 48, 1), np.uint8), np.zeros((48, 48), np.uint8)
    mask[12:30, 8:26] = 1
    image[mask == 1] = 200
    geometric = Augmentation("heavy").transform.transforms[:3]
    augment = Augmentation(transforms=geometric)
    for seed in range(20):
        changed, moved = augment(image, mask, seed)
        known = moved != IGNORE
        agree = (changed[..., 0] > 100) == (moved == 1)
        assert agree[known].mean() > 0.93


def test_strong_changes_of_grey_leave_every_pixel_in_its_place():
    image, mask = picture(48, 48)
    image = np.kron(image[:6, :6], np.ones((8, 8, 1), np.uint8))
    mask = np.kron(mask[:6, :6], np.ones((8, 8), np.uint8))
    grey = Augmentation(transforms=strong_intensity())
    agreement = []
    for seed in range(40):
        changed, moved = grey(image, mask, seed)
        assert np.array_equal(moved, mask)
        agreement.append(np.corrcoef(changed.ravel(), image.ravel())[0, 1])
    assert np.median(agreement) > 0.9
    assert min(agreement) > 0.5
    assert max(np.abs(grey(image, mask, s)[0].astype(int) - image).max() for s in range(5)) > 50


def test_flips_happen_only_where_asked_for_and_swap_sides():
    mask = np.zeros((4, 8), np.uint8)
    mask[:, 0], mask[:, -1] = 1, 2
    image = (mask * 100)[..., None]
    plain = Augmentation("none", "horizontal")
    swapping = Augmentation("none", "horizontal", parse_swaps("1:2"))
    found = {tuple(plain(image, mask, seed)[1][0, [0, -1]]) for seed in range(20)}
    assert found == {(1, 2), (2, 1)}
    assert {tuple(swapping(image, mask, seed)[1][0, [0, -1]]) for seed in range(20)} == {(1, 2)}
    greys = {tuple(swapping(image, mask, seed)[0][0, [0, -1], 0]) for seed in range(20)}
    assert greys == {(100, 200), (200, 100)}


def test_only_mirroring_left_to_right_swaps_sides():
    """Corners 3 to 6 tell how a mask was mirrored, 1 and 2 are its sides."""
    mask = np.array([[3, 1, 2, 4], [5, 1, 2, 6]], np.uint8)
    image = mask[..., None]
    for flip, mirrored in (("vertical", {False}), ("both", {False, True})):
        augment, found = Augmentation("none", flip, parse_swaps("1:2")), set()
        for seed in range(40):
            changed, moved = augment(image, mask, seed)
            is_mirrored = changed[0, 0, 0] in (4, 6)
            found.add((is_mirrored, changed[0, 0, 0] in (5, 6)))
            assert moved[0, 1:3].tolist() == [1, 2]
            assert changed[0, 1:3, 0].tolist() == ([2, 1] if is_mirrored else [1, 2])
        assert {m for m, _ in found} == mirrored
        assert len(found) == 2 * len(mirrored)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (60, 180), (180, 60)])
def test_the_elastic_deformation_is_as_wide_as_it_says(height, width):
    """Pixels hold their own coordinates, so a deformed image tells where each came from."""
    deform, side = _Elastic(1.0), min(height, width)
    place = np.stack(np.mgrid[:height, :width]).astype(np.float32)
    inside = np.s_[:, height // 4 : -height // 4, width // 4 : -width // 4]
    moved = []
    with th.random.fork_rng():
        th.manual_seed(0)
        for _ in range(60):
            moved.append((deform(tv_tensors.Image(place)).numpy() - place)[inside])
    deviation = np.stack(moved).std(axis=(0, 2, 3)) / side
    np.testing.assert_allclose(deviation, 0.02, rtol=0.15)  # down and to the right


@pytest.mark.parametrize("text", ["1", "1:2:3", "a:b", "1:300", "1:1", "1:2,3:1", "none,1:2"])
def test_wrong_swaps_are_refused(text):
    with pytest.raises(UserError, match="flip_swap"):
        parse_swaps(text)


def test_mirroring_is_checked_against_the_classes():
    plain, lungs = generic_categories(4), list(generic_categories(3))
    lungs[1:] = [replace(lungs[1], name="lung_left"), replace(lungs[2], name="Right lung")]
    assert check_flips(plain, "both", "") == ()
    assert check_flips(plain, "vertical", "1:3") == ((1, 3),)
    with pytest.raises(UserError, match=r"names class 99; .* 0 to 3"):
        check_flips(plain, "none", "1:99")
    for flip in ("horizontal", "both"):
        with pytest.raises(UserError, match=f"--flip {flip} mirrors radiographs, and 'lung_left'"):
            check_flips(lungs, flip, "")
        assert check_flips(lungs, flip, "1:2") == ((1, 2),)
        assert check_flips(lungs, flip, "none") == ()
    assert check_flips(lungs, "vertical", "") == check_flips(lungs, "none", "") == ()
    for name in ("upright", "leftover", "brightness"):
        assert check_flips([*plain, replace(plain[1], name=name)], "both", "") == ()


@pytest.mark.parametrize("command", ["finetune.py", "baseline_train.py", "mask_diffusion_train.py"])
def test_every_training_refuses_swaps_of_classes_that_there_are_not(
    script, pretrained, split, command
):
    folders = [split / "TRAIN" / kind for kind in ("IMG", "MASK")]
    first = [pretrained] if command == "finetune.py" else []
    flags = ["--flip", "horizontal", "--flip_swap", "1:99", "--weights_save", "out/segm.pth"]
    ended = script(command, *first, *folders, *flags)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "--flip_swap names class 99; the model has the classes 0 to 2" in ended.err
    assert not (split.parent / "out").exists()


def test_wrong_words_are_refused():
    with pytest.raises(UserError, match="--augmentation wild"):
        Augmentation("wild")
    with pytest.raises(UserError, match="--flip left"):
        Augmentation("none", "left")
