"""Results of a comparison by the number of labelled images: their tables and plot."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypedDict

import numpy as np

from guided_diffusion.runtime.storage.files import read_json, write_atomically, write_csv
from guided_diffusion.runtime.text import encode
from guided_diffusion.segmentation.evaluation.run_origin import RunOrigin
from guided_diffusion.segmentation.evaluation.statistics import (
    FEWEST_PAIRS,
    SIGNIFICANCE,
    permutation,
)
from guided_diffusion.segmentation.visuals.render import new_figure, save_figure

RESULT_NAME = "result.json"


class Figures(TypedDict):
    """Scores over all test images; dice and iou by class. None where there is no score."""

    mean_dice: float | None
    mean_iou: float | None
    dice: dict[str, float | None]
    iou: dict[str, float | None]


class VariantFigures(Figures):
    """The same network's scores with other flags of evaluate.py, and the command."""

    command: str


class _Recorded(TypedDict, total=False):
    origin: RunOrigin
    precision: str
    kept: bool


class RunResult(Figures, _Recorded):
    """What a finished run leaves in result.json.

    fold: None if the test images were evaluated. variants: by name. seconds: of training. images:
    names of those that it was trained on. commands: to train (of a union a comment), to evaluate,
    and to evaluate each variant. origin: absent from results of older versions. precision: of the
    comparison, absent where none was fixed. kept: whether its network is to stay, absent from
    results of older versions.
    """

    method: str
    k: int
    seed: int
    fold: int | None
    variants: dict[str, VariantFigures]
    seconds: float
    images: list[str]
    commands: list[str]


def read_result(folder: str) -> RunResult | None:
    """The result of a run; None if it has not finished."""
    path = os.path.join(folder, RESULT_NAME)
    return read_json(path) if os.path.exists(path) else None


def results_by_folder(output: str) -> dict[str, RunResult]:
    """The results of all finished runs, sorted by name."""
    runs = os.path.join(output, "runs")
    names = sorted(os.listdir(runs)) if os.path.isdir(runs) else []
    folders = [os.path.join(runs, name) for name in names]
    return {folder: result for folder in folders if (result := read_result(folder))}


def read_results(output: str) -> list[RunResult]:
    """`results_by_folder`, with each variant as a method of its own."""
    results: list[RunResult] = []
    for result in results_by_folder(output).values():
        train, evaluate = result["commands"][:2]
        results.append({**result, "commands": [train, evaluate]})
        for name, variant in result.get("variants", {}).items():
            results.append(
                {
                    **result,
                    "mean_dice": variant["mean_dice"],
                    "mean_iou": variant["mean_iou"],
                    "dice": variant["dice"],
                    "iou": variant["iou"],
                    "method": f"{result['method']}+{name}",
                    "commands": [train, variant["command"]],
                }
            )
    return results


