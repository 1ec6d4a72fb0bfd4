"""What predict.py leaves: masks, colours, overlays, probabilities and areas.csv."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from guided_diffusion.checkpoint import write_atomically
from guided_diffusion.errors import UserError
from guided_diffusion.image_io import list_images, write_image, write_mask
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.render import overlay, save_color_mask

FOLDERS = ("MASK", "COLOR", "OVERLAY")


@dataclass(frozen=True)
class Item:
    """A radiograph to segment: its file, and its name (sub-folder included) in the results."""

    path: str
    name: str


def find_items(source: str, output: str) -> list[Item]:
    """The radiographs under a file, folder or glob, but not what lies in the output folder.

    :raises UserError: if two of them would have the same name in the results.
    """
    results = tuple(os.path.abspath(os.path.join(output, name)) + os.sep for name in FOLDERS)
    paths = [path for path in list_images(source) if not os.path.abspath(path).startswith(results)]
    base = (
        source
        if os.path.isdir(source)
        else os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    )
    items: dict[str, Item] = {}
    for path in paths:
        name = os.path.splitext(os.path.relpath(os.path.abspath(path), os.path.abspath(base)))[0]
        if name in items:
            raise UserError(
                f"{items[name].path} and {path} would both be written as MASK/{name}.png:"
                " rename one, or predict them into different folders"
            )
        items[name] = Item(path, name)
    return list(items.values())


def write_results(
    output: str,
    item: Item,
    image: np.ndarray,
    probabilities: np.ndarray,
    categories: Sequence[Category],
    save_probabilities: bool = False,
) -> np.ndarray:
    """Write one radiograph's results; returns its mask, uint8 `[H x W]`.

    :param image: as read, `[H x W]` or `[H x W x 3]`.
    :param probabilities: float32 `[C x H x W]`.
    """
    mask = probabilities.argmax(axis=0).astype(np.uint8)
    paths = {folder: os.path.join(output, folder, f"{item.name}.png") for folder in FOLDERS}
    for path in paths.values():
        os.makedirs(os.path.dirname(path), exist_ok=True)
    write_mask(paths["MASK"], mask)
    save_color_mask(paths["COLOR"], mask, categories)
    write_image(paths["OVERLAY"], overlay(image, mask, categories))
    if save_probabilities:
        path = os.path.join(output, "PROBABILITIES", f"{item.name}.npz")
        half = probabilities.astype(np.float16)
        write_atomically(path, lambda file: np.savez_compressed(file, probabilities=half))
    return mask


def areas_row(item: Item, mask: np.ndarray, categories: Sequence[Category]) -> dict[str, object]:
    """Pixels of each class and their share of the image."""
    counts = np.bincount(mask.ravel(), minlength=len(categories))
    row: dict[str, object] = {"name": item.name, "height": mask.shape[0], "width": mask.shape[1]}
    for category in categories:
        row[f"{category.name} pixels"] = int(counts[category.index])
        row[f"{category.name} share"] = round(counts[category.index] / mask.size, 6)
    return row


def write_areas(output: str, rows: Sequence[dict[str, object]]) -> None:
    """Write areas.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    write_atomically(os.path.join(output, "areas.csv"), lambda file: file.write(data))
