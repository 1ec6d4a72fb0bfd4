"""Tables of an evaluation: on the screen, and per_image.csv."""

import math
import os
from collections.abc import Callable, Mapping, Sequence

from guided_diffusion.runtime.storage.files import write_csv
from guided_diffusion.segmentation.evaluation.scoring import (
    DISTANCES,
    Evaluation,
    identifier,
    means,
)
from guided_diffusion.segmentation.evaluation.statistics import Difference
from guided_diffusion.segmentation.metrics import dice_iou, nan_mean


def table(evaluation: Evaluation) -> str:
    """For the screen: one line per class, then the means."""
    confusion = evaluation.confusion
    scores, images = dice_iou(confusion), evaluation.per_image()
    measures = [(unit, i) for unit in evaluation.units() for i in range(len(DISTANCES))]
    header = ["class", "Dice", "IoU", "Dice/image", "IoU/image", "images", "true %"]
    header += [f"{DISTANCES[i].upper()} {unit}" for unit, i in measures]
    rows: list[list[str] | None] = [header]
    for c in evaluation.categories:
        over_images = (
            nan_mean([s.dice[c.index] for s in images]),
            nan_mean([s.iou[c.index] for s in images]),
        )
        distances = [evaluation.distance(*m, c.index) if c.index else math.nan for m in measures]
        rows.append(
            [
                c.name,
                *map(show, (scores.dice[c.index], scores.iou[c.index], *over_images)),
                str(sum(bool(r.confusion[c.index].any()) for r in evaluation.results)),
                f"{100 * confusion[c.index].sum() / max(confusion.sum(), 1):.2f}",
                *(show(distance, digits=2) for distance in distances),
            ]
        )
    rows.append(None)
    for label, background in (("mean of the foreground", False), ("with background", True)):
        over_images = (
            nan_mean([s.mean_dice(background) for s in images]),
            nan_mean([s.mean_iou(background) for s in images]),
        )
        over_set = (scores.mean_dice(background), scores.mean_iou(background))
        row = [label, *map(show, (*over_set, *over_images)), str(len(evaluation.results)), ""]
        if not background:
            indices = [c.index for c in evaluation.categories[1:]]
            means_of = [nan_mean([evaluation.distance(*m, k) for k in indices]) for m in measures]
            row += [show(mean, digits=2) for mean in means_of]
        rows.append(row + [""] * (len(header) - len(row)))
    return align(rows)


def intervals_table(evaluation: Evaluation) -> str:
    """For the screen: the 95 % intervals of the figures of `table`."""
    found = evaluation.intervals
    rows: list[list[str] | None] = [["95 % interval", "Dice", "IoU", "Dice/image", "IoU/image"]]
    if found:
        parts = (found, found["mean_over_images"])
        for c in evaluation.categories:
            spans = [_span(p["per_class"][c.name][m]) for p in parts for m in ("dice", "iou")]
            rows.append([c.name, *spans])
        means_of = [_span(mean) for p in parts for mean in (p["mean_dice"], p["mean_iou"])]
        rows += [None, ["mean of the foreground", *means_of]]
    return align(rows)


def comparison_table(differences: Mapping[str, Difference | None]) -> str:
    """For the screen: one line per class, then the mean."""
    header = ["Dice/image", "A", "B", "B - A", "95 % interval", "p permut.", "p Wilcoxon", "images"]
    rows: list[list[str] | None] = [header]
    for name in [*(n for n in differences if n != "mean"), "mean"]:
        found = differences[name]
        label = "mean of the foreground" if name == "mean" else name
        if name == "mean":
            rows.append(None)
        if found is None:
            rows.append([label, *["n/a"] * 6, "0"])
            continue
        rows.append(
            [
                label,
                show(found.first),
                show(found.second),
                f"{found.difference:+.4f}",
                " to ".join(f"{value:+.4f}" for value in found.interval),
                show(found.p_permutation),
                show(found.p_wilcoxon),
                str(found.images),
            ]
        )
    return align(rows)


def _span(interval: Sequence[float]) -> str:
    return "n/a" if math.isnan(interval[0]) else "-".join(f"{value:.3f}" for value in interval)


def write_per_image(path: str, evaluation: Evaluation) -> None:
    """Write per_image.csv: one line per image, with the means and each measure of each class."""
    classes = [c.name for c in evaluation.categories]
    header = ["name", *means(dice_iou(evaluation.confusion))]
    header += [f"{kind}_{name}" for kind in ("dice", "iou") for name in classes]
    header += [
        f"{m}_{identifier(u)}_{name}"
        for u in evaluation.units()
        for m in DISTANCES
        for name in classes[1:]
    ]
    rows = []
    for result, scores in zip(evaluation.results, evaluation.per_image()):
        values = [*means(scores).values(), *scores.dice, *scores.iou]
        values += [
            result.distances.get(unit, {}).get(c.index, (math.nan, math.nan))[i]
            for unit in evaluation.units()
            for i in range(len(DISTANCES))
            for c in evaluation.categories[1:]
        ]
        rows.append([result.name, *(show(v, digits=6) for v in values)])
    write_csv(path, header, rows)


def show(value: float, digits: int = 4) -> str:
    """A number as text; "n/a" for nan."""
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def align(rows: Sequence[Sequence[str] | None]) -> str:
    """Pad the columns to equal widths, numbers aligned right; None becomes a rule."""
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


def write_files(folder: str, writers: Mapping[str, Callable[[str], None]]) -> None:
    """Write files by name, and say whether each is new or replaces another."""
    for name, write in writers.items():
        path = os.path.join(folder, name)
        replaced = os.path.exists(path)
        write(path)
        print(f"{'replaced' if replaced else 'written'}: {path}")
