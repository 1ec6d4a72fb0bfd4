"""What predict.py leaves: masks, colours, overlays, probabilities, uncertainty and areas.csv."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from guided_diffusion.images.files import list_images
from guided_diffusion.images.image_io import write_image, write_mask
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import write_atomically
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.segmentation.visuals.render import heat, overlay, save_color_mask

FOLDERS = ("MASK", "COLOR", "OVERLAY", "UNCERTAINTY", "PROBABILITIES")


@dataclass(frozen=True)
class Item:
    """A radiograph to segment: its file, and its name (sub-folder included) in the results."""

    path: str
    name: str


def find_items(sources: str | Sequence[str], output: str) -> list[Item]:
    """The radiographs under files, folders or globs, but not what lies in the output folder.

    :raises UserError: if two of them would have the same name in the results.
    """
    results = tuple(os.path.abspath(os.path.join(output, name)) + os.sep for name in FOLDERS)
    items: dict[str, Item] = {}
    for source in [sources] if isinstance(sources, str) else sources:
        paths = [p for p in list_images(source) if not os.path.abspath(p).startswith(results)]
        base = (
            source
            if os.path.isdir(source)
            else os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        )
        for path in paths:
            relative = os.path.relpath(os.path.abspath(path), os.path.abspath(base))
            name = os.path.splitext(relative)[0]
            item = items.setdefault(name, Item(path, name))
            if os.path.abspath(item.path) != os.path.abspath(path):
                raise UserError(
                    f"{item.path} and {path} would both be written as MASK/{name}.png:"
                    " rename one, or predict them into different folders"
                )
    return list(items.values())


def write_results(
    output: str,
    item: Item,
    image: np.ndarray,
    mask: np.ndarray,
    prediction: Prediction,
    categories: Sequence[Category],
    save_probabilities: bool = False,
    save_uncertainty: bool = False,
) -> None:
    """Write one radiograph's results.

    :param image: as read, `[H x W]` or `[H x W x 3]`.
    :param mask: uint8 `[H x W]`.
    """

    def path(folder: str, ending: str = "png") -> str:
        file = os.path.join(output, folder, f"{item.name}.{ending}")
        os.makedirs(os.path.dirname(file), exist_ok=True)
        return file

    write_mask(path("MASK"), mask)
    save_color_mask(path("COLOR"), mask, categories)
    write_image(path("OVERLAY"), overlay(image, mask, categories))
    if save_probabilities:
        _write_halves(path("PROBABILITIES", "npz"), probabilities=prediction.probabilities)
    if save_uncertainty:
        write_image(path("UNCERTAINTY"), heat(prediction.uncertainty))
        maps = {"uncertainty": prediction.uncertainty}
        if prediction.disagreement is not None:
            maps["disagreement"] = prediction.disagreement
        _write_halves(path("UNCERTAINTY", "npz"), **maps)


def _write_halves(path: str, **arrays: np.ndarray) -> None:
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    write_atomically(path, lambda file: np.savez_compressed(file, **halves))


def areas_row(
    item: Item, mask: np.ndarray, prediction: Prediction, categories: Sequence[Category]
) -> dict[str, object]:
    """Mean uncertainty, and the pixels of each class with their share of the image."""
    counts = np.bincount(mask.ravel(), minlength=len(categories))
    row: dict[str, object] = {"name": item.name, "height": mask.shape[0], "width": mask.shape[1]}
    for category in categories:
        row[f"{category.name} pixels"] = int(counts[category.index])
        row[f"{category.name} share"] = round(counts[category.index] / mask.size, 6)
    row["uncertainty"] = round(float(prediction.uncertainty.mean()), 6)
    if prediction.disagreement is not None:
        row["disagreement"] = round(float(prediction.disagreement.mean()), 6)
    return row


def write_areas(output: str, rows: Sequence[dict[str, object]]) -> None:
    """Write areas.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    write_atomically(os.path.join(output, "areas.csv"), lambda file: file.write(data))
