"""What prediction writes: masks, colours, overlays, probabilities, uncertainty and areas.csv."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guided_diffusion.images.files import list_radiographs, name_images, real_path
from guided_diffusion.images.image_io import write_image
from guided_diffusion.images.left_out import EXPORT_FOLDER, LABEL_NEXT_FOLDER, RESULT_FOLDERS
from guided_diffusion.images.masks import write_mask
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import write_atomically
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.segmentation.visuals.render import heat, overlay, save_color_mask
from guided_diffusion.segmentation.visuals.report import Card, make_card

# a row of areas.csv by column; the columns depend on the class table
AreasRow = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A radiograph to segment: its file, and its name in the results (with its sub-folder)."""

    path: str
    name: str


def find_items(
    sources: str | Sequence[str], output: str, say: Callable[[str], None] = print
) -> list[Item]:
    """The radiographs in files, folders or globs, without the results in the output folder.

    :param say: called with a line about files that were left out.
    :raises UserError: if two radiographs would have the same name in the results.
    """
    folders = (*RESULT_FOLDERS, EXPORT_FOLDER, LABEL_NEXT_FOLDER)
    results = [os.path.join(output, name) for name in folders]
    items: dict[str, Item] = {}
    names: dict[str, str] = {}
    for source in [sources] if isinstance(sources, str) else sources:
        paths, note = list_radiographs(source, *results)
        if note:
            say(f"{source}: {note}")
        for path, name in zip(paths, name_images(source, paths)):
            if names.setdefault(real_path(path), name) != name:
                continue  # the same file, by way of another folder
            item = items.setdefault(name, Item(path, name))
            if os.path.realpath(item.path) != os.path.realpath(path):
                raise UserError(
                    f"{item.path} and {path} would both be written as MASK/{name}.png:"
                    " rename one, or predict them into different folders"
                )
    return list(items.values())


@dataclass(frozen=True)
class Result:
    """A segmented radiograph.

    image: as read, `[H x W]` or `[H x W x 3]`. mask: uint8 `[H x W]`.
    """

    item: Item
    image: np.ndarray
    mask: np.ndarray
    prediction: Prediction

    def areas(self, categories: Sequence[Category]) -> AreasRow:
        """Its row of areas.csv: the pixels of each class, their share of the image, uncertainty."""
        counts = np.bincount(self.mask.ravel(), minlength=len(categories))
        height, width = self.mask.shape
        row: AreasRow = {"name": self.item.name, "height": height, "width": width}
        for category in categories:
            row[f"{category.name} pixels"] = int(counts[category.index])
            row[f"{category.name} share"] = round(counts[category.index] / self.mask.size, 6)
        row["uncertainty"] = round(float(self.prediction.uncertainty.mean()), 6)
        if self.prediction.disagreement is not None:
            row["disagreement"] = round(float(self.prediction.disagreement.mean()), 6)
        return row

    def card(self, row: AreasRow, categories: Sequence[Category], **options: Any) -> Card:
        """Its card in the report, with the figures of its row of areas.csv.

        :param options: further arguments of `make_card`.
        """
        scores: dict[str, float] = {
            name: row[name] for name in ("uncertainty", "disagreement") if name in row
        }
        areas = {c.index: [100 * row[f"{c.name} share"]] for c in categories[1:]}
        options |= {"urgency": row["uncertainty"], "prediction": self.prediction}
        return make_card(self.item.name, self.image, self.mask, scores, areas, **options)


def result_paths(output: str, items: Iterable[Item]) -> list[str]:
    """The pictures and tables that a prediction may write."""
    names = [f"{item.name}.png" for item in items]
    pictures = [os.path.join(folder, name) for name in names for folder in RESULT_FOLDERS]
    return [os.path.join(output, name) for name in (*pictures, "areas.csv", "report.html")]


def write_result(
    output: str,
    result: Result,
    categories: Sequence[Category],
    save_probabilities: bool = False,
    save_uncertainty: bool = False,
) -> None:
    """Write one radiograph's files into the folders under `output`."""

    def path(folder: str, extension: str = "png") -> str:
        return os.path.join(output, folder, f"{result.item.name}.{extension}")

    prediction = result.prediction
    write_mask(path("MASK"), result.mask)
    save_color_mask(path("COLOR"), result.mask, categories)
    write_image(path("OVERLAY"), overlay(result.image, result.mask, categories))
    if save_probabilities:
        _write_half(path("PROBABILITIES", "npz"), {"probabilities": prediction.probabilities})
    if save_uncertainty:
        write_image(path("UNCERTAINTY"), heat(prediction.uncertainty))
        maps = {"uncertainty": prediction.uncertainty}
        if prediction.disagreement is not None:
            maps["disagreement"] = prediction.disagreement
        _write_half(path("UNCERTAINTY", "npz"), maps)


def _write_half(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    half: dict[str, Any] = {name: array.astype(np.float16) for name, array in arrays.items()}
    write_atomically(path, lambda file: np.savez_compressed(file, **half))


def masks_of_others(output: str, names: Iterable[str]) -> list[str]:
    """The files in MASK, apart from those of the radiographs with these names."""
    folder = os.path.join(output, "MASK")
    found = (os.path.join(top, name) for top, _, files in os.walk(folder) for name in files)
    relative = {os.path.relpath(path, folder) for path in found}
    return sorted(relative - {os.path.normpath(f"{name}.png") for name in names})


def describe(row: AreasRow, categories: Sequence[Category]) -> str:
    """One radiograph's areas on a line."""
    shares = [f"{c.name} {100 * row[f'{c.name} share']:.1f} %" for c in categories[1:]]
    return f"{row['name']}: {', '.join(shares)}; uncertainty {row['uncertainty']:.4f}"
