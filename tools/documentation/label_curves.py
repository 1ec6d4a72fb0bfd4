"""Draw docs/label-efficiency.png from the tables of docs/label-efficiency.md.

A panel for each table whose first column is headed "mean Dice of the foreground by method", and a
curve for each row with one method in backticks: means over the numbers of labelled images,
deviations as bands.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from guided_diffusion.runtime.errors import UserError, command  # noqa: E402
from guided_diffusion.segmentation.visuals.render import new_figure, save_figure  # noqa: E402

PAGE, PICTURE = ROOT / "docs/label-efficiency.md", ROOT / "docs/label-efficiency.png"
HEADING, COLUMN = re.compile(r"## (.*)"), re.compile(r"k = (\d+)")
TABLE = "mean Dice of the foreground by method"
METHOD, CELL = re.compile(r"`(\w+)`"), re.compile(r"\**(\d\.\d+)(?: ± (\d\.\d+))?\**")
# method -> legend, colour: what uses pretraining on radiographs in strong colours
LOOKS = {
    "self_partner": ("pretrained here, self-trained, with a partner", "C2"),
    "partner": ("pretrained here, with a partner", "C3"),
    "recipe": ("pretrained here", "C1"),
    "imagenet": ("ImageNet weights", "C0"),
    "scratch": ("the same network, random weights", "C7"),
    "smp": ("smp's U-Net, random weights", "C8"),
    "features": ("frozen features", "C5"),
}


class Curve(NamedTuple):
    """Mean Dice of a method by the number of labelled images, and its deviation."""

    means: dict[int, float]
    deviations: dict[int, float]


def main() -> int:
    panels = read_tables(PAGE.read_text(encoding="utf-8"))
    if not panels:
        raise UserError(f"{PAGE} has no table headed {TABLE!r}")
    figure = new_figure(5 * len(panels), 4)
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(places, panels.items()):
        for method, curve in curves.items():
            label, color = LOOKS[method]
            numbers = list(curve.means)
            axes.plot(numbers, list(curve.means.values()), "o-", color=color, label=label)
            low, high = (
                [curve.means[k] + sign * curve.deviations[k] for k in numbers] for sign in (-1, 1)
            )
            axes.fill_between(numbers, low, high, color=color, alpha=0.1)
        numbers = sorted({k for curve in curves.values() for k in curve.means})
        axes.set(title=title, xlabel="labelled radiographs", xscale="log", xticks=numbers)
        axes.set_xticklabels(map(str, numbers))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    places[0].set_ylabel("mean Dice of the foreground")
    handles = {line.get_label(): line for axes in places for line in axes.get_lines()}
    places[0].legend(handles.values(), handles, fontsize="small", loc="lower right")
    save_figure(figure, str(PICTURE))
    return 0


def read_tables(text: str) -> dict[str, dict[str, Curve]]:
    """The curves of each table, by the heading above it and by method."""
    panels: dict[str, dict[str, Curve]] = {}
    title, numbers = "", []
    for line in text.splitlines():
        if found := HEADING.fullmatch(line):
            title = found[1]
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            numbers = []
        elif cells[0] == TABLE:
            numbers = [int(number) for number in COLUMN.findall(line)]
            panels[title] = {}
        elif numbers and (curve := read_row(cells, numbers)):
            method, values = curve
            panels[title][method] = values
    return panels


def read_row(cells: list[str], numbers: list[int]) -> tuple[str, Curve] | None:
    """The curve of a row; None if it is not of one method in `LOOKS`, such as a difference."""
    names = METHOD.findall(cells[0])
    found = [CELL.fullmatch(cell) for cell in cells[1:]]
    if (
        len(names) != 1
        or names[0] not in LOOKS
        or not all(cell or not text for cell, text in zip(found, cells[1:]))
    ):
        return None
    known = {k: cell for k, cell in zip(numbers, found) if cell}
    means = {k: float(cell[1]) for k, cell in known.items()}
    return names[0], Curve(means, {k: float(cell[2] or 0) for k, cell in known.items()})


if __name__ == "__main__":
    command(main)()
