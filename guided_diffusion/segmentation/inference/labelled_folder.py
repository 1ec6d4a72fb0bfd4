"""A folder of labelled radiographs that grows by one pair at a time: IMG, MASK, categories.json."""

import contextlib
import filecmp
import os
from dataclasses import dataclass

import numpy as np

from guided_diffusion.images.files import looks_like_image
from guided_diffusion.images.masks import LOSSLESS_EXTENSIONS, write_mask
from guided_diffusion.images.names import composed, is_ignored, stem, without_mask_suffix
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import check_output, copy_file, is_local, save_json
from guided_diffusion.runtime.text import visible
from guided_diffusion.segmentation.categories import (
    TABLE_NAME,
    ClassTable,
    check_same_classes,
    load_categories,
    to_plain,
)

IMAGES, MASKS = "IMG", "MASK"


class AlreadySaved(UserError):
    """The radiograph has a mask, and nobody said that it may be replaced."""


@dataclass(frozen=True)
class Place:
    """Where a radiograph and its mask belong, by file names in IMG and MASK.

    has_image, has_mask: whether they are there already.
    """

    image: str
    mask: str
    has_image: bool
    has_mask: bool

    def __str__(self) -> str:
        return visible(f"{IMAGES}/{self.image} and {MASKS}/{self.mask}")


class LabelledFolder:
    """A folder as fine-tuning reads it. No radiograph in it is ever replaced.

    :param path: of the folder, which need not exist.
    :param categories: the classes of the masks to come.
    :raises UserError: if nothing can be written there, or if its class table lists other classes.
    """

    def __init__(self, path: str, categories: ClassTable):
        if not is_local(path):
            raise UserError(f"--save_dir {path}: name a folder of this machine")
        self.path = path
        self.categories = categories
        for folder in (path, self._path(IMAGES), self._path(MASKS)):
            check_output(folder, folder=True)
        self._table = self._path(TABLE_NAME)
        if os.path.exists(self._table):
            self.categories = load_categories(self._table)
            remedy = "name another --save_dir, or a model of the folder's classes"
            check_same_classes(self.categories, categories, (self._table, "the model"), remedy)

    @property
    def name(self) -> str:
        """What the folder is called, without where it is."""
        return visible(os.path.basename(os.path.abspath(self.path)))

    def place(self, name: str, path: str) -> Place:
        """Where a radiograph belongs.

        :param name: of the file, as its owner calls it.
        :param path: where its content is.
        :raises UserError: if the name cannot be kept, or belongs to another radiograph or mask.
        """
        shown = visible(name)
        if not name or not name.isprintable() or any(c in name for c in "/\\"):
            raise UserError(f"{shown!r} is no name that a file can keep: rename the radiograph")
        if is_ignored(name) or not looks_like_image(path, name):
            raise UserError(
                f"{shown} would not be found among the radiographs, as it is hidden or has not the"
                " ending of an image: rename it"
            )
        key = stem(name)
        images = {file: stem(file) for file in _visible_files(self._path(IMAGES))}
        taken = [file for file, other in images.items() if _same(other, key)]
        masks = [
            file
            for file in _visible_files(self._path(MASKS))
            if _same(stem(file), key)
            or (_same(without_mask_suffix(stem(file)), key) and stem(file) not in images.values())
        ]
        listed = visible(", ".join(f"{MASKS}/{file}" for file in masks))
        if not taken:
            if masks:
                raise UserError(
                    f"{listed} is there without a radiograph, and would seem to be that of"
                    f" {shown}: rename the radiograph, or move the mask away"
                )
            return Place(name, f"{key}.png", False, False)
        if len(taken) > 1 or len(masks) > 1:
            several = visible(", ".join(f"{IMAGES}/{file}" for file in taken))
            raise UserError(f"{several} and {listed} do not pair: keep one file of each name")
        if not filecmp.cmp(path, os.path.join(self._path(IMAGES), taken[0]), shallow=False):
            raise UserError(
                f"{visible(f'{IMAGES}/{taken[0]}')} is another radiograph of this name: rename"
                f" {shown}"
            )
        if masks and os.path.splitext(masks[0])[1].lower() not in LOSSLESS_EXTENSIONS:
            raise UserError(f"{listed} is no file that can be replaced: save it as PNG")
        mask = masks[0] if masks else f"{stem(taken[0])}.png"
        return Place(taken[0], mask, True, bool(masks))

    def check(self, place: Place) -> None:
        """:raises UserError: if its files cannot be written."""
        for folder, name in ((IMAGES, place.image), (MASKS, place.mask)):
            check_output(os.path.join(self._path(folder), name))

    def save(self, name: str, path: str, mask: np.ndarray, replace: bool = False) -> Place:
        """Save a radiograph, byte for byte, and its mask; both or neither.

        :param name, path: see `place`.
        :param mask: class indices, uint8 `[H x W]`, of the radiograph's size.
        :param replace: whether the mask that it has may be replaced.
        :raises AlreadySaved: if it has one and may not.
        :raises UserError: as `place` does, or if the files cannot be written.
        """
        place = self.place(name, path)
        if place.has_mask and not replace:
            raise AlreadySaved(f"{visible(f'{MASKS}/{place.mask}')} was saved before: replace it?")
        self.check(place)
        if not os.path.exists(self._table):
            save_json(self._table, to_plain(self.categories))
        image = os.path.join(self._path(IMAGES), place.image)
        if not place.has_image:
            copy_file(path, image)
        try:
            write_mask(os.path.join(self._path(MASKS), place.mask), mask)
        except BaseException:
            if not place.has_image:
                with contextlib.suppress(OSError):
                    os.remove(image)
            raise
        return place

    def _path(self, name: str) -> str:
        return os.path.join(self.path, name)


def _visible_files(folder: str) -> list[str]:
    return sorted(name for name in _listed(folder) if not is_ignored(name))


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _same(one: str, other: str) -> bool:
    """Whether names are one on some file system: composed or not, in upper or lower case."""
    return composed(one).casefold() == composed(other).casefold()
