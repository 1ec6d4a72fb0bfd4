"""Coloured masks beside images, as tools/rgb2tif.py converts them, with the class table given."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from guided_diffusion.preparation.importing.classes import BACKGROUND, IGNORED
from guided_diffusion.preparation.layouts import list_items, sources
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.source import (
    Drawing,
    ImageName,
    Region,
    Size,
    Source,
)
from guided_diffusion.segmentation.categories import Category, ClassTable, load_categories
from guided_diffusion.segmentation.visuals.color_masks import (
    indices_from_colors,
    read_color_mask,
    unknown_colors,
)

TITLE = "coloured masks"


@dataclass(frozen=True)
class _Color:
    """The pixels of one entry of the class table."""

    path: str
    table: ClassTable
    value: int
    where: str

    def draw(self, size: Size) -> np.ndarray:
        values = _indices(self.path, self.table)
        if values.shape != size:
            raise UserError(
                f"{self.where} has {values.shape[0]} x {values.shape[1]} pixels (height x width),"
                f" its image has {size[0]} x {size[1]}; export both at one size"
            )
        return values == self.value


def recognises(path: str) -> bool:
    try:
        return any(item.mask for item in list_items(sources(path))[0])
    except UserError:
        return False


def read(path: str, categories: str) -> Source:
    """The masks of a data set in any known layout.

    :param categories: class table; "" for the project's own.
    :raises UserError: if a mask has a colour of no class.
    """
    table = load_categories(categories or None)
    source = Source()
    for category in table[1:]:
        source.add_class(category.name, category.color)
    items, unpaired = list_items(sources(path))
    for one in unpaired:
        source.omit(one.path, one.text)
    for item in items:
        if item.mask is None:
            continue
        strange = unknown_colors(read_color_mask(item.mask), table.entries)
        if strange:
            color, count = next(iter(strange.items()))
            raise UserError(
                f"{item.mask} holds the colour {color} of no class in {count} pixels; give its"
                " class table with --categories, or convert it with tools/rgb2tif.py --unknown"
            )
        values = np.unique(_indices(item.mask, table))
        regions = []
        for category in table.entries:
            if category.index in values:
                name = _name(category, table)
                source.add_class(name)
                shape = _Color(item.mask, table, category.index, item.mask)
                regions.append(Region(name, f"{item.mask} ({name})", shape))
        source.drawings.append(Drawing(ImageName(item.name, path=item.image), item.mask, regions))
    return source


def _name(category: Category, table: ClassTable) -> str:
    if category in table.ignored:
        return IGNORED[0]
    return category.name if category.index else BACKGROUND[0]


@lru_cache(maxsize=2)
def _indices(path: str, table: ClassTable) -> np.ndarray:
    return indices_from_colors(read_color_mask(path), table, "nearest")
