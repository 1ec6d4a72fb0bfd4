"""Tables and the picture of a comparison of methods by the number of labelled images."""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.runtime.files import write_atomically

Result = Mapping[str, Any]


class Spread(NamedTuple):
    """Of a figure over runs; the deviation is that of a sample, nan for a single run."""

    count: int
    mean: float
    deviation: float

    def __str__(self) -> str:
        if not self.count:
            return ""
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if self.count > 1 else "")


def spread(values: Sequence[float | None]) -> Spread:
    """Of the values that there are."""
    known = np.array([value for value in values if value is not None], np.float64)
    mean = float(known.mean()) if known.size else float("nan")
    return Spread(known.size, mean, float(known.std(ddof=1)) if known.size > 1 else float("nan"))


def write_tables(
    folder: str,
    results: Sequence[Result],
    methods: Sequence[str],
    classes: Sequence[str],
    picture: bool = True,
) -> None:
    """Write runs.csv, table.csv, table.md, commands.sh and, if so wanted, curves.png.

    :param results: one a finished run, see `label_efficiency`.
    :param methods: names in the order of the tables; other methods found come after them.
    :param classes: names, the background first.
    """
    if not results:
        return
    methods = [*methods, *sorted({r["method"] for r in results} - set(methods))]
    methods = [m for m in methods if any(r["method"] == m for r in results)]
    results = sorted(results, key=lambda r: (methods.index(r["method"]), r["k"], r["seed"]))
    table = _Table(results, methods, classes)
    texts = {
        "runs.csv": _csv(table.run_rows()),
        "table.csv": _csv(table.rows()),
        "table.md": table.markdown(),
        "commands.sh": "".join(_commands(result) for result in results),
    }
    for name, text in texts.items():
        write_atomically(os.path.join(folder, name), lambda f, text=text: f.write(text.encode()))
    if picture:
        _draw(os.path.join(folder, "curves.png"), table)


class _Table:
    def __init__(self, results: Sequence[Result], methods: Sequence[str], classes: Sequence[str]):
        self.results, self.methods, self.classes = results, methods, classes
        self.numbers = sorted({result["k"] for result in results})

    def figures(self) -> dict[str, Callable[[Result], float | None]]:
        """Name of each figure and how to find it in a run's result."""
        found: dict[str, Callable[[Result], float | None]] = {
            "mean_dice": lambda r: r["mean_dice"],
            "mean_iou": lambda r: r["mean_iou"],
        }
        for measure in ("dice", "iou"):
            for name in self.classes:
                found[f"{measure} {name}"] = lambda r, m=measure, n=name: r[m][n]
        return found

    def of(self, method: str, k: int, figure: str) -> Spread:
        find = self.figures()[figure]
        chosen = [r for r in self.results if r["method"] == method and r["k"] == k]
        return spread([find(r) for r in chosen])

    def ahead(self, method: str, k: int) -> Spread:
        """Mean Dice of the first method less this one's, over the runs on the same images."""
        scores = {
            (r["method"], (r["k"], r["seed"], r["fold"])): r["mean_dice"] for r in self.results
        }
        return spread(
            [
                score - scores[method, same]
                for (name, same), score in scores.items()
                if name == self.methods[0] and same[0] == k and (method, same) in scores
            ]
        )

    def run_rows(self) -> list[dict[str, Any]]:
        rows = []
        for r in self.results:
            row = {name: r[name] for name in ("method", "k", "seed", "fold")}
            row |= {name: find(r) for name, find in self.figures().items()}
            row |= {"seconds": r["seconds"], "images": " ".join(r["images"])}
            rows.append(row | {"command": r["commands"][0]})
        return rows

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for method in self.methods:
            for k in self.numbers:
                row = {"method": method, "k": k, "runs": self.of(method, k, "mean_dice").count}
                for figure in self.figures():
                    found = self.of(method, k, figure)
                    row |= {f"{figure} mean": found.mean, f"{figure} sd": found.deviation}
                rows.append(row)
        return rows

    def markdown(self) -> str:
        """Tables of mean and standard deviation over the runs, one a figure."""
        seeds = sorted({result["seed"] for result in self.results})
        lines = [
            f"Mean ± standard deviation over the runs of {len(seeds)} seeds"
            " (the seed draws the images and is the training's)."
        ]
        titles = {"mean_dice": "Mean Dice of the foreground", "mean_iou": "Mean IoU"}
        titles |= {f"dice {name}": f"Dice, {name}" for name in self.classes[1:]}
        titles |= {f"iou {name}": f"IoU, {name}" for name in self.classes[1:]}
        for figure, title in titles.items():
            lines += self._grid(title, lambda m, k, f=figure: str(self.of(m, k, f)), self.methods)
        if len(self.methods) > 1:
            title = f"Mean Dice of {self.methods[0]} less that of the method, on the same images"
            lines += self._grid(title, lambda m, k: str(self.ahead(m, k)), self.methods[1:])
        return "\n".join(lines) + "\n"

    def _grid(
        self, title: str, cell: Callable[[str, int], str], methods: Sequence[str]
    ) -> list[str]:
        header = [f"| {title} |", *(f" k = {k} |" for k in self.numbers)]
        rule = "| --- |" + " --- |" * len(self.numbers)
        body = ["".join([f"| {m} |", *(f" {cell(m, k)} |" for k in self.numbers)]) for m in methods]
        return ["", "".join(header), rule, *body]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow({k: "" if v == "nan" else v for k, v in cells.items()})
    return text.getvalue()


def _commands(result: Result) -> str:
    fold = "" if result["fold"] is None else f", fold {result['fold']}"
    title = f"# {result['method']}, k = {result['k']}, seed {result['seed']}{fold}:"
    return "\n".join([f"{title} mean Dice {result['mean_dice']:.4f}", *result["commands"], "", ""])


def _draw(path: str, table: _Table) -> None:
    """Mean Dice and mean IoU over k: means, standard deviations as bands, every run as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    titles = {"mean_dice": "Mean Dice of the foreground", "mean_iou": "Mean IoU of the foreground"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items()):
        for number, method in enumerate(table.methods):
            found = [(k, table.of(method, k, name)) for k in table.numbers]
            found = [(k, s) for k, s in found if s.count]
            k, means = [k for k, _ in found], np.array([s.mean for _, s in found])
            deviations = np.nan_to_num([s.deviation for _, s in found])
            color = f"C{number % 10}"
            axes.plot(k, means, marker="o", color=color, label=method)
            axes.fill_between(k, means - deviations, means + deviations, color=color, alpha=0.15)
            runs = [r for r in table.results if r["method"] == method]
            axes.plot([r["k"] for r in runs], [r[name] for r in runs], ".", color=color, alpha=0.4)
        axes.set(title=title, xlabel="labelled images", xscale="log", xticks=table.numbers)
        axes.set_xticklabels([str(k) for k in table.numbers])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
