"""Finding image files, pairing images with masks, and opening local and cloud files alike."""

import contextlib
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import blobfile as bf
import numpy as np

from guided_diffusion.images import dicom_file
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import is_local

DICOM_EXTENSIONS = (".dcm", ".dicom", ".ima")
IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *DICOM_EXTENSIONS,
)
MASK_SUFFIXES = ("_mask", "_gt", "_seg", "_label")

T = TypeVar("T")


def list_images(path: str) -> list[str]:
    """List the images in a folder and its sub-folders, those a glob matches, or the one file.

    The list is sorted by name. Hidden files are ignored; files without one of the usual extensions
    are included if they begin as DICOM.

    :raises UserError: if there are none.
    """
    if bf.isdir(path):
        names = sorted(_walk(path))
    elif bf.exists(path):
        return [path]
    elif any(mark in path for mark in "*?["):
        names = []
        # of the wildcards, blobfile knows only "*" in local paths
        for name in sorted(glob.iglob(path) if is_local(path) else bf.glob(path)):
            names += sorted(_walk(name)) if bf.isdir(name) else [name]
    else:
        raise UserError(f"{path} does not exist")
    images = [name for name in names if _looks_like_image(name)]
    if not images:
        others = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in names)
        seen = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        raise UserError(
            f"no images in {path}; images end in {', '.join(IMAGE_EXTENSIONS)}; "
            + (f"there are other files: {seen}" if seen else "it holds no files")
        )
    return images


@dataclass(frozen=True)
class Unpaired:
    """A file that is not one of exactly one image and one mask.

    kind  "image without mask", "mask without image" or "several of one name"
    text  what is wrong; makes a sentence of which `path` is the subject
    """

    kind: str
    path: str
    text: str


def pair_files(image_dir: str, mask_dir: str) -> list[tuple[str, str, str]]:
    """Pair every image with its mask: (stem, image, mask), sorted by stem.

    Stems must agree, extensions need not; a mask's stem may end in one of MASK_SUFFIXES.
    Sub-folders are part of the stem.

    :raises UserError: if a file does not pair; it lists the first ten.
    """
    pairs, unpaired = find_pairs(image_dir, mask_dir)
    if unpaired:
        more = f"; and {len(unpaired) - 10} more" if len(unpaired) > 10 else ""
        raise UserError(
            f"{len(unpaired)} names in {image_dir} and {mask_dir} do not pair: "
            + "; ".join(f"{one.path} {one.text}" for one in unpaired[:10])
            + more
            + ". A mask has the name of its image, any extension, and may end in "
            + ", ".join(MASK_SUFFIXES)
        )
    return pairs


def find_pairs(image_dir: str, mask_dir: str) -> tuple[list[tuple[str, str, str]], list[Unpaired]]:
    """The pairs as `pair_files` returns them, and every file that is in none."""
    images, masks = _by_stem(image_dir), _by_stem(mask_dir)
    if _same_folder(image_dir, mask_dir):  # side by side: only the suffix distinguishes a mask
        masks = {
            stem: paths
            for stem, paths in masks.items()
            if _without_mask_suffix(stem) in images.keys() - {stem}
        }
        images = {stem: paths for stem, paths in images.items() if stem not in masks}
    masks_of: dict[str, list[str]] = {}
    for stem, paths in masks.items():
        key = stem if stem in images else _without_mask_suffix(stem)
        masks_of.setdefault(key, []).extend(paths)
    pairs, unpaired = [], []
    for stem in sorted(images.keys() | masks_of.keys()):
        image_paths, mask_paths = images.get(stem, []), masks_of.get(stem, [])
        if len(image_paths) == len(mask_paths) == 1:
            pairs.append((stem, image_paths[0], mask_paths[0]))
        elif not mask_paths:
            unpaired += [Unpaired("image without mask", p, "has no mask") for p in image_paths]
        elif not image_paths:
            unpaired += [Unpaired("mask without image", p, "has no image") for p in mask_paths]
        else:
            first, *others = sorted(image_paths) + sorted(mask_paths)
            text = f"and {' and '.join(others)} all have the stem {stem}"
            unpaired.append(Unpaired("several of one name", first, text))
    return pairs, unpaired


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced from the first to the last."""
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in indices]


def split_folder(folder: str, split: str) -> str:
    """The sub-folder of a split, in the layout `all/{train,val,test}` or `{train,val,test}`.

    :return: `folder` itself if it has neither.
    """
    for part in (bf.join(folder, "all", split), bf.join(folder, split)):
        if bf.isdir(part):
            return part
    return folder


def has_dicom_extension(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in DICOM_EXTENSIONS


def open_file(path: str) -> BinaryIO:
    """Open a local or a cloud file for reading."""
    return open(path, "rb") if is_local(path) else bf.BlobFile(path, "rb")


def _walk(folder: str) -> Iterator[str]:
    """Every file that is not hidden; links are followed, but no folder is visited twice."""
    if not is_local(folder):
        for root, _, names in bf.walk(folder):
            if "/." not in root[len(folder.rstrip("/")) :]:
                yield from (bf.join(root, name) for name in names if not name.startswith("."))
        return
    visited = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(root))
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".")
            and os.path.realpath(os.path.join(root, name)) not in visited
        ]
        yield from (os.path.join(root, name) for name in names if not name.startswith("."))


def _looks_like_image(path: str) -> bool:
    ending = os.path.splitext(path)[1].lower()
    if ending in IMAGE_EXTENSIONS:
        return True
    # modalities name files "IM0001" or by UID, whose last number looks like an extension
    if (ending and not ending[1:].isdecimal()) or os.path.basename(path) == "DICOMDIR":
        return False
    with contextlib.suppress(OSError), open_file(path) as file:
        return dicom_file.is_dicom(file.read(dicom_file.HEAD_BYTES))
    return False


def _by_stem(folder: str) -> dict[str, list[str]]:
    """Map each stem, sub-folders included and separated by slashes, to its files."""
    found: dict[str, list[str]] = {}
    for path in list_images(folder):
        relative = path[len(folder) :] if path.startswith(folder) else os.path.basename(path)
        relative = relative.replace(os.sep, "/").strip("/") or os.path.basename(path)
        ending = os.path.splitext(relative)[1]
        stem = relative.removesuffix(ending) if ending.lower() in IMAGE_EXTENSIONS else relative
        found.setdefault(stem, []).append(path)
    return found


def _without_mask_suffix(stem: str) -> str:
    return next((stem[: -len(end)] for end in MASK_SUFFIXES if stem.lower().endswith(end)), stem)


def _same_folder(one: str, other: str) -> bool:
    if not (is_local(one) and is_local(other)):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)
