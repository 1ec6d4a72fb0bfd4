"""What tools/export_labels.py does: index masks that exist to files of annotation tools."""

import os
from dataclasses import dataclass

import numpy as np

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.masks import check_sizes, count_classes, read_mask
from guided_diffusion.images.names import stem
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import track
from guided_diffusion.runtime.storage.files import expand_path
from guided_diffusion.segmentation.annotations.writing.config import (
    FORMATS,
    ExportLabelsConfig,
    parse_formats,
)
from guided_diffusion.segmentation.annotations.writing.export import Export
from guided_diffusion.segmentation.categories import ClassTable, resolve_categories, table_of_masks


@dataclass(frozen=True)
class _Pair:
    """A radiograph and the file of its mask."""

    name: str
    path: str
    mask: str


def export_labels(masks: str, images: str, output: str, config: ExportLabelsConfig) -> None:
    """Write the masks of a folder, or of one file, in every format asked for.

    :param masks: or an output folder of predict.py, whose MASK folder is read.
    :raises UserError: before anything is written, if a mask or radiograph cannot be read, sizes
        differ, or a file exists already.
    """
    formats = parse_formats(config.format, "--format")
    if not formats:
        raise UserError(f"--format is missing: name one of {', '.join(FORMATS)}, or several")
    pairs = _pairs(masks, images)
    table = _table(pairs, config)
    export = Export(output, formats, pairs, table, config.tolerance, drawn=True)
    for pair in track(pairs, "checking", "mask"):
        check_sizes(pair.mask, _read(pair, table), pair.path, read_image(pair.path))
    for pair in track(pairs, "writing", "mask"):
        export.add(pair, _read(pair, table))
    export.close()
    print(f"{len(pairs)} masks written to {output} as {', '.join(formats)}")


def _pairs(masks: str, images: str) -> list[_Pair]:
    masks, images = expand_path(masks), expand_path(images)
    if os.path.isdir(os.path.join(masks, "MASK")):
        masks = os.path.join(masks, "MASK")
    if os.path.isfile(masks) and os.path.isfile(images):
        return [_Pair(stem(os.path.basename(images)), images, masks)]
    if os.path.isfile(masks) or os.path.isfile(images):
        raise UserError(f"{masks} and {images}: give two folders or two files")
    return [_Pair(name, path, mask) for name, path, mask in pair_files(images, masks)]


def _table(pairs: list[_Pair], config: ExportLabelsConfig) -> ClassTable:
    def count() -> int:
        values: set[int] = set()
        for pair in track(pairs, "counting classes", "mask"):
            values |= set(np.unique(read_mask(pair.mask, ignore=ignore)).tolist())
        return count_classes(values, "--categories with a table, such as of")

    ignore = (config.ignore_index,) if config.ignore_index >= 0 else ()
    path = config.categories or table_of_masks(pairs[0].mask)
    return resolve_categories(count, path=path, ignore_index=config.ignore_index)


def _read(pair: _Pair, table: ClassTable) -> np.ndarray:
    rule = table.mask_rule()
    return read_mask(pair.mask, rule.classes, rule.ignore)
