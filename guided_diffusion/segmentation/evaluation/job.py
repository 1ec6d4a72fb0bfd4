"""What scripts/evaluate.py does: figures of one set of predictions, or a comparison of two."""

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from guided_diffusion.images.files import IMAGE_EXTENSIONS
from guided_diffusion.images.image_io import read_image
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import save_json, write_atomically
from guided_diffusion.runtime.flags import flag
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.evaluation import calibration_plots
from guided_diffusion.segmentation.evaluation.mask_pairs import (
    MaskPair,
    predict_mask_pairs,
    read_mask_pairs,
)
from guided_diffusion.segmentation.evaluation.scoring import (
    DISTANCES,
    Evaluation,
    ImageResult,
    choose_categories,
    evaluate,
    prepare_output,
    without_nan,
)
from guided_diffusion.segmentation.evaluation.statistics import Difference, compare
from guided_diffusion.segmentation.evaluation.text import (
    comparison_table,
    intervals_table,
    per_image_csv,
    table,
)
from guided_diffusion.segmentation.inference.job import AveragingConfig
from guided_diffusion.segmentation.metrics import dice_iou
from guided_diffusion.segmentation.visuals.render import plot_confusion
from guided_diffusion.segmentation.visuals.report import Card, Report, make_card


@dataclass(frozen=True)
class EvaluateConfig:
    """What to compare, and how"""

    TITLE = "Evaluation"

    model: str = flag("", "checkpoint to predict with, or several with commas: their mean", "-m")
    compare: tuple[str, ...] = flag(
        (), "two checkpoints, or folders of masks: is the second better?", type=str, nargs=2
    )
    images: str = flag("", "the radiographs of the masks, for the report and their pixels' size")
    device: str = flag("", "where to predict, such as cpu or cuda:1; '': a GPU if there is one")
    output: str = flag("", "folder for figures and pictures, see docs/prediction.md", "-o")
    categories: str = flag("", "class table, a file like flags/categories.json")
    num_classes: int = flag(0, "number of classes; 0: as --categories, the model or the masks tell")
    binary: bool = flag(False, "join all foreground classes: any value but 0 is foreground")
    surface: bool = flag(False, "95 % Hausdorff and average surface distance (HD95, ASD)")
    spacing: str = flag("", "size of a pixel in mm, HEIGHT[,WIDTH], for files that do not tell")
    bootstrap: int = flag(2000, "draws of images for the 95 % intervals; 0: no intervals")
    bootstrap_seed: int = flag(0, "of these draws, and of the permutation test's")
    report: bool = flag(True, "with --output also report.html, to look through in a browser")
    batch_size: int = flag(8, "radiographs a forward pass")


@dataclass
class Source:
    """Where masks come from: a model and radiographs, or files; with what is common to all."""

    config: EvaluateConfig
    averaging: AveragingConfig
    truths: str
    categories: tuple[Category, ...] | None

    def from_model(self, model: str, images: str) -> tuple[Iterator[MaskPair], tuple]:
        """A model's masks, and the class table: the given one, else the model's."""
        config = self.config
        predictor = self.averaging.load(model, config.device or None)
        if self.categories and len(self.categories) != len(predictor.categories):
            raise UserError(
                f"{model} predicts {len(predictor.categories)} classes, not "
                f"{len(self.categories)}; leave out --num_classes and --categories or correct them"
            )
        pairs = predict_mask_pairs(
            predictor,
            images,
            self.truths,
            config.binary,
            parse_spacing(config.spacing),
            config.batch_size,
        )
        return pairs, self.categories if config.categories else predictor.categories

    def from_files(self, masks: str, images: str = "") -> tuple[Iterator[MaskPair], tuple | None]:
        """Masks of a folder or a file, and the class table if it is given."""
        pairs = read_mask_pairs(
            masks,
            self.truths,
            len(self.categories) if self.categories else None,
            self.config.binary,
            parse_spacing(self.config.spacing),
            read_image if images else None,
            images,
        )
        return pairs, self.categories


