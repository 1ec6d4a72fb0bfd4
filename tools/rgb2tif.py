"""Turn masks drawn in colours into masks of class indices, by the colours of categories.json."""

import os
from dataclasses import dataclass

import _path  # noqa: F401 - finds the package in a checkout that is not installed
import numpy as np
from tqdm import tqdm

from guided_diffusion.images.files import IMAGE_EXTENSIONS, list_images
from guided_diffusion.images.image_io import write_mask
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags
from guided_diffusion.segmentation.categories import load_categories
from guided_diffusion.segmentation.visuals.color_masks import (
    UNKNOWN,
    indices_from_colors,
    read_color_mask,
    unknown_colors,
)

FORMATS = {"tif": ".tif", "png": ".png"}


@dataclass(frozen=True)
class ConvertConfig:
    """How to convert"""

    TITLE = "Conversion"

    categories: str = flag("", "class table; '': flags/categories.json")
    format: str = flag("tif", "tif or png, both lossless", choices=sorted(FORMATS))
    unknown: str = flag(
        "error",
        "a colour of no class: refuse, take the nearest class, or take the background",
        choices=UNKNOWN,
    )


def main() -> None:
    parser = make_parser(__doc__, ConvertConfig)
    parser.add_argument("input", help="a colour mask, or a folder of them with its sub-folders")
    parser.add_argument("output", help="where the index masks go: a file for a file, or a folder")
    overrides = parse_flags(parser)
    config = from_flags(ConvertConfig, overrides)
    categories = load_categories(config.categories or None)
    jobs = plan(overrides["input"], overrides["output"], FORMATS[config.format])

    strange = {}
    for source, _ in tqdm(jobs, desc="checking", unit="mask", disable=None, leave=False):
        if colors := unknown_colors(read_color_mask(source), categories):
            strange[source] = colors
    if strange and config.unknown == "error":
        raise UserError(
            f"{len(strange)} of {len(jobs)} masks hold colours of no class, nothing was written: "
            + describe(strange)
            + "; correct them or the class table, or choose --unknown nearest or background"
        )
    replaced = sum(os.path.exists(target) for _, target in jobs)
    for source, target in tqdm(jobs, desc="converting", unit="mask", disable=None, leave=False):
        colors = read_color_mask(source)
        write_mask(target, indices_from_colors(colors, categories, config.unknown))
    print(f"{len(jobs)} masks written to {overrides['output']}, {replaced} of them over older ones")
    if strange:
        pixels = sum(sum(colors.values()) for colors in strange.values())
        print(f"{pixels} pixels of no class's colour became {config.unknown}: {describe(strange)}")


def plan(source: str, target: str, ending: str) -> list[tuple[str, str]]:
    """(colour mask, index mask) for a file or for every file of a folder, which is mirrored."""
    paths = list_images(source)
    if not os.path.isdir(source):
        to_file = os.path.splitext(target)[1].lower() in IMAGE_EXTENSIONS
        if to_file and not os.path.isdir(target):
            jobs = [(source, target)]
        else:
            stem = os.path.splitext(os.path.basename(source))[0]
            jobs = [(source, os.path.join(target, stem + ending))]
    else:
        if os.path.isfile(target):
            raise UserError(f"{source} is a folder but {target} a file; name a folder")
        inside = os.path.relpath(os.path.realpath(target), os.path.realpath(source))
        if inside.split(os.sep)[0] != os.pardir:
            raise UserError(f"{target} lies in {source}; write to a folder outside it")
        jobs = [
            (
                path,
                os.path.join(target, os.path.splitext(os.path.relpath(path, source))[0] + ending),
            )
            for path in paths
        ]
    writers: dict[str, str] = {}
    for path, written in jobs:
        if os.path.realpath(path) == os.path.realpath(written):
            raise UserError(f"{path} would be overwritten by its own index mask")
        if written in writers:
            raise UserError(f"{writers[written]} and {path} would both become {written}")
        writers[written] = path
    return jobs


def describe(strange: dict[str, dict[tuple[int, int, int], int]], limit: int = 5) -> str:
    """FILE: (r, g, b) N pixels, ...; shortened."""
    lines = []
    for path, colors in list(strange.items())[:limit]:
        shown = [f"{color} {count} pixels" for color, count in list(colors.items())[:limit]]
        if len(colors) > limit:
            shown.append(f"and {len(colors) - limit} more colours")
        if all(np.ptp(color) == 0 for color in colors):
            shown.append("all grey: does it hold class indices already?")
        lines.append(f"{path}: " + ", ".join(shown))
    if len(strange) > limit:
        lines.append(f"and {len(strange) - limit} more files")
    return "; ".join(lines)


if __name__ == "__main__":
    command(main)()
