"""Predicted masks against true ones, over a set of radiographs: table, metrics.json, CSV."""

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from guided_diffusion.checkpoint import save_json, write_atomically
from guided_diffusion.errors import UserError
from guided_diffusion.image_io import pair_files, pixel_spacing, read_mask
from guided_diffusion.segmentation.categories import Category, categories_for, load_categories
from guided_diffusion.segmentation.metrics import (
    Scores,
    boundary_distances,
    confusion_matrix,
    dice_iou,
    nan_mean,
)
from guided_diffusion.segmentation.render import plot_confusion

BINARY = (Category(0, "background", (0, 0, 0)), Category(1, "foreground", (255, 0, 0)))
DISTANCES = ("hd95", "asd")


@dataclass(frozen=True)
class MaskPair:
    """One radiograph's masks, uint8 [H x W], and its pixels' size in mm (height, width)."""

    name: str
    predicted: np.ndarray
    true: np.ndarray
    spacing: tuple[float, float] | None = None


@dataclass
class ImageResult:
    """`distances` by unit ("px", "mm") and class: (95 % Hausdorff, average surface distance)."""

    name: str
    confusion: np.ndarray
    distances: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What is known of a set of predictions; all figures derive from these."""

    categories: tuple[Category, ...]
    results: list[ImageResult]

    @property
    def confusion(self) -> np.ndarray:
        """Pixels of the whole set, int64 [C x C], by true (row) and predicted (column) class."""
        return np.sum([result.confusion for result in self.results], axis=0)

    def per_image(self) -> list[Scores]:
        return [dice_iou(result.confusion) for result in self.results]

    def units(self) -> list[str]:
        """Units in which any image has distances."""
        return [u for u in ("px", "mm") if any(u in result.distances for result in self.results)]

    def distance(self, unit: str, measure: int, index: int) -> float:
        """Mean over the images that have this class in both masks."""
        found = (result.distances.get(unit, {}).get(index) for result in self.results)
        return nan_mean([pair[measure] for pair in found if pair])

    def summary(self) -> dict[str, Any]:
        """Everything as plain values, with None for what has no score."""
        confusion = self.confusion
        scores, images = dice_iou(confusion), self.per_image()
        plain = {
            "images": len(self.results),
            "pixels": int(confusion.sum()),
            **_means(scores),
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
                **{key: nan_mean([_means(s)[key] for s in images]) for key in _means(scores)},
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
            means = {
                f"mean_{m}": nan_mean([values[m] for values in per_class.values()])
                for m in DISTANCES
            }
            plain[f"distances_{unit}"] = {**means, "per_class": per_class}
        return _without_nan(plain)

    def table(self) -> str:
        """For the screen: a line a class, then the means."""
        confusion = self.confusion
        scores, images = dice_iou(confusion), self.per_image()
        units = self.units()
        header = ["class", "Dice", "IoU", "Dice/image", "IoU/image", "images", "true %"]
        header += [f"{m.upper()} {unit}" for unit in units for m in DISTANCES]
        rows = []
        for c in self.categories:
            row = [c.name, _show(scores.dice[c.index]), _show(scores.iou[c.index])]
            row += [_show(nan_mean([s.dice[c.index] for s in images]))]
            row += [_show(nan_mean([s.iou[c.index] for s in images]))]
            row += [str(sum(bool(r.confusion[c.index].any()) for r in self.results))]
            row += [f"{100 * confusion[c.index].sum() / max(confusion.sum(), 1):.2f}"]
            row += [
                _show(self.distance(unit, i, c.index) if c.index else math.nan, digits=2)
                for unit in units
                for i in range(len(DISTANCES))
            ]
            rows.append(row)
        for label, background in (("mean of the foreground", False), ("with background", True)):
            row = [label, _show(scores.mean_dice(background)), _show(scores.mean_iou(background))]
            row += [_show(nan_mean([s.mean_dice(background) for s in images]))]
            row += [_show(nan_mean([s.mean_iou(background) for s in images]))]
            row += [str(len(self.results)), ""]
            if not background:
                indices = [c.index for c in self.categories[1:]]
                row += [
                    _show(nan_mean([self.distance(unit, i, k) for k in indices]), digits=2)
                    for unit in units
                    for i in range(len(DISTANCES))
                ]
            rows.append(row + [""] * (len(header) - len(row)))
        return _align([header, *rows[: len(self.categories)], None, *rows[len(self.categories) :]])

    def write(self, folder: str) -> dict[str, bool]:
        """Write metrics.json, per_image.csv and confusion.png; older ones are replaced whole.

        :return: for each path whether there was one before.
        """
        prepare_output(folder)
        metrics, table, picture = (
            os.path.join(folder, name)
            for name in ("metrics.json", "per_image.csv", "confusion.png")
        )
        replaced = {path: os.path.exists(path) for path in (metrics, table, picture)}
        save_json(metrics, self.summary())
        text = self._per_image_csv().encode()
        write_atomically(table, lambda file: file.write(text))
        plot_confusion(self.confusion, self.categories, picture)
        return replaced

    def _per_image_csv(self) -> str:
        classes = [c.name for c in self.categories]
        header = ["name", *_means(dice_iou(self.confusion))]
        header += [f"{kind}_{name}" for kind in ("dice", "iou") for name in classes]
        header += [
            f"{m}_{u}_{name}" for u in self.units() for m in DISTANCES for name in classes[1:]
        ]
        rows = []
        for result, scores in zip(self.results, self.per_image()):
            values = [*_means(scores).values(), *scores.dice, *scores.iou]
            values += [
                result.distances.get(unit, {}).get(c.index, (math.nan, math.nan))[i]
                for unit in self.units()
                for i in range(len(DISTANCES))
                for c in self.categories[1:]
            ]
            rows.append([result.name, *(_show(v, digits=6) for v in values)])
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        return text.getvalue()


def evaluate(
    pairs: Iterable[MaskPair],
    categories: tuple[Category, ...] | None,
    binary: bool = False,
    surface: bool = False,
) -> Evaluation:
    """Compare mask after mask.

    :param categories: the class table; None: as many classes as the masks turn out to hold.
    :param binary: every value but 0 is foreground, in both masks.
    :param surface: measure distances between boundaries too.
    """
    results = []
    for pair in pairs:
        predicted, true = pair.predicted, pair.true
        if binary:
            predicted, true = (predicted > 0).astype(np.uint8), (true > 0).astype(np.uint8)
            count = 2
        else:
            count = len(categories) if categories else int(max(predicted.max(), true.max())) + 1
        try:
            result = ImageResult(pair.name, confusion_matrix(predicted, true, count))
        except UserError as error:
            raise UserError(f"{pair.name}: {error}") from error
        if surface:
            result.distances = _distances(predicted, true, pair.spacing)
        results.append(result)
    if binary:
        categories = BINARY
    elif categories is None:
        count = max(2, *(len(result.confusion) for result in results))
        for result in results:
            missing = count - len(result.confusion)
            result.confusion = np.pad(result.confusion, (0, missing))
        categories = categories_for(count)
    return Evaluation(categories, results)


def _distances(
    predicted: np.ndarray, true: np.ndarray, spacing: tuple[float, float] | None
) -> dict[str, dict[int, tuple[float, float]]]:
    common = [int(i) for i in np.intersect1d(predicted, true) if i > 0]
    units = {"px": (1.0, 1.0)} | ({"mm": spacing} if spacing else {})
    return {
        unit: {i: boundary_distances(predicted == i, true == i, size) for i in common}
        for unit, size in units.items()
    }


def read_mask_pairs(
    predictions: str,
    truths: str,
    num_classes: int | None,
    binary: bool = False,
    spacing: tuple[float, float] | None = None,
) -> Iterator[MaskPair]:
    """The masks of two folders, or of two files, paired by name.

    A folder that predict.py wrote may be given as it is: its MASK folder is meant.
    """
    if os.path.isdir(os.path.join(predictions, "MASK")):
        predictions = os.path.join(predictions, "MASK")
    for name, predicted_path, true_path in _progress(pair_paths(predictions, truths)):
        masks = [read_true_mask(p, num_classes, binary) for p in (predicted_path, true_path)]
        _same_size(predicted_path, masks[0], true_path, masks[1])
        yield MaskPair(name, *masks, pixel_spacing(true_path) or spacing)


def predict_mask_pairs(
    predictor: Any,
    images: str,
    truths: str,
    binary: bool = False,
    spacing: tuple[float, float] | None = None,
) -> Iterator[MaskPair]:
    """A model's predictions for radiographs that have masks.

    :param predictor: see `predict.load_predictor`.
    """
    for name, image_path, true_path in _progress(pair_paths(images, truths)):
        true = read_true_mask(true_path, len(predictor.categories), binary)
        predicted = predictor.probabilities(image_path).argmax(axis=0).astype(np.uint8)
        _same_size(image_path, predicted, true_path, true)
        yield MaskPair(name, predicted, true, pixel_spacing(image_path) or spacing)


def read_true_mask(path: str, num_classes: int | None, binary: bool) -> np.ndarray:
    """A mask of class indices; where only "binary" matters any value is fine."""
    if binary:
        return read_mask(path)
    mask = read_mask(path, num_classes)
    if num_classes is None and mask.max() == 255:
        raise UserError(
            f"{path} holds the value 255, which no class has. A black-and-white mask? Compare with "
            "--binary True, or convert it with tools/prepare_data.py --action validate --fix-issues"
        )
    return mask


def pair_paths(first: str, second: str) -> list[tuple[str, str, str]]:
    """(name, path, path) of two folders' files, or of two files whatever their names."""
    for path in (first, second):
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist")
    if os.path.isfile(first) and os.path.isfile(second):
        return [(os.path.splitext(os.path.basename(second))[0], first, second)]
    if os.path.isfile(first) or os.path.isfile(second):
        raise UserError(f"{first} and {second}: give two folders or two files")
    return pair_files(first, second)


