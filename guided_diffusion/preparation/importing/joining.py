"""Imported masks join labelled radiographs that are there already, and keep apart from others."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.masks import LOSSLESS_EXTENSIONS, write_mask
from guided_diffusion.images.names import ending
from guided_diffusion.images.splits import list_held_out
from guided_diffusion.preparation.config import ImportConfig
from guided_diffusion.preparation.importing.apart import Film, Likeness, check_apart
from guided_diffusion.preparation.importing.items import ImageItem
from guided_diffusion.preparation.importing.report import Report
from guided_diffusion.preparation.layouts import sources
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import track
from guided_diffusion.runtime.storage.files import copy_file, save_json
from guided_diffusion.runtime.storage.together import together
from guided_diffusion.segmentation.categories import (
    TABLE_NAME,
    check_same_classes,
    load_categories,
    table_beside,
    to_plain,
)

REPORT = "import.json"


@dataclass(frozen=True)
class Pair:
    """A radiograph of the folder and its mask."""

    name: str
    image: str
    mask: str


@dataclass(frozen=True)
class Placement:
    """Where a mask goes, and its image if that is new (else image is "")."""

    item: ImageItem
    image: str
    mask: str


@dataclass(frozen=True)
class Target:
    """The folder that is joined: its own folders of images and masks, class table and pairs.

    table_path: where the class table was found. others: radiographs to keep apart from.
    """

    folder: str
    images: str
    masks: str
    table_path: str
    pairs: list[Pair]
    others: list[Film]

    @classmethod
    def open(cls, config: ImportConfig) -> "Target":
        """:raises UserError: for a folder without labelled radiographs, or of other classes."""
        folder = config.into
        if not os.path.isdir(folder):
            raise UserError(f"--into {folder} is not a folder; for a new one, name it as OUTPUT")
        found = sources(folder)
        if len(found) != 1 or found[0].image_dir == found[0].mask_dir:
            raise UserError(
                f"--into {folder}: expected one folder of images and one of masks in it, IMG and"
                " MASK; name the one that holds both, such as Split/TRAIN"
            )
        images, masks = found[0].image_dir, found[0].mask_dir
        pairs = [Pair(*row) for row in pair_files(images, masks)]
        path = _find_table(folder, config.categories)
        rule = load_categories(path).mask_rule()
        for pair in pairs:
            rule.read(pair.mask)
        others = [Film(*film) for film in list_held_out(folder, config.avoid, "--into")]
        return cls(folder, images, masks, path, pairs, others)

    @property
    def films(self) -> list[Film]:
        return [Film(pair.name, pair.image) for pair in self.pairs]

    def place(
        self, items: Sequence[ImageItem], sizes: Mapping[str, tuple[int, int]], config: ImportConfig
    ) -> list[Placement]:
        """Where everything goes.

        :param sizes: of the imported images by name, (height, width).
        :raises UserError: for an image or a patient that is among the others, and for images that
            are there already, unless their masks are to be replaced.
        """
        new = [Film(item.name, item.path, item.origin) for item in items]
        likeness = Likeness([*self.others, *self.films, *new])
        check_apart(new, self.films, self.others, likeness, config.group)
        pairs = {pair.name: pair for pair in self.pairs}
        taken: dict[str, ImageItem] = {}
        placements = []
        for item, film in zip(items, new):
            pair = self._there(film, pairs, likeness)
            if pair is None:
                image = os.path.join(self.images, item.name + ending(item.path))
                mask = os.path.join(self.masks, f"{item.name}.png")
                placements.append(Placement(item, image, mask))
                continue
            if not config.replace:
                raise UserError(
                    f"{item.origin} is in {self.folder} already, as {pair.image}: leave it out, or"
                    " replace its mask with --replace"
                )
            other = taken.setdefault(pair.name, item)
            if other is not item:
                raise UserError(
                    f"{other.origin} and {item.origin} both are {pair.image}: remove one of them"
                )
            self._check_replaceable(pair, item, sizes[item.name])
            placements.append(Placement(item, "", pair.mask))
        return placements

    def join(
        self,
        placements: Sequence[Placement],
        mask_of: Callable[[ImageItem], np.ndarray],
        report: Report,
    ) -> str:
        """Write everything, or nothing if that fails; returns what to tell the user.

        :param mask_of: draws the mask of an image, uint8 [H x W].
        """
        with together(self.folder) as changes:
            for one in track(placements, "writing"):
                if one.image:
                    changes.write(one.image, partial(copy_file, one.item.path))
                mask = mask_of(one.item)
                changes.write(one.mask, partial(write_mask, mask=mask))
            record = self._new_record()
            changes.write(record, lambda path: save_json(path, report.to_plain()))
            if not table_beside(self.folder):
                table = to_plain(load_categories(self.table_path))
                own = os.path.join(self.folder, TABLE_NAME)
                changes.write(own, lambda path: save_json(path, table))
        new = sum(bool(one.image) for one in placements)
        apart = f"kept apart from {len(self.others)} radiographs" if self.others else ""
        return (
            f"{self.folder} has {new} new images and {len(placements) - new} corrected masks;"
            f" {apart or 'nothing says from which radiographs to keep apart (--avoid)'}"
        )

    def _new_record(self) -> str:
        """A name for the report of this import, beside those of earlier ones."""
        stem, end = os.path.splitext(REPORT)
        names = [REPORT, *(f"{stem}_{number}{end}" for number in range(2, 10**4))]
        paths = (os.path.join(self.folder, name) for name in names)
        return next(path for path in paths if not os.path.lexists(path))

    def _there(self, film: Film, pairs: Mapping[str, Pair], likeness: Likeness) -> Pair | None:
        """The radiograph of the folder that an imported one is."""
        same = likeness.identical(film, self.films)
        if same is not None:
            return pairs[same.name]
        pair = pairs.get(film.name)
        if pair is not None and not likeness.alike(film, Film(pair.name, pair.image)):
            raise UserError(
                f"{film.shown} and {pair.image} have the same name and are different pictures:"
                " rename one of them; or is it a copy that a tool showed? Name the folder of the"
                " radiographs with --images"
            )
        return pair

    def _check_replaceable(self, pair: Pair, item: ImageItem, size: tuple[int, int]) -> None:
        height, width = read_image(pair.image).shape[:2]
        if (height, width) != size:
            raise UserError(
                f"{item.origin} has {size[0]} x {size[1]} pixels (height x width), {pair.image} has"
                f" {height} x {width}; draw on an image of the same size"
            )
        if os.path.splitext(pair.mask)[1].lower() not in LOSSLESS_EXTENSIONS:
            raise UserError(
                f"{pair.mask} is of a format in which masks are not written: convert it to PNG"
            )

    def check_values(self, item: ImageItem, mask: np.ndarray) -> None:
        """:raises UserError: for values in a mask [H x W] that the class table does not have."""
        table = load_categories(self.table_path)
        known = [category.index for category in table.entries]
        unknown = sorted(set(np.unique(mask).tolist()) - set(known))
        if unknown:
            raise UserError(
                f"{item.origin} has pixels without a label, {unknown[0]} in masks, for which"
                f" {self.table_path} has no entry: add"
                f' {{"index": {unknown[0]}, "name": "unlabelled", "color": [128, 128, 128],'
                ' "ignore": true}'
            )


def _find_table(folder: str, given: str) -> str:
    """The class table of a folder's masks: its own, that beside it, or the one given.

    :raises UserError: if there is none, or the one given has other classes than the folder's own.
    """
    own = table_beside(folder)
    if not own and not given:
        raise UserError(
            f"--into {folder} has no {TABLE_NAME}: give the class table of its masks with"
            " --categories"
        )
    if own and given:
        remedy = "masks of both cannot be mixed; leave out --categories"
        check_same_classes(load_categories(own), load_categories(given), (own, given), remedy)
    return own or given