def run(config: EvaluateConfig, averaging: AveragingConfig, places: Sequence[str]) -> int:
    """The whole command.

    :param places: the arguments without flags: PREDICTED_MASKS or IMAGES, and TRUE_MASKS.
    """
    parse_spacing(config.spacing)
    for name in ("bootstrap", "num_classes"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} {getattr(config, name)} must be at least 0")
    if config.batch_size < 1:
        raise UserError(f"--batch_size {config.batch_size} must be at least 1")
    wanted = (1, 2) if config.compare else (2,)
    if len(places) not in wanted:
        raise UserError(
            "expected two arguments, PREDICTED_MASKS TRUE_MASKS, or IMAGES TRUE_MASKS with --model "
            f"or --compare; got {len(places)} (see evaluate.py --help)"
        )
    if config.output:
        prepare_output(config.output)
    categories = choose_categories(config.categories, config.num_classes or None)
    source = Source(config, averaging, places[-1], categories)
    if config.compare:
        return _compare(config, source, places[0] if len(places) == 2 else "")
    return _evaluate(config, source, places[0])


def _evaluate(config: EvaluateConfig, source: Source, first: str) -> int:
    if config.model:
        pairs, categories = source.from_model(config.model, first)
    else:
        pairs, categories = source.from_files(first, config.images)
    cards: list[Card] = []
    wanted = config.output and config.report
    on_image = (lambda *seen: cards.append(_card(*seen))) if wanted else None
    result = evaluate(pairs, categories, config.binary, config.surface, on_image)
    result.bootstrap(config.bootstrap, config.bootstrap_seed)
    print(table(result))
    if result.intervals:
        print(f"\n{intervals_table(result)}")
    if result.calibration:
        print(f"\n{result.calibration.text()}")
    if categories is None and not config.binary:
        print(
            f"{len(result.categories)} classes, by the highest value in the masks; "
            "--categories or --num_classes say otherwise"
        )
    if config.output:
        written = write_evaluation(result, config.output)
        if cards:
            path = os.path.join(config.output, "report.html")
            written[path] = os.path.exists(path)
            _write_report(path, config, result, cards)
        _tell(written)
    return 0


def _columns(units: Sequence[str]) -> list[str]:
    return ["Dice", "IoU", *(f"{m.upper()} {unit}" for unit in units for m in DISTANCES)]


def _card(pair: MaskPair, result: ImageResult) -> Card:
    scores = dice_iou(result.confusion)
    labels = {"mean Dice": scores.mean_dice(), "mean IoU": scores.mean_iou()}
    if pair.prediction:
        labels["uncertainty"] = float(pair.prediction.uncertainty.mean())
    rows = {
        index: [
            scores.dice[index],
            scores.iou[index],
            *(v for found in result.distances.values() for v in found.get(index, (math.nan,) * 2)),
        ]
        for index in range(1, len(scores.dice))
    }
    doubt = 1 - scores.mean_dice()
    return make_card(
        pair.name,
        pair.image,
        pair.predicted,
        labels,
        rows,
        urgency=0 if math.isnan(doubt) else doubt,
        true=pair.true,
        prediction=pair.prediction,
    )


def _write_report(
    path: str, config: EvaluateConfig, result: Evaluation, cards: Sequence[Card]
) -> None:
    orders = [("mean Dice", False), ("name", False)]
    if result.calibration:
        orders.insert(1, ("uncertainty", True))
    units = result.units()
    report = Report("Evaluated radiographs", result.categories, orders, _columns(units))
    for card in cards:
        report.add(card)
    scores = dice_iou(result.confusion)
    facts = [("radiographs", len(cards)), ("mean Dice", scores.mean_dice())]
    if result.intervals:
        low, high = result.intervals["mean_dice"]
        facts.append(("95 % interval", f"{low:.3f} to {high:.3f}"))
    facts.append(("mean IoU", scores.mean_iou()))
    pictures = {"Confusion of the classes": os.path.join(config.output, "confusion.png")}
    if result.calibration:
        facts.append(("calibration error", result.calibration.expected_error()))
        for caption, name in (
            ("Confidence and accuracy", "reliability.png"),
            ("Uncertainty and error", "uncertainty_deciles.png"),
        ):
            pictures[caption] = os.path.join(config.output, name)
    if config.model:
        facts.append(("model", config.model))
    rows = {
        c.index: [
            scores.dice[c.index],
            scores.iou[c.index],
            *(result.distance(u, i, c.index) for u in units for i in range(len(DISTANCES))),
        ]
        for c in result.categories[1:]
    }
    report.write(path, facts, (_columns(units), rows), pictures)


