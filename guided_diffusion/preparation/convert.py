"""What tools/rgb2tif.py does: turn masks drawn in colours into masks of class indices."""

import os
from pathlib import Path

import numpy as np

from guided_diffusion.images.files import list_images, name_images
from guided_diffusion.images.masks import write_mask
from guided_diffusion.images.names import ending
from guided_diffusion.preparation.config import FORMATS, ConvertConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import track
from guided_diffusion.runtime.storage.files import check_outputs
from guided_diffusion.segmentation.categories import load_categories
from guided_diffusion.segmentation.visuals.color_masks import (
    indices_from_colors,
    read_color_mask,
    unknown_colors,
)

_SHOWN = 5  # files and colours listed in a message

ColorCounts = dict[tuple[int, int, int], int]


def convert(source: str, target: str, config: ConvertConfig) -> None:
    """Convert a colour mask, or a folder of them, and report what was written.

    :raises UserError: before anything is written, if colours are unknown and may not be replaced,
        or files would be overwritten by each other.
    """
    table = load_categories(config.categories or None)
    if config.unknown == "ignore" and not table.ignored:
        raise UserError('--unknown ignore: no class of the class table is marked "ignore": true')
    jobs = plan(source, target, FORMATS[config.format])
    check_outputs([written for _, written in jobs])
    unknown: dict[str, ColorCounts] = {}
    for path, _ in track(jobs, "checking", "mask"):
        if colors := unknown_colors(read_color_mask(path), table.entries):
            unknown[path] = colors
    if unknown and config.unknown == "error":
        raise UserError(
            f"{len(unknown)} of {len(jobs)} masks hold colours of no class, nothing was written: "
            f"{_describe(unknown)}; correct them or the class table, or choose --unknown nearest,"
            " background or ignore"
        )
    replaced = sum(os.path.exists(written) for _, written in jobs)
    for path, written in track(jobs, "converting", "mask"):
        mask = indices_from_colors(read_color_mask(path), table, config.unknown)
        write_mask(written, mask)
    print(f"{len(jobs)} masks written to {target}, {replaced} of them replacing existing files")
    if unknown:
        pixels = sum(sum(colors.values()) for colors in unknown.values())
        print(
            f"{pixels} pixels in colours of no class became {config.unknown}: {_describe(unknown)}"
        )


def plan(source: str, target: str, extension: str) -> list[tuple[str, str]]:
    """(colour mask, index mask) for a file, or for every file of a folder, which is mirrored.

    :raises UserError: if a file would be overwritten, or written twice.
    """
    paths = list_images(source)
    if os.path.isdir(source):
        if os.path.isfile(target):
            raise UserError(f"{source} is a folder but {target} is a file; name a folder")
        if Path(target).resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"{target} lies in {source}; write to a folder outside it")
    if len(paths) == 1 and ending(target) and not (os.path.isdir(source) or os.path.isdir(target)):
        jobs = [(paths[0], target)]
    else:
        names = name_images(source, paths)
        jobs = [(path, os.path.join(target, name + extension)) for path, name in zip(paths, names)]
    sources: dict[str, str] = {}
    for path, written in jobs:
        if os.path.realpath(path) == os.path.realpath(written):
            raise UserError(f"{path} would be overwritten by its own index mask")
        if written in sources:
            raise UserError(f"{sources[written]} and {path} would both become {written}")
        sources[written] = path
    return jobs


def _describe(unknown: dict[str, ColorCounts]) -> str:
    """FILE: (r, g, b) N pixels, ...; shortened."""
    lines = []
    for path, colors in list(unknown.items())[:_SHOWN]:
        shown = [f"{color} {count} pixels" for color, count in list(colors.items())[:_SHOWN]]
        if len(colors) > _SHOWN:
            shown.append(f"and {len(colors) - _SHOWN} more colours")
        if all(np.ptp(color) == 0 for color in colors):
            shown.append("all grey: does it hold class indices already?")
        lines.append(f"{path}: " + ", ".join(shown))
    if len(unknown) > _SHOWN:
        lines.append(f"and {len(unknown) - _SHOWN} more files")
    return "; ".join(lines)
