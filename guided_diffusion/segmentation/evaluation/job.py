"""Evaluation as a command: the figures of one set of predictions, or a comparison of two."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from guided_diffusion import dist_util
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage.files import check_output, save_json
from guided_diffusion.segmentation.evaluation import calibration
from guided_diffusion.segmentation.evaluation.comparison import compare_two
from guided_diffusion.segmentation.evaluation.config import EvaluateConfig
from guided_diffusion.segmentation.evaluation.mask_pairs import MaskPair
from guided_diffusion.segmentation.evaluation.scoring import (
    DISTANCES,
    UNITS,
    Evaluation,
    ImageResult,
    choose_categories,
    evaluate,
)
from guided_diffusion.segmentation.evaluation.sources import Source, is_model, parse_spacing
from guided_diffusion.segmentation.evaluation.tables import (
    intervals_table,
    table,
    write_files,
    write_per_image,
)
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.metrics import dice_iou
from guided_diffusion.segmentation.visuals.render import plot_confusion
from guided_diffusion.segmentation.visuals.report import Card, Report, make_card


def run(config: EvaluateConfig, averaging: AveragingConfig, arguments: Sequence[str]) -> None:
    """The whole command.

    :param arguments: the positional arguments: PREDICTED_MASKS or IMAGES, and TRUE_MASKS.
    """
    parse_spacing(config.spacing)
    if len(arguments) not in ((1, 2) if config.compare else (2,)):
        raise UserError(
            "expected two arguments, PREDICTED_MASKS TRUE_MASKS, or IMAGES TRUE_MASKS with --model "
            f"or --compare; got {len(arguments)} (see evaluate.py --help)"
        )
    if config.output:
        check_output(config.output, folder=True)
    categories = choose_categories(config.categories, config.num_classes or None)
    if config.model or any(map(is_model, config.compare)):
        averaging = averaging.on(dist_util.open_device())
    source = Source(config, averaging, arguments[-1], categories)
    if config.compare:
        compare_two(source, arguments[0] if len(arguments) == 2 else "")
    else:
        _evaluate(source, arguments[0])


def _evaluate(source: Source, predictions: str) -> None:
    config = source.config
    if config.model:
        pairs, categories = source.from_model(config.model, predictions)
    else:
        pairs, categories = source.from_files(predictions, config.images)
    cards: list[Card] = []
    reporting = config.output and config.report
    add_card = (lambda *image: cards.append(_card(*image))) if reporting else None
    result = evaluate(pairs, categories, config.binary, config.surface, add_card)
    result.bootstrap(config.bootstrap, config.bootstrap_seed)
    print(table(result))
    if result.intervals:
        print(f"\n{intervals_table(result)}")
    if result.calibration:
        print(f"\n{result.calibration.text()}")
    if categories is None and not config.binary:
        say(
            f"{len(result.categories)} classes, by the highest value in the masks; to change this, "
            "use --categories or --num_classes"
        )
    if config.output:
        write_evaluation(result, config, cards)


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
            *(v for u in UNITS for v in result.distances.get(u, {}).get(index, (math.nan,) * 2)),
        ]
        for index in range(1, len(scores.dice))
    }
    error = 1 - scores.mean_dice()
    return make_card(
        pair.name,
        pair.image,
        pair.predicted,
        labels,
        rows,
        urgency=0 if math.isnan(error) else error,
        true=pair.true,
        prediction=pair.prediction,
    )


def _write_report(
    path: str, config: EvaluateConfig, result: Evaluation, cards: Sequence[Card]
) -> None:
    """Write report.html, with the pictures that lie in the output folder already."""
    orders = [("mean Dice", False), ("name", False)]
    if result.calibration:
        orders.insert(1, ("uncertainty", True))
    units = result.units()
    report = Report("Evaluated radiographs", result.categories, orders, _columns(units))
    kept = [0, 1, *(2 + 2 * UNITS.index(u) + i for u in units for i in range(len(DISTANCES)))]
    for card in cards:
        for _, figures in card.plain["classes"]:
            figures[:] = [figures[column] for column in kept]
        report.add(card)
    scores = dice_iou(result.confusion)
    facts: list[tuple[str, Any]] = [("radiographs", len(cards))]
    facts.append(("mean Dice", scores.mean_dice()))
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


def write_evaluation(result: Evaluation, config: EvaluateConfig, cards: Sequence[Card]) -> None:
    """Write figures, pictures and, if there are cards, the report to the output folder."""
    writers: dict[str, Callable[[str], None]] = {
        "metrics.json": lambda path: save_json(path, result.summary()),
        "per_image.csv": lambda path: write_per_image(path, result),
        "confusion.png": lambda path: plot_confusion(result.confusion, result.categories, path),
    }
    found = result.calibration
    if found:
        writers |= {
            "reliability.png": lambda path: calibration.plot_reliability(found, path),
            "uncertainty_deciles.png": lambda path: calibration.plot_deciles(found, path),
        }
    if cards:
        writers["report.html"] = lambda path: _write_report(path, config, result, cards)
    write_files(config.output, writers)
