"""How well predicted index masks agree with true ones: Dice, IoU, distances between boundaries.

A class that is in neither mask has no score: nan here, null in JSON, "n/a" on screen; means skip
it.
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
    """The mean of what is not nan; nan where nothing is left."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def confusion_matrix(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pixels, int64 [C x C], by true class (row) and predicted class (column).

    :param predicted: class indices [H x W], or of any shape.
    :param true: the same shape; pixels that are IGNORE here count nowhere.
    :raises UserError: for shapes that differ and for indices of no class.
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


def join_foreground(confusion: np.ndarray) -> np.ndarray:
    """The [2 x 2] confusion matrix of background against everything else."""
    joined = np.empty((2, 2), dtype=confusion.dtype)
    joined[0, 0] = confusion[0, 0]
    joined[0, 1] = confusion[0, 1:].sum()
    joined[1, 0] = confusion[1:, 0].sum()
    joined[1, 1] = confusion[1:, 1:].sum()
    return joined


def boundary_distances(
    predicted: np.ndarray, true: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float]:
    """(95 % Hausdorff distance, average symmetric surface distance) of two regions, by MONAI.

    The boundary of a region is those of its pixels that have one of their four neighbours outside,
    or outside the picture. The first measure is the greater of the two directions' 95th
    percentiles, the second the mean over both boundaries' points.

    :param predicted: bool [H x W].
    :param true: bool [H x W].
    :param spacing: size of a pixel (height, width); the distances have its unit.
    :return: (nan, nan) where either region is empty.
    """
    if not predicted.any() or not true.any():
        return float("nan"), float("nan")
    # importing monai takes seconds
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    pair = [th.from_numpy(region)[None, None].float() for region in (predicted, true)]
    options = {"include_background": True, "spacing": [float(side) for side in spacing]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own, about itself
        hausdorff = compute_hausdorff_distance(*pair, percentile=95, **options)
        average = compute_average_surface_distance(*pair, symmetric=True, **options)
    return float(hausdorff), float(average)
