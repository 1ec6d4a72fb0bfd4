"""Whether guided images show what their masks ask for, by a segmentation model's predictions."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.images.image_io import write_image
from guided_diffusion.networks.precision import choose_for
from guided_diffusion.runtime import messages
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage.files import check_output, read_sections, save_json
from guided_diffusion.sampling.folder import SETTINGS_NAME
from guided_diffusion.sampling.pictures import image_grid
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.evaluation.config import GuidanceConfig
from guided_diffusion.segmentation.evaluation.mask_pairs import MaskPair, predict_mask_pairs
from guided_diffusion.segmentation.evaluation.scoring import (
    Evaluation,
    evaluate,
)
from guided_diffusion.segmentation.evaluation.tables import table, write_per_image
from guided_diffusion.segmentation.inference.predictor import Segmenter, load_predictor
from guided_diffusion.segmentation.visuals.render import comparison, plot_confusion

# number of images in worst.png
_WORST = 8


@dataclass(frozen=True)
class GuidedImages:
    """The output of image_sample.py --seg_dir.

    images, masks: the folders. left_open: classes that guided no image, and may appear anywhere.
    """

    images: str
    masks: str
    left_open: tuple[int, ...] = ()

    @classmethod
    def in_folder(cls, folder: str) -> "GuidedImages":
        """:raises UserError: if the folder is not such an output."""
        images, masks = (os.path.join(folder, part) for part in ("IMG", "MASK"))
        if not os.path.isdir(images) or not os.path.isdir(masks):
            raise UserError(
                f"{folder} holds no folders IMG and MASK: give an output folder of image_sample.py "
                "--seg_dir"
            )
        settings = os.path.join(folder, SETTINGS_NAME)
        record = read_sections(settings, "images") if os.path.exists(settings) else {"images": {}}
        return cls(images, masks, tuple(record["images"].get("ablate_classes") or ()))


@dataclass
class Failures:
    """Where images of one size do not show what their masks ask for.

    asked, missing: pixels of each class, and those of them where the model sees another; added:
    pixels where it sees a class that was not asked for; int64 `[C x H x W]`, counted over images.
    """

    classes: int
    asked: np.ndarray = field(init=False)
    missing: np.ndarray = field(init=False)
    added: np.ndarray = field(init=False)
    sizes: set[tuple[int, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        # broadcast to the images' size by the first image
        self.asked = self.missing = self.added = np.zeros((self.classes, 1, 1), np.int64)

    def add(self, predicted: np.ndarray, true: np.ndarray) -> None:
        self.sizes.add(true.shape)
        if len(self.sizes) > 1:
            return
        numbers = np.arange(self.classes)[:, None, None]
        wanted, seen = true == numbers, predicted == numbers
        self.asked = self.asked + wanted
        self.missing = self.missing + (wanted & ~seen)
        self.added = self.added + (seen & ~wanted)

    def picture(self, categories: Sequence[Category]) -> np.ndarray | None:
        """One column per foreground class: where it is missing, and where it is added.

        Brightness is the share of the images that ask for the class there, or that do not, in
        which the model sees otherwise. None if images differ in size.
        """
        if len(self.sizes) != 1:
            return None
        missing = self.missing / np.maximum(self.asked, 1)
        added = self.added / np.maximum(self.asked.sum(0) - self.asked, 1)
        cells = np.rint(255 * np.concatenate([missing[1:], added[1:]])).astype(np.uint8)
        captions = [f"{name} {c.name}" for name in ("missing", "added") for c in categories[1:]]
        return image_grid(cells[..., None], captions, columns=len(categories) - 1)


# missing: share of the asked pixels where the model sees another class; instead: the one that it
# mostly sees there; added: pixels too many, as a share of the asked; worst: the image with the
# lowest Dice of the class, and that Dice
ClassFailure = TypedDict(
    "ClassFailure",
    {
        "class": str,
        "missing": float,
        "instead": str,
        "added": float,
        "worst": str,
        "worst_dice": float,
    },
)


@dataclass(frozen=True)
class Faithfulness:
    """What a segmentation model sees in guided images, compared with their masks."""

    evaluation: Evaluation
    failures: Failures
    source: GuidedImages

    def per_class(self) -> list[ClassFailure]:
        """How each foreground class that guided images fails."""
        confusion = self.evaluation.confusion
        scores = self.evaluation.per_image()
        found: list[ClassFailure] = []
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
            f"{row['class']}: {row['missing']:.1%} of the asked pixels missing (mostly"
            f" {row['instead']} instead), {row['added']:.1%} added; worst in {row['worst']}, Dice"
            f" {row['worst_dice']:.3f}"
            for row in self.per_class()
        ]

    def worst(self) -> list[str]:
        """Names of the images with the lowest mean Dice, lowest first."""
        means = [score.mean_dice() for score in self.evaluation.per_image()]
        order = np.argsort(np.nan_to_num(means, nan=2.0), kind="stable")
        return [self.evaluation.results[i].name for i in order[:_WORST]]

    def write(self, folder: str, predictor: Segmenter) -> None:
        """Write metrics.json, per_image.csv, confusion.png, where.png and worst.png."""
        failures = {"left_open": list(self.source.left_open), "failures": self.per_class()}
        record = {**self.evaluation.summary(), **failures}
        save_json(os.path.join(folder, "metrics.json"), record)
        write_per_image(os.path.join(folder, "per_image.csv"), self.evaluation)
        confusion = os.path.join(folder, "confusion.png")
        plot_confusion(self.evaluation.confusion, self.evaluation.categories, confusion)
        categories = self.evaluation.categories
        where = self.failures.picture(categories)
        if where is not None:
            write_image(os.path.join(folder, "where.png"), where)
        images, masks = [], []
        rule = predictor.categories.mask_rule()
        for name in self.worst():
            folders = (self.source.images, self.source.masks)
            path, true_path = (os.path.join(folder, f"{name}.png") for folder in folders)
            pair = next(iter(predict_mask_pairs(predictor, path, true_path, rule)))
            pair = _without(pair, self.source.left_open)
            images.append(predictor.read(path))
            wrong = np.where(pair.predicted == pair.true, 0, pair.true)
            masks.append((pair.true, pair.predicted, wrong.astype(np.uint8)))
        if len({image.shape for image in images}) == 1:
            write_image(os.path.join(folder, "worst.png"), comparison(images, masks, categories))


def evaluate_guidance(config: GuidanceConfig, model: str, folder: str) -> None:
    """The whole command.

    :param model: a segmentation model, or several separated by commas.
    :param folder: the output of image_sample.py --seg_dir.
    """
    device = dist_util.open_device()
    precision, note = choose_for(device, config.precision)
    output = config.output or f"{folder}/faithfulness"
    check_output(output, folder=True)
    source = GuidedImages.in_folder(folder)
    if note:
        say(note)
    predictor = load_predictor(model, device, precision=precision)
    messages.begin_work()
    result = compare_with_masks(predictor, source)
    print(table(result.evaluation))
    if source.left_open:
        names = ", ".join(predictor.categories[i].name for i in source.left_open)
        print(f"unspecified in sampling, and not counted: {names}")
    print("\n".join(result.lines()))
    result.write(output, predictor)
    print(f"tables and pictures: {output}")


def compare_with_masks(predictor: Segmenter, source: GuidedImages) -> Faithfulness:
    """Segment the images and compare the results with the masks that guided them.

    :raises UserError: if the masks hold classes that the model does not know.
    """
    failures = Failures(len(predictor.categories))
    pairs = predict_mask_pairs(
        predictor, source.images, source.masks, predictor.categories.mask_rule()
    )
    counted = _count_failures(pairs, failures, source.left_open)
    return Faithfulness(evaluate(counted, predictor.categories), failures, source)


def _count_failures(
    pairs: Iterable[MaskPair], failures: Failures, left_open: Sequence[int]
) -> Iterator[MaskPair]:
    for pair in pairs:
        pair = _without(pair, left_open)
        failures.add(pair.predicted, pair.true)
        yield pair


def _without(pair: MaskPair, left_open: Sequence[int]) -> MaskPair:
    """The pair without the unspecified classes, which do not count as errors."""
    predicted = np.where(np.isin(pair.predicted, left_open), 0, pair.predicted).astype(np.uint8)
    return dataclasses.replace(pair, predicted=predicted)
