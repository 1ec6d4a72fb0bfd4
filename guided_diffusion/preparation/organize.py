"""A data set laid out as Split/TRAIN/{IMG,MASK} and Split/VAL/{IMG,MASK}."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from guided_diffusion.images.image_io import ImageError, read_mask
from guided_diffusion.preparation.division import divide, read_groups
from guided_diffusion.preparation.layouts import Item
from guided_diffusion.preparation.repair import copy_pair
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import write_atomically


@dataclass(frozen=True)
class Placed:
    """An item and the side it comes to."""

    item: Item
    split: str
    group: str = ""


def is_divided(items: Sequence[Item]) -> bool:
    """Whether the source already says what trains and what validates."""
    return {"TRAIN", "VAL"} <= {item.split for item in items}


def keep_split(items: Sequence[Item]) -> list[Placed]:
    """As the source has it."""
    return [Placed(item, item.split or "TRAIN") for item in items]


def place(items: Sequence[Item], wanted: int | float, rule: str, seed: int) -> list[Placed]:
    """Divide anew; what the source keeps for TEST stays there.

    :param wanted: images for TRAIN: their number, or as a float their share.
    :param rule: what tells the patient, see `division.read_groups`.
    """
    kept = [Placed(item, "TEST") for item in items if item.split == "TEST"]
    free = [item for item in items if item.split != "TEST"]
    groups = read_groups([item.stem for item in free], rule)
    number = wanted if isinstance(wanted, int) else max(1, round(wanted * len(free)))
    train = divide(groups, _classes_in(free), number, seed)
    return kept + [
        Placed(item, "TRAIN" if chosen else "VAL", group if rule else "")
        for item, chosen, group in zip(free, train, groups)
    ]


def write_split(placed: Sequence[Placed], folder: str) -> str:
    """Copy the files to FOLDER/TRAIN/IMG and so on; returns the path of the list, split.csv.

    :raises UserError: where two files would have the same name, before anything is written.
    """
    taken: dict[tuple[str, str], str] = {}
    for one in placed:
        if one.item.mask is None:
            raise UserError(f"{one.item.image} has no mask; give --mask-dir or --source-dir")
        other = taken.setdefault((one.split, one.item.stem), one.item.image)
        if other != one.item.image:
            raise UserError(
                f"{other} and {one.item.image} would both be {one.split}/{one.item.stem}; "
                "rename one"
            )
    for one in tqdm(placed, desc="copying", unit="image", disable=None, leave=False):
        copy_pair(one.item, folder, split=one.split)
    text = io.StringIO(newline="")
    rows = sorted((one.item.stem, one.split, one.group) for one in placed)
    csv.writer(text, lineterminator="\n").writerows([("name", "split", "group"), *rows])
    path = os.path.join(folder, "split.csv")
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    return path


def _classes_in(items: Sequence[Item]) -> np.ndarray:
    """Whether each image holds each class, bool [N x 256]; empty columns do no harm."""
    classes = np.zeros((len(items), 256), bool)
    for row, item in zip(classes, tqdm(items, desc="reading", disable=None, leave=False)):
        if item.mask is None:
            raise UserError(f"{item.image} has no mask; give --mask-dir or --source-dir")
        try:
            row[np.unique(read_mask(item.mask))] = True
        except ImageError as error:
            raise UserError(f"{error}; see --action validate") from error
    return classes