def write_evaluation(result: Evaluation, folder: str) -> dict[str, bool]:
    """Write figures and pictures; older ones are replaced whole.

    :return: for each path whether there was one before.
    """
    prepare_output(folder)
    lines = per_image_csv(result).encode()
    writers = {
        "metrics.json": lambda path: save_json(path, result.summary()),
        "per_image.csv": lambda path: write_atomically(path, lambda file: file.write(lines)),
        "confusion.png": lambda path: plot_confusion(result.confusion, result.categories, path),
    }
    found = result.calibration
    if found:
        writers |= {
            "reliability.png": lambda path: calibration_plots.plot_reliability(found, path),
            "uncertainty_deciles.png": lambda path: calibration_plots.plot_deciles(found, path),
        }
    return _write_all(folder, writers)


def _compare(config: EvaluateConfig, source: Source, images: str) -> int:
    results = []
    for place in config.compare:
        if is_model(place):
            if not images:
                raise UserError(f"--compare {place}: a model needs the arguments IMAGES TRUE_MASKS")
            pairs, categories = source.from_model(place, images)
        else:
            pairs, categories = source.from_files(place)
        results.append(evaluate(pairs, categories, config.binary))
    counts = [len(result.categories) for result in results]
    if counts[0] != counts[1]:
        if config.categories or any(is_model(place) for place in config.compare):
            raise UserError(
                f"--compare: {config.compare[0]} has {counts[0]} classes and {config.compare[1]} "
                f"{counts[1]}; only predictions of the same classes can be compared"
            )
        for result in results:
            result.widen(max(counts))
    confusions = [[r.confusion for r in result.results] for result in results]
    names = [category.name for category in results[0].categories]
    found = compare(*confusions, names, config.bootstrap or 2000, config.bootstrap_seed)
    print(f"A: {config.compare[0]}\nB: {config.compare[1]}\n\n{comparison_table(found)}")
    print(verdict(found["mean"]))
    if config.output:
        _tell(_write_comparison(config, results, found))
    return 0


def verdict(mean: Difference | None) -> str:
    """What the comparison of the mean says, in a sentence."""
    if mean is None:
        return "no image has a foreground to compare"
    low, high = mean.interval
    if low <= 0 <= high:
        return f"no difference shown on {mean.images} images: the interval holds 0"
    better = "B" if mean.difference > 0 else "A"
    return f"{better} is better by {abs(mean.difference):.4f} on {mean.images} images"


def _write_comparison(
    config: EvaluateConfig, results: Sequence[Evaluation], found: Mapping[str, Difference | None]
) -> dict[str, bool]:
    plain = {
        "first": config.compare[0],
        "second": config.compare[1],
        "differences": {name: d and d.to_plain() for name, d in found.items()},
    }
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [c.name for c in results[0].categories[1:]]
    writer.writerow(["name", *(f"{which}_{n}" for which in "AB" for n in ("mean_dice", *names))])
    for pair in zip(*(result.results for result in results)):
        scores = [dice_iou(result.confusion) for result in pair]
        values = [v for s in scores for v in (s.mean_dice(), *s.dice[1:])]
        writer.writerow([pair[0].name, *("n/a" if v != v else f"{v:.6f}" for v in values)])
    lines = text.getvalue().encode()
    return _write_all(
        config.output,
        {
            "comparison.json": lambda path: save_json(path, without_nan(plain)),
            "comparison.csv": lambda path: write_atomically(path, lambda file: file.write(lines)),
        },
    )


def _write_all(folder: str, writers: Mapping) -> dict[str, bool]:
    replaced = {}
    for name, write in writers.items():
        path = os.path.join(folder, name)
        replaced[path] = os.path.exists(path)
        write(path)
    return replaced


def _tell(written: Mapping[str, bool]) -> None:
    for path, replaced in written.items():
        print(f"{'replaced' if replaced else 'written'}: {path}")


def is_model(place: str) -> bool:
    """Whether a path, or several with commas, is of checkpoints rather than of masks."""
    return not (os.path.isdir(place) or os.path.splitext(place)[1].lower() in IMAGE_EXTENSIONS)


def parse_spacing(text: str) -> tuple[float, float] | None:
    """`"0.5"` or `"0.5,0.25"` to (height, width) in mm; None for nothing."""
    if not text:
        return None
    try:
        sides = [float(side) for side in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or not all(0 < side < float("inf") for side in sides):
        raise UserError(f"--spacing {text}: give millimetres above 0, as HEIGHT or HEIGHT,WIDTH")
    return sides[0], sides[-1]
