"""Do guided images show what their masks say? A segmentation model looks, and says where not."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import read_json, save_json, write_atomically
from guided_diffusion.sampling.folder import SETTINGS_NAME
from guided_diffusion.sampling.pictures import image_grid, write_png
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.evaluation.mask_pairs import MaskPair, predict_mask_pairs
from guided_diffusion.segmentation.evaluation.scoring import Evaluation, evaluate
from guided_diffusion.segmentation.evaluation.text import per_image_csv
from guided_diffusion.segmentation.inference.predictor import Predictor
from guided_diffusion.segmentation.visuals.render import comparison, plot_confusion

# images in the picture of the worst
_WORST = 8


@dataclass(frozen=True)
class GuidedImages:
    """What image_sample.py --seg_dir wrote.

    images, masks: the folders. left_open: classes that guided no image, which may be anywhere.
    """

    images: str
    masks: str
    left_open: tuple[int, ...] = ()

    @classmethod
    def in_folder(cls, folder: str) -> "GuidedImages":
        """:raises UserError: if it is no such folder."""
        images, masks = (os.path.join(folder, part) for part in ("IMG", "MASK"))
        if not os.path.isdir(images) or not os.path.isdir(masks):
            raise UserError(
                f"{folder} holds no folders IMG and MASK: name what image_sample.py --seg_dir wrote"
            )
        settings = os.path.join(folder, SETTINGS_NAME)
        record = read_json(settings) if os.path.exists(settings) else {}
        return cls(images, masks, tuple(record.get("images", {}).get("ablate_classes", ())))


@dataclass
class Failures:
    """Where the images of one size do not show what their masks ask for.

    asked, missing: pixels of each class, and those of them where the model sees another; added:
    pixels where it sees a class that was not asked for; int64 `[C x H x W]`, counted over images.
    """

    classes: int
    asked: np.ndarray | None = None
    missing: np.ndarray | None = None
    added: np.ndarray | None = None
    sizes: set[tuple[int, int]] = field(default_factory=set)

    def add(self, predicted: np.ndarray, true: np.ndarray) -> None:
        self.sizes.add(true.shape)
        if len(self.sizes) > 1:
            return
        if self.asked is None:
            shape = (self.classes, *true.shape)
            self.asked, self.missing, self.added = (np.zeros(shape, np.int64) for _ in range(3))
        numbers = np.arange(self.classes)[:, None, None]
        wanted, seen = true == numbers, predicted == numbers
        self.asked += wanted
        self.missing += wanted & ~seen
        self.added += seen & ~wanted

    def picture(self, categories: Sequence[Category]) -> np.ndarray | None:
        """A column a foreground class: where it is missing, and where it is too much.

        Brightness is the share of the images that ask for the class there, or that do not, in
        which the model sees otherwise. None where images differ in size.
        """
        if len(self.sizes) != 1:
            return None
        missing = self.missing / np.maximum(self.asked, 1)
        added = self.added / np.maximum(self.asked.sum(0) - self.asked, 1)
        cells = np.rint(255 * np.concatenate([missing[1:], added[1:]])).astype(np.uint8)
        captions = [f"{name} {c.name}" for name in ("missing", "added") for c in categories[1:]]
        return image_grid(cells[..., None], captions, columns=len(categories) - 1)


@dataclass(frozen=True)
class Faithfulness:
    """What a segmentation model sees in guided images, against their masks."""

    evaluation: Evaluation
    failures: Failures
    source: GuidedImages

    def per_class(self) -> list[dict[str, Any]]:
        """How each foreground class that guided fails, as plain values.

        missing: share of the asked pixels where the model sees another class; instead: the one that
        it mostly sees there; added: pixels too much, as a share of the asked; worst: the image with
        the lowest Dice of the class, and that Dice.
        """
        confusion = self.evaluation.confusion
        scores = self.evaluation.per_image()
        found = []
        for c in self.evaluation.categories[1:]:
            asked = int(confusion[c.index].sum())
            if c.index in self.source.left_open or not asked:
                continue
            wrong = confusion[c.index].copy()
            wrong[c.index] = 0
            dice = [
                score.dice[c.index] if result.confusion[c.index].any() else np.inf
                for score, result in zip(scores, self.evaluation.results)
            ]
            worst = int(np.argmin(dice))
            found.append(
                {
                    "class": c.name,
                    "missing": float(wrong.sum() / asked),
                    "instead": self.evaluation.categories[int(wrong.argmax())].name,
                    "added": float((confusion[:, c.index].sum() - asked + wrong.sum()) / asked),
                    "worst": self.evaluation.results[worst].name,
                    "worst_dice": float(dice[worst]),
                }
            )
        return found

    def lines(self) -> list[str]:
        """`per_class` for the screen."""
        return [
            f"{row['class']}: {row['missing']:.1%} of what was asked for is missing (mostly"
            f" {row['instead']} instead), {row['added']:.1%} added; worst in {row['worst']}, Dice"
            f" {row['worst_dice']:.3f}"
            for row in self.per_class()
        ]

    def worst(self) -> list[str]:
        """Names of the images with the lowest mean Dice, lowest first."""
        means = [score.mean_dice() for score in self.evaluation.per_image()]
        order = np.argsort(np.nan_to_num(means, nan=2.0), kind="stable")
        return [self.evaluation.results[i].name for i in order[:_WORST]]

    def write(self, folder: str, predictor: Predictor) -> None:
        """Write metrics.json, per_image.csv, confusion.png, where.png and worst.png."""
        failures = {"left_open": list(self.source.left_open), "failures": self.per_class()}
        record = {**self.evaluation.summary(), **failures}
        save_json(os.path.join(folder, "metrics.json"), record)
        table = per_image_csv(self.evaluation).encode()
        path = os.path.join(folder, "per_image.csv")
        write_atomically(path, lambda file: file.write(table))
        confusion = os.path.join(folder, "confusion.png")
        plot_confusion(self.evaluation.confusion, self.evaluation.categories, confusion)
        categories = self.evaluation.categories
        where = self.failures.picture(categories)
        if where is not None:
            write_png(os.path.join(folder, "where.png"), where)
        images, masks = [], []
        for name in self.worst():
            folders = (self.source.images, self.source.masks)
            path, true_path = (os.path.join(folder, f"{name}.png") for folder in folders)
            pair = next(iter(predict_mask_pairs(predictor, path, true_path)))
            pair = _without(pair, self.source.left_open)
            images.append(predictor.read(path))
            wrong = np.where(pair.predicted == pair.true, 0, pair.true)
            masks.append((pair.true, pair.predicted, wrong.astype(np.uint8)))
        if len({image.shape for image in images}) == 1:
            write_png(os.path.join(folder, "worst.png"), comparison(images, masks, categories))


def look(predictor: Predictor, source: GuidedImages) -> Faithfulness:
    """Segment the images and compare with the masks that guided them.

    :raises UserError: if the masks hold classes that it does not know.
    """
    failures = Failures(len(predictor.categories))
    pairs = predict_mask_pairs(predictor, source.images, source.masks)
    watched = _watched(pairs, failures, source.left_open)
    return Faithfulness(evaluate(watched, predictor.categories), failures, source)


def _watched(
    pairs: Iterable[MaskPair], failures: Failures, left_open: Sequence[int]
) -> Iterator[MaskPair]:
    for pair in pairs:
        pair = _without(pair, left_open)
        failures.add(pair.predicted, pair.true)
        yield pair


def _without(pair: MaskPair, left_open: Sequence[int]) -> MaskPair:
    """As if the model knew no such classes: where nothing was asked for they are no mistake."""
    predicted = np.where(np.isin(pair.predicted, left_open), 0, pair.predicted).astype(np.uint8)
    return dataclasses.replace(pair, predicted=predicted)
