"""Folder layouts: finding the radiographs and masks of a data set, and copying them.

The case of folder names does not matter. Known layouts, each also one folder deeper (under Split/,
all/, data/ or the only folder there is):

    IMG/ MASK/   imgs/ masks/   images/ masks/      one set
    train/images  train/masks  val/...  test/...    split; any of the pairs of names above
    images/train  masks/train  images/val ...       split
    train/a.png  train/a_mask.png  val/...          side by side, masks by their suffix
    train/a.png  train/masks/a.png  val/...         masks below the radiographs
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion.images.files import Unpaired, find_pairs, list_radiographs, name_images
from guided_diffusion.images.left_out import IMAGE_FOLDERS, MASK_FOLDERS
from guided_diffusion.images.masks import write_mask
from guided_diffusion.images.names import ending, is_ignored
from guided_diffusion.images.splits import SPLITS
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage.files import check_output, copy_file


@dataclass(frozen=True)
class Source:
    """A folder of radiographs and the folder of their masks ("" for none)."""

    split: str
    image_dir: str
    mask_dir: str


@dataclass(frozen=True)
class Item:
    """A radiograph and its mask. `stem` includes sub-folders, but not the split."""

    split: str
    stem: str
    image: str
    mask: str | None

    @property
    def name(self) -> str:
        """Split and stem, for messages."""
        return f"{self.split}/{self.stem}" if self.split else self.stem


def sources(source_dir: str = "", image_dir: str = "", mask_dir: str = "") -> list[Source]:
    """The folders that the flags name: one pair, or those of a known layout.

    :raises UserError: if the flags contradict each other or the layout is unknown.
    """
    if source_dir and (image_dir or mask_dir):
        raise UserError("give either --source-dir, or --image-dir with --mask-dir, not both")
    if mask_dir and not image_dir:
        raise UserError("--mask-dir needs the --image-dir that its masks belong to")
    if not source_dir and not image_dir:
        raise UserError("no data set given: use --image-dir and --mask-dir, or --source-dir")
    for folder in filter(None, (source_dir, image_dir, mask_dir)):
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder")
    if image_dir:
        return [Source("", image_dir, mask_dir)]
    found = _find(source_dir, "")
    if not found:
        raise UserError(
            f"{source_dir} has no known layout: images and masks are expected in IMG and MASK, "
            "imgs and masks, or images and masks, each also under train, val and test, or side by "
            "side as NAME.png and NAME_mask.png; name the folders with --image-dir and --mask-dir"
        )
    return found


def _find(folder: str, split: str) -> list[Source]:
    folders = {
        name.lower(): os.path.join(folder, name)
        for name in sorted(os.listdir(folder))
        if os.path.isdir(os.path.join(folder, name)) and not name.startswith(".")
    }
    image_dir = next((folders[name] for name in IMAGE_FOLDERS if name in folders), "")
    mask_dir = next((folders[name] for name in MASK_FOLDERS if name in folders), "")
    if image_dir and mask_dir:
        return [Source(split, image_dir, mask_dir)]
    if mask_dir and _has_images(folder):
        return [Source(split, folder, mask_dir)]
    found = []
    for name, path in folders.items():
        if name in SPLITS:
            found += _find(path, SPLITS[name])
    inside = list(folders.values())
    if len(inside) > 1:  # the labelled part may be one of several
        names = ("split", "all", "data", "labelled", "labeled")
        inside = [folders[name] for name in names if name in folders]
    for path in inside:
        found = found or _find(path, split)
    if not found and not folders and _side_by_side(folder):
        found = [Source(split, folder, folder)]
    return found


def _has_images(folder: str) -> bool:
    """Whether images lie in a folder itself."""
    return any(ending(name) and not is_ignored(name) for name in os.listdir(folder))


def _side_by_side(folder: str) -> bool:
    try:
        return bool(find_pairs(folder, folder)[0])
    except UserError:
        return False


def list_items(found: list[Source]) -> tuple[list[Item], list[Unpaired]]:
    """All pairs, and the files that are in none. Without a mask folder every image is an item."""
    items: list[Item] = []
    unpaired: list[Unpaired] = []
    for source in found:
        if not source.mask_dir:
            paths, note = list_radiographs(source.image_dir)
            if note:
                say(f"{source.image_dir}: {note}")
            for path, stem in zip(paths, name_images(source.image_dir, paths)):
                items.append(Item(*_split_of(source, stem), path, None))
            continue
        pairs, left_over = find_pairs(source.image_dir, source.mask_dir)
        items += [Item(*_split_of(source, stem), image, mask) for stem, image, mask in pairs]
        unpaired += left_over
    return items, unpaired


def _split_of(source: Source, stem: str) -> tuple[str, str]:
    """Split and the rest of the stem; in images/train/a.png the sub-folder is the split."""
    first, _, rest = stem.partition("/")
    if not source.split and rest and first.lower() in SPLITS:
        return SPLITS[first.lower()], rest
    return source.split, stem


def require_new_folder(
    folder: str, *originals: str, flag: str = "--output-dir", left: str = ""
) -> None:
    """Refuse an output folder that is not empty or lies in the data.

    :param flag: that names the folder, for messages.
    :param left: the name of what a killed command leaves there, which does not count.
    :raises UserError: saying which.
    """
    if not folder:
        raise UserError(f"{flag} is needed: a new folder for the results")
    check_output(folder, folder=True)
    if os.path.exists(folder) and (not os.path.isdir(folder) or {*os.listdir(folder)} - {left}):
        raise UserError(
            f"{flag} {folder} is not empty, and nothing in it is overwritten: name a new one"
        )
    for original in filter(None, originals):
        if Path(folder).resolve().is_relative_to(Path(original).resolve()):
            raise UserError(f"{flag} {folder} lies in {original}; name a folder outside it")


def copy_pair(
    item: Item, folder: str, mask: np.ndarray | None = None, split: str | None = None
) -> None:
    """Copy a radiograph and its mask to FOLDER/SPLIT/{IMG,MASK}; the mask gets the image's stem.

    :param mask: class indices [H x W] to write instead of the mask's own file.
    :param split: instead of the item's own.
    """
    base = os.path.join(folder, item.split if split is None else split)
    copy_file(item.image, os.path.join(base, "IMG", item.stem + ending(item.image)))
    if item.mask is None:
        return
    target = os.path.join(base, "MASK", item.stem)
    if mask is None:
        copy_file(item.mask, target + ending(item.mask))
    else:
        write_mask(target + ".png", mask)
