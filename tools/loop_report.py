"""The report at the end of `make loop`: Dice of each round, and a picture of what was corrected."""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import _path  # noqa: F401 - makes the package importable without installing it
import numpy as np
from PIL import Image

from guided_diffusion.images.files import list_images
from guided_diffusion.images.image_io import read_image, save_picture
from guided_diffusion.images.masks import read_mask
from guided_diffusion.images.names import stem
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.runtime.storage.files import read_json
from guided_diffusion.sampling.pictures import image_grid
from guided_diffusion.segmentation.categories import ClassTable, load_categories
from guided_diffusion.segmentation.visuals.render import overlay

ENLARGED = 3
HELD_OUT = 4  # rows of the picture


@dataclass(frozen=True)
class Round:
    """A training, and the films that were corrected for it: their names, in order of choice.

    labels: images in TRAIN. uncertainties: of the predictions that were corrected.
    """

    folder: Path
    labels: int
    chosen: list[str]
    uncertainties: list[str]

    @property
    def title(self) -> str:
        return f"{self.labels} labels"


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("loop_report.py needs one argument, the folder of the loop")
    folder = Path(sys.argv[1])
    table = load_categories(str(folder / "data/Split/categories.json"))
    rounds = read_rounds(folder)
    metrics = [read_json(str(one.folder / "evaluation/metrics.json")) for one in rounds]
    print(f"\nDice on {metrics[0]['images']} radiographs that are never labelled\n")
    print(f"{'':<24}" + "".join(f"{one.title:>12}" for one in rounds))
    for name in (category.name for category in table):
        row = [found["per_class"][name]["dice"] for found in metrics]
        print(f"{name:<24}" + "".join(f"{'n/a' if v is None else f'{v:.3f}':>12}" for v in row))
    row = [found["mean_dice"] for found in metrics]
    print(f"{'mean of the foreground':<24}" + "".join(f"{value:>12.3f}" for value in row) + "\n")
    for number, one in enumerate(rounds[1:], 1):
        wrong = wrong_shares(folder, one)
        chosen, of_all = np.mean([wrong[n] for n in one.chosen]), np.mean([*wrong.values()])
        print(
            f"round {number}: {len(one.chosen)} predictions were chosen, in which {chosen:.1%} of"
            f" the pixels were corrected; in all {len(wrong)} predictions {of_all:.1%} are wrong"
        )
    picture = folder / "loop.png"
    write_picture(folder, rounds, table, picture)
    print(f"\nthe corrected predictions, and the others before and after: {picture}")
    for one in rounds[1:]:
        chosen_picture = one.folder / "results/LABEL_NEXT/label_next.png"
        print(f"what the chosen radiographs stand for: {chosen_picture}")


def read_rounds(folder: Path) -> list[Round]:
    """The rounds, in order; the first one without corrections."""
    folders = sorted(folder.glob("round_*"))
    rows: list[list[dict[str, str]]] = [[]]
    for one in folders[1:]:
        with open(one / "results/LABEL_NEXT/label_next.csv", newline="") as file:
            rows.append(list(csv.DictReader(file)))
    labels = len(list_images(str(folder / "data/Split/TRAIN/IMG"))) - sum(map(len, rows))
    rounds = []
    for one, chosen in zip(folders, rows):
        labels += len(chosen)
        names = [stem(row["file"]) for row in chosen]
        rounds.append(Round(one, labels, names, [row["uncertainty"] for row in chosen]))
    return rounds


def wrong_shares(folder: Path, one: Round) -> dict[str, float]:
    """The share of pixels that were predicted wrongly before a round, by film."""
    paths = {Path(path).stem: path for path in list_images(str(one.folder / "results/MASK"))}
    masks = {name: (read_mask(path), true_mask(folder, name)) for name, path in paths.items()}
    return {name: float((mask != true).mean()) for name, (mask, true) in masks.items()}


def true_mask(folder: Path, name: str) -> np.ndarray:
    return read_mask(str(folder / f"truth/{name}.png"))


def write_picture(folder: Path, rounds: list[Round], table: ClassTable, path: Path) -> None:
    """A grid: for each round its predictions and, below, their corrections; then held-out films."""
    columns = max(len(rounds) + 2, *(len(one.chosen) for one in rounds))
    rows: list[list[tuple[str, np.ndarray]]] = []

    def tile(image: Path, mask: np.ndarray | None = None) -> np.ndarray:
        grey = read_image(str(image), 1)
        shown = np.zeros(grey.shape[:2], np.uint8) if mask is None else mask
        return overlay(*(a.repeat(ENLARGED, 0).repeat(ENLARGED, 1) for a in (grey, shown)), table)

    for number, one in enumerate(rounds[1:], 1):
        film = {name: folder / f"films/{name}.png" for name in one.chosen}
        predicted = [
            tile(film[name], read_mask(str(one.folder / f"results/MASK/{name}.png")))
            for name in one.chosen
        ]
        captions = [f"round {number}, uncertainty {value}" for value in one.uncertainties]
        rows.append([*zip(captions, predicted)])
        rows.append([("corrected", tile(film[n], true_mask(folder, n))) for n in one.chosen])
    for image in sorted((folder / "test/IMG").iterdir())[:HELD_OUT]:
        true = read_mask(str(folder / "test/MASK" / image.name))
        row = [("held out", tile(image)), ("truth", tile(image, true))]
        for one in rounds:
            mask = read_mask(str(one.folder / "test/MASK" / f"{image.stem}.png"))
            row.append((f"{one.title}, wrong {(mask != true).mean():.1%}", tile(image, mask)))
        rows.append(row)
    blank = np.zeros_like(rows[0][0][1])
    rows = [[*row, *[("", blank)] * (columns - len(row))] for row in rows]
    captions, tiles = zip(*(entry for row in rows for entry in row))
    save_picture(str(path), Image.fromarray(image_grid(np.stack(tiles), captions, columns)))


if __name__ == "__main__":
    command(main)()
