"""The report at the end of `make demo`: Dice of the networks, and where the pictures are."""

import sys
from collections.abc import Sequence
from pathlib import Path

import _path  # noqa: F401 - makes the package importable without installing it
import numpy as np

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import read_image, write_image
from guided_diffusion.images.masks import read_mask
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.runtime.storage.files import read_json
from guided_diffusion.segmentation.categories import load_categories
from guided_diffusion.segmentation.visuals.render import comparison

TITLES = {"pretrained": "pretrained", "imagenet": "ImageNet", "scratch": "from scratch"}
ENLARGED = 4


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("demo_report.py needs one argument, the folder of the demo")
    folder = Path(sys.argv[1])
    metrics = {kind: read_json(str(folder / kind / "evaluation/metrics.json")) for kind in TITLES}
    names = list(metrics["pretrained"]["per_class"])
    print(f"\nDice on {len(pairs(folder))} held-out radiographs, fine-tuned on 2 labelled ones\n")
    print(" " * 24 + "".join(f"{title:>14}" for title in TITLES.values()))
    for name in names:
        print_row(name, [metrics[kind]["per_class"][name]["dice"] for kind in TITLES])
    print_row("mean of the foreground", [metrics[kind]["mean_dice"] for kind in TITLES])
    print(
        "\n400 steps for all; longer training would help random weights most. After such a short"
        "\npretraining, averaging with the ImageNet network lowers the Dice with two labels: see"
        "\npartner in comparison/table.md, and docs/label-efficiency.md for longer pretraining\n"
    )
    picture = folder / "overlays.png"
    write_overlays(folder, picture, [*TITLES], 5)
    write_overlays(folder, folder / "example.png", ["pretrained"], 2)
    grid = sorted((folder / "pretrained").glob("samples_*.png"))[-1]
    print(f"radiograph, truth, {', '.join(TITLES.values())}: {picture}")
    print(f"Dice by the number of labels, curves:        {folder / 'comparison/curves.png'}")
    curves = folder / "pretrained/segm_logs/curves.png"
    print(f"curves of fine-tuning:                       {curves}")
    print(f"radiographs sampled by the diffusion model:  {grid}")
    print(f"masks, colours, overlays, areas.csv:         {folder / 'pretrained/results'}")


def print_row(name: str, scores: Sequence[float]) -> None:
    print(f"{name:<24}" + "".join(f"{score:>14.3f}" for score in scores))


def pairs(folder: Path) -> list[tuple[str, str, str]]:
    truth = folder / "held_out/Split/VAL"
    return pair_files(str(truth / "IMG"), str(truth / "MASK"))


def write_overlays(folder: Path, path: Path, kinds: Sequence[str], count: int) -> None:
    """One row per radiograph: itself, the ground truth, the predictions of `kinds`; enlarged."""

    def enlarge(array: np.ndarray) -> np.ndarray:
        return array.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)

    images, masks = [], []
    for name, image_path, mask_path in pairs(folder)[:count]:
        predicted = [folder / kind / "results/MASK" / f"{name}.png" for kind in kinds]
        images.append(enlarge(read_image(image_path, 1)))
        masks.append([enlarge(read_mask(str(m))) for m in (mask_path, *predicted)])
    write_image(str(path), comparison(images, masks, load_categories()))


if __name__ == "__main__":
    command(main)()
