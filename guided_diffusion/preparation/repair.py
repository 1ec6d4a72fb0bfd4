"""A copy of a data set in which the faults that can be are repaired; the original is only read."""

import os
from collections.abc import Sequence

from guided_diffusion.images.files import Unpaired
from guided_diffusion.images.image_io import ImageError, read_image
from guided_diffusion.images.names import ending
from guided_diffusion.preparation.layouts import Item, copy_pair
from guided_diffusion.preparation.validation import (
    KINDS,
    Fault,
    MaskReading,
    Report,
    repaired_mask,
)
from guided_diffusion.runtime.progress import track
from guided_diffusion.runtime.storage.files import copy_file, write_csv


def write_repaired(
    items: Sequence[Item],
    unpaired: Sequence[Unpaired],
    report: Report,
    folder: str,
    reading: MaskReading,
) -> list[Fault]:
    """Write the copy, and fixes.csv with what was done about each fault.

    :return: the faults that nothing was done about.
    """
    for item in track(items, "copying"):
        if item.image in report.dropped:
            continue
        mask = None
        if item.mask is not None and item.image in report.rewritten:
            size = read_image(item.image).shape[:2]
            mask, _ = repaired_mask(item.name, item.mask, size, reading)
        copy_pair(item, folder, mask)
    for one in unpaired:
        if one.kind == "image without mask" and _is_readable(one.path):
            target = os.path.join(folder, "unlabelled", os.path.basename(one.path))
            copy_file(one.path, _unused(target))
    image_of = {item.name: item.image for item in items}
    rows, left = [], []
    for fault in report.faults:
        done = _what_was_done(fault, image_of.get(fault.name, ""), report)
        if not done:
            left.append(fault)
        rows.append((fault.path, fault.kind, fault.text, done or "nothing"))
    write_csv(os.path.join(folder, "fixes.csv"), ("file", "fault", "what", "done"), rows)
    return left


def _what_was_done(fault: Fault, image: str, report: Report) -> str:
    if fault.kind == "image without mask":
        return "copied to unlabelled/" if _is_readable(fault.path) else "left out"
    if fault.kind in ("mask without image", "several of one name") or image in report.dropped:
        return "left out"
    return KINDS[fault.kind][1]


def _is_readable(path: str) -> bool:
    try:
        read_image(path)
    except ImageError:
        return False
    return True


def _unused(path: str) -> str:
    """The path, or one with a number appended that no file has yet."""
    end, number = ending(path), 1
    base = path.removesuffix(end)
    while os.path.exists(path):
        path, number = f"{base}_{number}{end}", number + 1
    return path
