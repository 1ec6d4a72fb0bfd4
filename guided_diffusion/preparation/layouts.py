"""Where a data set's radiographs and masks lie, whoever laid them out.

Folder names count in any case. Known layouts, each also one folder deeper (under Split/, all/,
data/ or whatever single folder there is):

    IMG/ MASK/   imgs/ masks/   images/ masks/      one set
    train/images  train/masks  val/...  test/...    split; the pairs of names as above
    images/train  masks/train  images/val ...       split
    train/a.png  train/a_mask.png  val/...          side by side, told by the suffix of the mask
"""

import os
from dataclasses import dataclass

from guided_diffusion.images.files import find_pairs, list_images
from guided_diffusion.runtime.errors import UserError

IMAGE_FOLDERS = ("img", "imgs", "image", "images")
MASK_FOLDERS = ("mask", "masks", "label", "labels", "annotation", "annotations", "gt")
SPLITS = {
    **{"train": "TRAIN", "training": "TRAIN"},
    **{"val": "VAL", "valid": "VAL", "validation": "VAL"},
    **{"test": "TEST", "testing": "TEST"},
}


@dataclass(frozen=True)
class Source:
    """A folder of radiographs and the folder of their masks ("" for none)."""

    split: str
    image_dir: str
    mask_dir: str


@dataclass(frozen=True)
class Item:
    """A radiograph and its mask. `stem` is the name with its sub-folders, without the split."""

    split: str
    stem: str
    image: str
    mask: str | None

    @property
    def name(self) -> str:
        """For people: split and stem."""
        return f"{self.split}/{self.stem}" if self.split else self.stem


@dataclass(frozen=True)
class Unpaired:
    """A file without its partner, or several of one name. kind: a key of `faults.KINDS`."""

    kind: str
    path: str
    split: str
    text: str


def sources(source_dir: str = "", image_dir: str = "", mask_dir: str = "") -> list[Source]:
    """What the flags name: one pair of folders, or all that a known layout holds."""
    if source_dir and (image_dir or mask_dir):
        raise UserError("give either --source-dir, or --image-dir with --mask-dir, not both")
    if mask_dir and not image_dir:
        raise UserError("--mask-dir needs the --image-dir that its masks belong to")
    if not source_dir and not image_dir:
        raise UserError("say where the data are: --image-dir and --mask-dir, or --source-dir")
    for folder in filter(None, (source_dir, image_dir, mask_dir)):
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder")
    if image_dir:
        return [Source("", image_dir, mask_dir)]
    found = _find(source_dir, "")
    if not found:
        raise UserError(
            f"{source_dir} has no layout that is known: images and masks are looked for in IMG and "
            "MASK, imgs and masks, images and masks, each also under train, val and test, or side "
            "by side as NAME.png and NAME_mask.png; name the folders with --image-dir and "
            "--mask-dir"
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
    found = []
    for name, path in folders.items():
        if name in SPLITS:
            found += _find(path, SPLITS[name])
    if not found and len(folders) == 1:
        found = _find(next(iter(folders.values())), split)
    if not found and len(folders) > 1:  # the labelled part may lie beside others
        for name in ("split", "all", "data", "labelled", "labeled"):
            if name in folders and not found:
                found = _find(folders[name], split)
    if not found and not folders and _side_by_side(folder):
        found = [Source(split, folder, folder)]
    return found


def _side_by_side(folder: str) -> bool:
    try:
        return bool(find_pairs(folder, folder)[0])
    except UserError:
        return False


def list_items(found: list[Source]) -> tuple[list[Item], list[Unpaired]]:
    """Every pair, and everything that is not one. Without a mask folder every file is an item."""
    items, unpaired = [], []
    for source in found:
        if not source.mask_dir:
            for path in list_images(source.image_dir):
                relative = os.path.relpath(path, source.image_dir).replace(os.sep, "/")
                items.append(Item(*_split_of(source, os.path.splitext(relative)[0]), path, None))
            continue
        pairs, problems = find_pairs(source.image_dir, source.mask_dir)
        items += [Item(*_split_of(source, stem), image, mask) for stem, image, mask in pairs]
        unpaired += [_unpaired(source, line) for line in problems]
    return items, unpaired


def _split_of(source: Source, stem: str) -> tuple[str, str]:
    """Split and the rest of the stem; images/train/a.png says it in the sub-folder."""
    first, _, rest = stem.partition("/")
    if not source.split and rest and first.lower() in SPLITS:
        return SPLITS[first.lower()], rest
    return source.split, stem


def _unpaired(source: Source, line: str) -> Unpaired:
    for kind, ending, folder in (
        ("image without mask", " has no mask", source.image_dir),
        ("mask without image", " has no image", source.mask_dir),
    ):
        if line.endswith(ending):
            path = line.removesuffix(ending)
            relative = os.path.relpath(path, folder).replace(os.sep, "/")
            return Unpaired(kind, path, _split_of(source, relative)[0], ending.strip())
    return Unpaired("several of one name", line.split(" and ")[0], source.split, line)
