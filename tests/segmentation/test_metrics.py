import math

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_iou

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.metrics import (
    boundary_distances,
    confusion_matrix,
    dice_iou,
    nan_mean,
)


def masks(seed, num_classes=4, size=(13, 9)):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, num_classes, size, dtype=np.uint8)
    keep = rng.random(size) < 0.6
    return np.where(keep, true, rng.integers(0, num_classes, size, dtype=np.uint8)), true


def one_hot(mask, num_classes):
    return th.nn.functional.one_hot(th.tensor(mask).long(), num_classes).permute(2, 0, 1)[None]


def test_confusion_matrix_by_hand():
    predicted = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    true = np.array([[0, 1, 2], [2, 2, 1]], np.uint8)
    confusion = confusion_matrix(predicted, true, 4)
    assert confusion.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]]
    scores = dice_iou(confusion)
    assert scores.dice[:3] == pytest.approx([2 / 3, 2 / 4, 4 / 5])
    assert scores.iou[:3] == pytest.approx([1 / 2, 1 / 3, 2 / 3])
    assert math.isnan(scores.dice[3])
    assert math.isnan(scores.iou[3])
    assert scores.mean_dice() == pytest.approx((1 / 2 + 4 / 5) / 2)
    assert scores.mean_dice(with_background=True) == pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3)
    assert scores.mean_iou() == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert scores.mean_iou(with_background=True) == pytest.approx((1 / 2 + 1 / 3 + 2 / 3) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_monai(seed):
    predicted, true = masks(seed)
    scores = dice_iou(confusion_matrix(predicted, true, 4))
    pair = one_hot(predicted, 4), one_hot(true, 4)
    np.testing.assert_allclose(scores.dice, compute_dice(*pair)[0], rtol=1e-6)
    np.testing.assert_allclose(scores.iou, compute_iou(*pair)[0], rtol=1e-6)


def test_absent_in_one_is_zero_and_in_both_not_a_number():
    scores = dice_iou(confusion_matrix(np.array([0, 1]), np.array([0, 2]), 4))
    assert scores.dice[1] == scores.dice[2] == scores.iou[1] == scores.iou[2] == 0
    assert math.isnan(scores.dice[3])
    nothing = dice_iou(confusion_matrix(np.zeros(3, int), np.zeros(3, int), 2))
    assert math.isnan(nothing.mean_dice())
    assert nothing.mean_dice(with_background=True) == 1


@given(st.integers(0, 10**6))
def test_ignored_pixels_count_nowhere(seed):
    predicted, true = masks(seed)
    skip = np.random.default_rng(seed + 1).random(true.shape) < 0.3
    with_holes = np.where(skip, IGNORE, true).astype(np.uint8)
    expected = confusion_matrix(predicted[~skip], true[~skip], 4)
    assert np.array_equal(confusion_matrix(predicted, with_holes, 4), expected)
    assert expected.sum() == (~skip).sum()


def test_several_confusion_matrices_at_once():
    several = np.stack([confusion_matrix(*masks(seed), 4) for seed in range(3)])
    for confusion, dice, iou in zip(several, *vars(dice_iou(several)).values()):
        np.testing.assert_array_equal(dice_iou(confusion).dice, dice)
        np.testing.assert_array_equal(dice_iou(confusion).iou, iou)


def test_sizes_and_values_are_checked():
    with pytest.raises(UserError, match="2x3 and 3x2"):
        confusion_matrix(np.zeros((2, 3), int), np.zeros((3, 2), int), 2)
    with pytest.raises(UserError, match="predicted mask holds the values 0 to 4; 3 classes"):
        confusion_matrix(np.array([0, 4]), np.array([0, 1]), 3)
    with pytest.raises(UserError, match="true mask holds the values 0 to 7"):
        confusion_matrix(np.array([0, 1]), np.array([0, 7]), 3)
    with pytest.raises(UserError, match=f"predicted mask holds the values 0 to {IGNORE}"):
        confusion_matrix(np.array([0, IGNORE]), np.array([0, 0]), 3)


def test_nan_mean():
    assert nan_mean([1, float("nan"), 3]) == 2
    assert math.isnan(nan_mean([float("nan")]))


# (95 % Hausdorff, average symmetric surface distance) by MONAI 1.6.1 for the regions of
# default_rng(0) below, with spacing (2.0, 0.5).
MONAI_DISTANCES = [
    (2.0615527629852295, 0.7539369463920593),
    (2.0, 0.7777777910232544),
    (2.018465757369995, 0.6347360610961914),
]


def test_boundary_distances_are_those_of_monai():
    rng = np.random.default_rng(0)
    for expected in MONAI_DISTANCES:
        predicted, true = rng.random((12, 9)) < 0.3, rng.random((12, 9)) < 0.3
        assert boundary_distances(predicted, true, (2.0, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_boundary_distances_by_hand():
    true = np.zeros((20, 20), bool)
    true[5:10, 5:10] = True
    assert boundary_distances(true, true) == (0, 0)
    # One column moved by 4: 5 points at distance 4 each way.
    line, moved = np.zeros_like(true), np.zeros_like(true)
    line[5:10, 3], moved[5:10, 7] = True, True
    assert boundary_distances(line, moved) == (4, 4)
    assert boundary_distances(line, moved, (1, 0.5)) == (2, 2)
    assert all(math.isnan(v) for v in boundary_distances(true, np.zeros_like(true)))
    assert all(math.isnan(v) for v in boundary_distances(np.zeros_like(true), true))
