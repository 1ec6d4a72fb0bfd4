"""A copy of a data set without the faults that can be mended; the original is only read."""

import csv
import io
import os
import shutil
from collections.abc import Sequence

from tqdm import tqdm

from guided_diffusion.images.image_io import ImageError, read_image, write_mask
from guided_diffusion.preparation.faults import KINDS, Fault
from guided_diffusion.preparation.layouts import Item, Unpaired
from guided_diffusion.preparation.validation import Report, repaired_mask
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import save_json, write_atomically
from guided_diffusion.segmentation.categories import Category


def require_new_folder(folder: str, *originals: str) -> None:
    """Refuse a folder for results that holds anything or lies in the data."""
    if not folder:
        raise UserError("--output-dir is needed: a new folder for the results")
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(
            f"--output-dir {folder} is not empty; nothing there is replaced: name a new one"
        )
    for original in filter(None, originals):
        inside = os.path.relpath(os.path.realpath(folder), os.path.realpath(original))
        if inside.split(os.sep)[0] != os.pardir:
            raise UserError(f"--output-dir {folder} lies in {original}; name a folder outside it")


def copy_pair(item: Item, folder: str, mask=None, split: str | None = None) -> None:
    """Copy a radiograph and its mask to FOLDER/SPLIT/{IMG,MASK}; `mask` replaces the mask's file.

    The mask gets the radiograph's stem.
    """
    base = os.path.join(folder, item.split if split is None else split)
    parent = os.path.dirname(item.stem)
    _copy(item.image, os.path.join(base, "IMG", parent, os.path.basename(item.image)))
    if item.mask is None:
        return
    target = os.path.join(base, "MASK", item.stem)
    if mask is None:
        _copy(item.mask, target + os.path.splitext(item.mask)[1])
    else:
        write_mask(target + ".png", mask)


def write_repaired(
    items: Sequence[Item],
    unpaired: Sequence[Unpaired],
    report: Report,
    folder: str,
    num_classes: int | None,
    categories: Sequence[Category],
) -> list[Fault]:
    """Write the copy and `fixes.csv`, which tells for each fault what was done.

    :return: faults that nothing was done about.
    """
    for item in tqdm(items, desc="copying", unit="image", disable=None, leave=False):
        if item.image in report.dropped:
            continue
        mask = None
        if item.image in report.rewritten:
            size = read_image(item.image).shape[:2]
            mask, _ = repaired_mask(item, size, num_classes, categories)
        copy_pair(item, folder, mask)
    for one in unpaired:
        if one.kind == "image without mask" and _is_readable(one.path):
            _copy(one.path, _free(os.path.join(folder, "unlabelled", os.path.basename(one.path))))
    by_name = {item.name: item.image for item in items}
    rows = [["file", "fault", "what", "done"]]
    left = []
    for fault in report.faults:
        done = _what_was_done(fault, by_name.get(fault.name, ""), report)
        if not done:
            left.append(fault)
        rows.append([fault.path, fault.kind, fault.text, done or "nothing"])
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(
        os.path.join(folder, "fixes.csv"), lambda file: file.write(text.getvalue().encode())
    )
    return left


def write_faults(faults: Sequence[Fault], folder: str) -> str:
    """Write faults.json; returns its path."""
    path = os.path.join(folder, "faults.json")
    save_json(path, [fault.to_plain() for fault in faults])
    return path


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


def _copy(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(source, target)


def _free(path: str) -> str:
    """The path, or one like it that no file has yet."""
    stem, ending = os.path.splitext(path)
    number = 1
    while os.path.exists(path):
        path, number = f"{stem}_{number}{ending}", number + 1
    return path
