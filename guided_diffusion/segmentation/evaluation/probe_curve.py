"""The curve of a linear probe over a pretraining: its files, and where it levels off."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import blobfile as bf
import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.contents import Files, changed_files
from guided_diffusion.runtime.storage.files import read_sections, save_json
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.evaluation.linear_probe import ProbeScores
from guided_diffusion.segmentation.metrics import nan_mean
from guided_diffusion.segmentation.visuals.render import curve_color, new_figure, save_figure

JSON_NAME, PICTURE_NAME = "probe.json", "probe.png"
PATIENCE = 3  # probes without a gain after which the curve has levelled off


@dataclasses.dataclass(frozen=True)
class Point:
    """A probe of the weights after `step` steps.

    images: mean foreground Dice of each image of VAL, nan where it shows no foreground. classes:
    mean Dice of each class over these images, background first.
    """

    step: int
    images: tuple[float, ...]
    classes: tuple[float, ...]

    @classmethod
    def of(cls, step: int, scores: ProbeScores) -> "Point":
        return cls(step, tuple(scores.per_image), tuple(scores.per_class))

    @property
    def dice(self) -> float:
        """Mean foreground Dice."""
        return nan_mean(self.images)


def gain(before: Point, after: Point) -> tuple[float, float]:
    """By how much the mean Dice rose, and the standard error of that: images are compared in pairs.

    The error is that of the mean of N differences, 0 for a single image.
    """
    change = np.subtract(after.images, before.images)
    change = change[~np.isnan(change)]
    if len(change) < 2:
        return nan_mean(change), 0.0
    return float(change.mean()), float(change.std(ddof=1) / math.sqrt(len(change)))


def levelled_off(points: Sequence[Point]) -> Point | None:
    """The best of the earlier probes, if none of the last 3 beats it, else None.

    None also if there are no earlier ones. A probe beats it if it gains more than the standard
    error of that gain over the images.
    """
    earlier, last = points[:-PATIENCE], points[-PATIENCE:]
    if not earlier:
        return None
    best = max(earlier, key=lambda point: point.dice)
    gains = [gain(best, point) for point in last]
    return None if any(rise > error for rise, error in gains) else best


class ProbeCurve:
    """Probes of a run by step, kept in `probe.json` and drawn in `probe.png`.

    :param folder: of both files.
    :param categories: the classes.
    :param files: hashes of the labelled images, by "train" and "val"; points of others do not
        compare.
    :param names: of the images of VAL.
    """

    def __init__(
        self, folder: str, categories: Sequence[Category], files: Files, names: Sequence[str]
    ):
        self.folder = folder
        self.categories = categories
        self.files = files
        self.names = list(names)
        self.points: list[Point] = []

    def load(self, last_step: int | None = None) -> None:
        """Continue the curve in the folder, if there is one, up to a step.

        :raises UserError: if it is of other images or classes, or damaged.
        """
        path = bf.join(self.folder, JSON_NAME)
        if not bf.exists(path):
            return
        stored = read_sections(path)
        try:
            changed = changed_files(stored["files"], self.files)
            if stored["classes"] != [category.name for category in self.categories]:
                changed.append("other classes")
            points = [
                Point(point["step"], _numbers(point["images"]), _numbers(point["classes"]))
                for point in stored["points"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: remove it to begin another curve") from error
        if changed:
            raise UserError(
                f"{path} is the curve of other labelled images ({'; '.join(changed)}): name those"
                " again, or remove it to begin another"
            )
        self.points = [p for p in points if last_step is None or p.step <= last_step]

    def __contains__(self, step: int) -> bool:
        return any(point.step == step for point in self.points)

    def add(self, point: Point) -> str:
        """Add a point and write the files.

        :return: what to tell the user: its Dice, and whether the curve has now levelled off.
        """
        others = [other for other in self.points if other.step != point.step]
        self.points = sorted([*others, point], key=lambda other: other.step)
        self._write()
        text = f"probe at step {point.step}: mean Dice {point.dice:.4f}"
        best = levelled_off(self.points)
        if point is not self.points[-1] or best is None or levelled_off(self.points[:-1]):
            return text
        return f"{text}; {self.verdict()}"

    def verdict(self) -> str:
        """Whether the curve has stopped rising."""
        if len(self.points) <= PATIENCE:
            return f"too few probes to say whether the Dice still rises: {PATIENCE + 1} at least"
        best = levelled_off(self.points)
        if best is None:
            return "the probe's Dice still rises"
        return (
            f"the probe's Dice has stopped rising: none of the last {PATIENCE} probes gained more"
            f" than its standard error over step {best.step} ({best.dice:.4f})"
        )

    def _write(self) -> None:
        points = [
            {
                "step": point.step,
                "dice": _plain([point.dice])[0],
                "images": _plain(point.images),
                "classes": _plain(point.classes),
            }
            for point in self.points
        ]
        stored: dict[str, Any] = {
            "classes": [category.name for category in self.categories],
            "images": self.names,
            "files": self.files,
            "points": points,
        }
        save_json(bf.join(self.folder, JSON_NAME), stored)
        self._draw()

    def _draw(self) -> None:
        """Mean Dice with its standard error over images as a band, and the classes' Dice."""
        steps = [point.step for point in self.points]
        figure = new_figure(7, 4.5)
        axes = figure.subplots()
        foreground = self.categories[1:]
        for category in foreground if len(foreground) > 1 else ():
            values = [point.classes[category.index] for point in self.points]
            color = curve_color(category)
            axes.plot(steps, values, marker=".", color=color, alpha=0.6, label=category.name)
        means = np.array([point.dice for point in self.points])
        errors = np.array([_error(point.images) for point in self.points])
        axes.plot(steps, means, marker="o", color="black", linewidth=2, label="mean")
        axes.fill_between(steps, means - errors, means + errors, color="black", alpha=0.12)
        axes.set(xlabel="pretraining step", ylabel=f"Dice of {len(self.names)} images")
        axes.set_title(self.verdict().split(":")[0], fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        save_figure(figure, bf.join(self.folder, PICTURE_NAME))


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean of the values that are not nan."""
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else 0.0


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)


def _plain(values: Sequence[float]) -> list[float | None]:
    """For JSON, in which nan is null."""
    return [None if math.isnan(value) else value for value in values]
