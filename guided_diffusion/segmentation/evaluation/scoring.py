"""Scores of predicted masks against true ones, over a set of radiographs."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guided_diffusion.images.decoded import PixelSize
from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.masks import count_classes
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import (
    BINARY,
    Category,
    ClassTable,
    categories_for,
    load_categories,
)
from guided_diffusion.segmentation.evaluation.calibration import Calibration, binary_prediction
from guided_diffusion.segmentation.evaluation.mask_pairs import MaskPair
from guided_diffusion.segmentation.evaluation.statistics import Intervals, bootstrap
from guided_diffusion.segmentation.metrics import (
    Scores,
    boundary_distances,
    confusion_matrix,
    dice_iou,
    nan_mean,
)

DISTANCES = ("hd95", "asd")
UNITS = ("px", "mm", "mm at the detector")


@dataclass
class ImageResult:
    """One image's confusion matrix and boundary distances.

    distances: (95 % Hausdorff, average surface distance) by unit of UNITS and class.
    """

    name: str
    confusion: np.ndarray
    distances: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)


@dataclass
class Evaluation:
    """The results for a set of predictions, from which all figures derive.

    calibration: if a model made the predictions. intervals: see `bootstrap`.
    """

    categories: tuple[Category, ...]
    results: list[ImageResult]
    calibration: Calibration | None = None
    intervals: Intervals | None = None

    def widen(self, count: int) -> None:
        """Extend to `count` classes, the last of which were in no mask, with generic names."""
        for result in self.results:
            result.confusion = np.pad(result.confusion, (0, count - len(result.confusion)))
        self.categories = categories_for(count)

    def bootstrap(self, draws: int, seed: int) -> None:
        """Compute the intervals, if there are several images to draw from."""
        if draws and len(self.results) > 1:
            confusions = [result.confusion for result in self.results]
            names = [category.name for category in self.categories]
            self.intervals = bootstrap(confusions, names, draws, seed)

    @property
    def confusion(self) -> np.ndarray:
        """Pixels of the whole set by true (row) and predicted (column) class, int64 [C x C]."""
        return np.sum([result.confusion for result in self.results], axis=0)

    def per_image(self) -> list[Scores]:
        return [dice_iou(result.confusion) for result in self.results]

    def units(self) -> list[str]:
        """The units in which any image has distances."""
        return [u for u in UNITS if any(u in result.distances for result in self.results)]

    def distance(self, unit: str, measure: int, index: int) -> float:
        """Mean over the images with this class in both masks.

        :param measure: index into DISTANCES.
        :param index: of the class.
        """
        found = (result.distances.get(unit, {}).get(index) for result in self.results)
        return nan_mean([pair[measure] for pair in found if pair])

    def summary(self) -> dict[str, Any]:
        """The contents of metrics.json; None stands for what has no score."""
        confusion = self.confusion
        scores, images = dice_iou(confusion), self.per_image()
        plain: dict[str, Any] = {
            "images": len(self.results),
            "pixels": int(confusion.sum()),
            **means(scores),
            "per_class": {
                c.name: {
                    "dice": scores.dice[c.index],
                    "iou": scores.iou[c.index],
                    "true_pixels": int(confusion[c.index].sum()),
                    "predicted_pixels": int(confusion[:, c.index].sum()),
                    "images": sum(bool(r.confusion[c.index].any()) for r in self.results),
                }
                for c in self.categories
            },
            "mean_over_images": {
                **{key: nan_mean([means(s)[key] for s in images]) for key in means(scores)},
                "per_class": {
                    c.name: {
                        "dice": nan_mean([s.dice[c.index] for s in images]),
                        "iou": nan_mean([s.iou[c.index] for s in images]),
                    }
                    for c in self.categories
                },
            },
            "classes": [c.name for c in self.categories],
            "confusion": confusion.tolist(),
        }
        for unit in self.units():
            per_class = {
                c.name: {m: self.distance(unit, i, c.index) for i, m in enumerate(DISTANCES)}
                for c in self.categories[1:]
            }
            averages = {
                f"mean_{m}": nan_mean([values[m] for values in per_class.values()])
                for m in DISTANCES
            }
            plain[f"distances_{identifier(unit)}"] = {**averages, "per_class": per_class}
        if self.calibration:
            plain["calibration"] = self.calibration.summary()
        if self.intervals:
            plain["intervals"] = self.intervals
        return without_nan(plain)


def evaluate(
    pairs: Iterable[MaskPair],
    categories: tuple[Category, ...] | None,
    binary: bool = False,
    surface: bool = False,
    on_image: Callable[[MaskPair, ImageResult], None] | None = None,
) -> Evaluation:
    """Compare masks pair by pair.

    :param categories: the class table; None for as many classes as the masks turn out to hold.
    :param binary: all foreground classes are joined into one.
    :param surface: measure distances between boundaries too.
    :param on_image: called after each image, with the masks as they were compared.
    """
    results = []
    calibration = Calibration()
    categories = BINARY if binary else categories
    for pair in pairs:
        if binary:
            pair = _binary(pair)
        predicted, true = pair.predicted, pair.true
        count = len(categories) if categories else _count(predicted, true)
        try:
            result = ImageResult(pair.name, confusion_matrix(predicted, true, count))
        except UserError as error:
            raise UserError(f"{pair.name}: {error}") from error
        if surface:
            result.distances = _distances(predicted, true, pair.spacing)
        if pair.prediction:
            calibration.add(pair.prediction, true, dice_iou(result.confusion).mean_dice())
        results.append(result)
        if on_image:
            on_image(pair, result)
    evaluation = Evaluation(categories or (), results)
    if not evaluation.categories:
        present = [r.confusion.any(axis=0) | r.confusion.any(axis=1) for r in results]
        seen = {int(i) for shown in present for i in np.flatnonzero(shown)}
        evaluation.widen(count_classes(seen, "--num_classes"))
    if calibration.images:
        evaluation.calibration = calibration
    return evaluation


def _count(*masks: np.ndarray) -> int:
    """One more than the highest class in any mask."""
    return 1 + max(int(np.where(mask == IGNORE, 0, mask).max()) for mask in masks)


def _binary(pair: MaskPair) -> MaskPair:
    """The pair with all foreground classes joined into one."""
    joined = [
        np.where(mask == IGNORE, IGNORE, mask > 0).astype(np.uint8)
        for mask in (pair.predicted, pair.true)
    ]
    return dataclasses.replace(
        pair,
        predicted=joined[0],
        true=joined[1],
        prediction=pair.prediction and binary_prediction(pair.prediction),
    )


def _distances(
    predicted: np.ndarray, true: np.ndarray, spacing: PixelSize | None
) -> dict[str, dict[int, tuple[float, float]]]:
    predicted = np.where(true == IGNORE, 0, predicted)  # what is not labelled does not count
    common = [int(i) for i in np.intersect1d(predicted, true) if i > 0]
    units: dict[str, tuple[float, float]] = {"px": (1.0, 1.0)}
    if spacing:
        units["mm at the detector" if spacing.at_detector else "mm"] = spacing
    return {
        unit: {i: boundary_distances(predicted == i, true == i, size) for i in common}
        for unit, size in units.items()
    }


def identifier(unit: str) -> str:
    """A unit as part of a name in metrics.json and per_image.csv."""
    return unit.replace(" ", "_")


def choose_categories(path: str | None, num_classes: int | None) -> ClassTable | None:
    """The class table that the flags determine; None leaves it to the masks."""
    if num_classes is not None:
        return categories_for(num_classes, path)
    return load_categories(path) if path else None


def means(scores: Scores) -> dict[str, float]:
    """The means of one image or set, under their names in metrics.json."""
    return {
        "mean_dice": scores.mean_dice(),
        "mean_iou": scores.mean_iou(),
        "mean_dice_with_background": scores.mean_dice(with_background=True),
        "mean_iou_with_background": scores.mean_iou(with_background=True),
    }


def without_nan(value: Any) -> Any:
    """Plain values with None for nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    return value