def choose_categories(path: str | None, num_classes: int | None) -> tuple[Category, ...] | None:
    """The class table as far as the flags tell; None: the masks must."""
    if num_classes is not None:
        return categories_for(num_classes, path)
    return load_categories(path) if path else None


def prepare_output(folder: str) -> None:
    """Make the folder for the results; said before long work where it cannot be."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be a folder: {error.strerror}") from error


def _same_size(first: str, one: np.ndarray, second: str, other: np.ndarray) -> None:
    if one.shape != other.shape:
        sizes = ["x".join(map(str, mask.shape)) for mask in (one, other)]
        raise UserError(
            f"{first} is {sizes[0]} and {second} {sizes[1]} pixels (height x width); "
            "masks must have the size of their radiograph"
        )


def _progress(pairs: Sequence) -> Iterable:
    return tqdm(pairs, desc="evaluating", unit="image", disable=None, leave=False)


def _means(scores: Scores) -> dict[str, float]:
    return {
        "mean_dice": scores.mean_dice(),
        "mean_iou": scores.mean_iou(),
        "mean_dice_with_background": scores.mean_dice(with_background=True),
        "mean_iou_with_background": scores.mean_iou(with_background=True),
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    return value


def _show(value: float, digits: int = 4) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def _align(rows: Sequence[Sequence[str] | None]) -> str:
    """Columns of equal width, numbers to the right; None becomes a rule."""
    columns = zip(*(row for row in rows if row))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        if row is None:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
            continue
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
