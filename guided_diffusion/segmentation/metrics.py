"""Agreement of predicted and true index masks: Dice, IoU, distances between boundaries.

A class in neither mask has no score: nan here, null in JSON, "n/a" on screen; means skip it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch as th

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.runtime.errors import UserError


@dataclass(frozen=True)
class Scores:
    """Dice and IoU per class, float64 [C], 0 to 1 or nan; class 0 is the background."""

    dice: np.ndarray
    iou: np.ndarray

    def mean_dice(self, with_background: bool = False) -> float:
        """Mean Dice over the classes that have one."""
        return nan_mean(self.dice if with_background else self.dice[1:])

    def mean_iou(self, with_background: bool = False) -> float:
        """Mean IoU over the classes that have one."""
        return nan_mean(self.iou if with_background else self.iou[1:])


def nan_mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the values that are not nan; nan if there are none."""
    scores = np.asarray(values, dtype=np.float64)
    scores = scores[~np.isnan(scores)]
    return float(scores.mean()) if scores.size else float("nan")


def confusion_matrix(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pixels, int64 [C x C], by true class (row) and predicted class (column).

    :param predicted: class indices [H x W], or of any shape.
    :param true: of the same shape; pixels that are IGNORE here are not counted.
    :raises UserError: if shapes differ or an index is not a class.
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape:
        sizes = " and ".join("x".join(map(str, mask.shape)) for mask in (predicted, true))
        raise UserError(f"predicted and true mask differ in size: {sizes} (height x width)")
    known = true != IGNORE
    predicted, true = predicted[known].astype(np.int64), true[known].astype(np.int64)
    for name, mask in (("predicted", predicted), ("true", true)):
        if mask.size and not 0 <= mask.min() <= mask.max() < num_classes:
            raise UserError(
                f"the {name} mask holds the values {mask.min()} to {mask.max()}; "
                f"{num_classes} classes allow 0 to {num_classes - 1}"
            )
    counts = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def dice_iou(confusion: np.ndarray) -> Scores:
    """Dice 2|A.B| / (|A| + |B|) and IoU |A.B| / |A+B| of each class of a confusion matrix.

    :param confusion: [C x C], or several as [... x C x C], which gives scores [... x C].
    """
    both = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    sizes = (confusion.sum(axis=-2) + confusion.sum(axis=-1)).astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan, as it should be
        return Scores(2 * both / sizes, both / (sizes - both))


def present_scores(confusion: np.ndarray) -> Scores:
    """Scores `[C]` as of `dice_iou`, but nan for the classes that no true mask shows.

    With those, a single wrong pixel would lower a mean as much as a class missed altogether.
    """
    scores, absent = dice_iou(confusion), confusion.sum(axis=-1) == 0
    return Scores(np.where(absent, np.nan, scores.dice), np.where(absent, np.nan, scores.iou))


def boundary_distances(
    predicted: np.ndarray, true: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float]:
    """(95 % Hausdorff distance, average symmetric surface distance) of two regions, by MONAI.

    The boundary of a region consists of the pixels with one of their four neighbours outside the
    region or outside the picture. The first measure is the greater of the two directions' 95th
    percentiles, the second the mean over the points of both boundaries.

    :param predicted: bool [H x W].
    :param true: bool [H x W].
    :param spacing: height and width of a pixel; the distances have its unit.
    :return: (nan, nan) if either region is empty.
    """
    if not predicted.any() or not true.any():
        return float("nan"), float("nan")
    # importing monai takes seconds
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    one, other = (th.from_numpy(region)[None, None].float() for region in (predicted, true))
    sides = [float(side) for side in spacing]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own, about itself
        hausdorff = compute_hausdorff_distance(
            one, other, include_background=True, percentile=95, spacing=sides
        )
        average = compute_average_surface_distance(
            one, other, include_background=True, symmetric=True, spacing=sides
        )
    return float(hausdorff), float(average)