class Spread(NamedTuple):
    """A figure over several runs; the deviation is the sample's, nan for a single run."""

    runs: int
    mean: float
    deviation: float

    def __str__(self) -> str:
        if not self.runs:
            return ""
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if self.runs > 1 else "")


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and deviation of the values that are not None."""
    known = np.array([value for value in values if value is not None], np.float64)
    mean = float(known.mean()) if known.size else float("nan")
    return Spread(known.size, mean, float(known.std(ddof=1)) if known.size > 1 else float("nan"))


def write_tables(
    folder: str,
    results: Sequence[RunResult],
    methods: Sequence[str],
    classes: Sequence[str],
    picture: bool = True,
    below: str = "",
) -> None:
    """Write runs.csv, table.csv, table.md, commands.sh and, if wanted, curves.png.

    :param methods: names in the order of the tables; other methods found come after them.
    :param classes: names, the background first.
    :param below: what table.md says below its tables, in Markdown.
    """
    if not results:
        return
    methods = [*methods, *sorted({r["method"] for r in results} - set(methods))]
    methods = [m for m in methods if any(r["method"] == m for r in results)]
    results = sorted(results, key=lambda r: (methods.index(r["method"]), r["k"], r["seed"]))
    table = _Table(results, methods, classes)
    _write_rows(os.path.join(folder, "runs.csv"), table.run_rows())
    _write_rows(os.path.join(folder, "table.csv"), table.rows())
    _write_text(os.path.join(folder, "table.md"), table.markdown() + below)
    _write_text(os.path.join(folder, "commands.sh"), "".join(map(_commands, results)))
    if picture:
        _plot(os.path.join(folder, "curves.png"), table)


Row = dict[str, object]


class _Table:
    def __init__(
        self, results: Sequence[RunResult], methods: Sequence[str], classes: Sequence[str]
    ):
        self.results, self.methods, self.classes = results, methods, classes
        self.numbers = sorted({result["k"] for result in results})

    def figures(self, result: RunResult) -> dict[str, float | None]:
        """All scores of a run, by name."""
        return {
            "mean_dice": result["mean_dice"],
            "mean_iou": result["mean_iou"],
            **{f"dice {name}": result["dice"][name] for name in self.classes},
            **{f"iou {name}": result["iou"][name] for name in self.classes},
        }

    def of(self, method: str, k: int, figure: str) -> Spread:
        """A figure over the runs of a method with k images."""
        chosen = [r for r in self.results if r["method"] == method and r["k"] == k]
        return spread([self.figures(r)[figure] for r in chosen])

    def ahead(self, method: str, k: int) -> list[float]:
        """Mean Dice of the first method minus this one's, of the runs on the same images."""
        scores: dict[tuple[int, int | None], dict[str, float | None]] = {}
        for r in self.results:
            if r["k"] == k:
                scores.setdefault((r["seed"], r["fold"]), {})[r["method"]] = r["mean_dice"]
        pairs = [(found.get(self.methods[0]), found.get(method)) for found in scores.values()]
        return [a - b for a, b in pairs if a is not None and b is not None]

    def _advantage(self, method: str, k: int) -> str:
        found = spread(self.ahead(method, k))
        if found.runs < 2:
            return str(found)
        return f"{found.mean:+.3f} ± {found.deviation / found.runs**0.5:.3f}"

    def _seconds(self, method: str, k: int) -> str:
        chosen = [r["seconds"] for r in self.results if r["method"] == method and r["k"] == k]
        return f"{np.mean(chosen):.0f}" if chosen else ""

    def _significance(self, method: str, k: int) -> str:
        found = self.ahead(method, k)
        return f"{permutation(np.array(found)):.2g} (n = {len(found)})" if found else ""

    def run_rows(self) -> Iterator[Row]:
        for r in self.results:
            yield {
                "method": r["method"],
                "k": r["k"],
                "seed": r["seed"],
                "fold": r["fold"],
                **self.figures(r),
                "seconds": r["seconds"],
                "images": " ".join(r["images"]),
                "command": r["commands"][0],
            }

    def rows(self) -> Iterator[Row]:
        for method in self.methods:
            for k in self.numbers:
                row: Row = {"method": method, "k": k, "runs": self.of(method, k, "mean_dice").runs}
                for figure in self.figures(self.results[0]):
                    found = self.of(method, k, figure)
                    row |= {f"{figure} mean": found.mean, f"{figure} sd": found.deviation}
                yield row

    def markdown(self) -> str:
        """Tables of mean and standard deviation over the runs, one per figure."""
        seeds = sorted({result["seed"] for result in self.results})
        lines = [
            f"Mean ± standard deviation over the runs of {len(seeds)} seeds"
            " (the seed draws the images and seeds the training)."
        ]
        titles = {"mean_dice": "Mean Dice of the foreground", "mean_iou": "Mean IoU"}
        titles |= {f"dice {name}": f"Dice, {name}" for name in self.classes[1:]}
        titles |= {f"iou {name}": f"IoU, {name}" for name in self.classes[1:]}
        for figure, title in titles.items():
            lines += self._grid(title, partial(self.of, figure=figure), self.methods)
        if len(self.methods) > 1:
            first = self.methods[0]
            title = f"p of {first} against the method, by permutation of n pairs of runs"
            lines += self._grid(title, self._significance, self.methods[1:])
            lines += [
                "",
                f"A difference with p of {SIGNIFICANCE} or more, or n below {FEWEST_PAIRS}, may be"
                " chance.",
            ]
            title = f"Mean Dice of {first} minus that of the method, on the same images, ± its"
            lines += self._grid(f"{title} standard error", self._advantage, self.methods[1:])
        lines += self._grid("Seconds of training, mean", self._seconds, self.methods)
        return "\n".join(lines) + "\n"

    def _grid(
        self, title: str, cell: Callable[[str, int], Spread | str], methods: Sequence[str]
    ) -> list[str]:
        header = [f"| {title} |", *(f" k = {k} |" for k in self.numbers)]
        rule = "| --- |" + " --- |" * len(self.numbers)
        body = ["".join([f"| {m} |", *(f" {cell(m, k)} |" for k in self.numbers)]) for m in methods]
        return ["", "".join(header), rule, *body]


def _write_rows(path: str, rows: Iterable[Row]) -> None:
    rows = list(rows)
    write_csv(path, list(rows[0]), ([_cell(value) for value in row.values()] for row in rows))


def _write_text(path: str, text: str) -> None:
    write_atomically(path, lambda file: file.write(encode(text)))


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return value


def _commands(result: RunResult) -> str:
    fold = "" if result["fold"] is None else f", fold {result['fold']}"
    title = f"# {result['method']}, k = {result['k']}, seed {result['seed']}{fold}:"
    dice = f"mean Dice {score_text(result['mean_dice'])}"
    return "\n".join([f"{title} {dice}", *result["commands"], "", ""])


def score_text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _plot(path: str, table: _Table) -> None:
    """Mean Dice and mean IoU over k: means, standard deviations as bands, every run as a dot."""
    figure = new_figure(11, 4.5)
    titles = {"mean_dice": "Mean Dice of the foreground", "mean_iou": "Mean IoU of the foreground"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items()):
        for number, method in enumerate(table.methods):
            spreads = {k: table.of(method, k, name) for k in table.numbers}
            spreads = {k: found for k, found in spreads.items() if found.runs}
            k, means = list(spreads), np.array([found.mean for found in spreads.values()])
            deviations = np.nan_to_num([found.deviation for found in spreads.values()])
            color = f"C{number % 10}"
            axes.plot(k, means, marker="o", color=color, label=method)
            axes.fill_between(k, means - deviations, means + deviations, color=color, alpha=0.15)
            runs = [r for r in table.results if r["method"] == method]
            dots = [table.figures(r)[name] for r in runs]
            axes.plot([r["k"] for r in runs], dots, ".", color=color, alpha=0.4)
        axes.set(title=title, xlabel="labelled images", xscale="log", xticks=table.numbers)
        axes.set_xticklabels([str(k) for k in table.numbers])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_figure(figure, path)
