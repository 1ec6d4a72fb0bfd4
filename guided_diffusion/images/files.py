"""Image files: which there are, and which mask belongs to which image."""

import contextlib
import glob
import os
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

import blobfile as bf

from guided_diffusion.images import dicom_io
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import is_local

DICOM_EXTENSIONS = (".dcm", ".dicom", ".ima")
IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *DICOM_EXTENSIONS,
)
MASK_SUFFIXES = ("_mask", "_gt", "_seg", "_label")


def list_images(path: str) -> list[str]:
    """Every image in a folder and its sub-folders, of a glob, or the one file; sorted by name.

    Hidden files are passed over. Files without a usual extension count where they begin as DICOM.
    Raises UserError where there is none.
    """
    if not is_local(path):
        exists, isdir, expand = bf.exists, bf.isdir, bf.glob
    else:
        exists, isdir, expand = os.path.exists, os.path.isdir, glob.iglob
    if isdir(path):
        names = sorted(_walk(path))
    elif exists(path):
        return [path]
    elif any(mark in path for mark in "*?["):
        names = []
        for name in sorted(expand(path)):
            names += sorted(_walk(name)) if isdir(name) else [name]
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


def pair_files(image_dir: str, mask_dir: str) -> list[tuple[str, str, str]]:
    """(stem, image, mask) for every image, sorted by stem.

    Stems must agree, extensions need not; the mask's may end in one of MASK_SUFFIXES; sub-folders
    are mirrored and part of the stem. Raises UserError that lists what does not pair.
    """
    pairs, problems = find_pairs(image_dir, mask_dir)
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"{len(problems)} names in {image_dir} and {mask_dir} do not pair: "
            + "; ".join(problems[:10])
            + more
            + ". A mask has the name of its image, any extension, and may end in "
            + ", ".join(MASK_SUFFIXES)
        )
    return pairs


def find_pairs(image_dir: str, mask_dir: str) -> tuple[list[tuple[str, str, str]], list[str]]:
    """The pairs as `pair_files` gives them, and a line for everything that is not one pair."""
    images, masks = _by_stem(image_dir), _by_stem(mask_dir)
    if _same_folder(image_dir, mask_dir):  # side by side: the suffix alone tells a mask
        masks = {
            stem: paths for stem, paths in masks.items() if _bare(stem) in images.keys() - {stem}
        }
        images = {stem: paths for stem, paths in images.items() if stem not in masks}
    masks_of: dict[str, list[str]] = {}
    for stem, paths in masks.items():
        masks_of.setdefault(stem if stem in images else _bare(stem), []).extend(paths)
    pairs, problems = [], []
    for stem in sorted(images.keys() | masks_of.keys()):
        image_paths, mask_paths = images.get(stem, []), masks_of.get(stem, [])
        if len(image_paths) == len(mask_paths) == 1:
            pairs.append((stem, image_paths[0], mask_paths[0]))
        elif not mask_paths:
            problems += [f"{path} has no mask" for path in image_paths]
        elif not image_paths:
            problems += [f"{path} has no image" for path in mask_paths]
        else:
            names = " and ".join(sorted(image_paths) + sorted(mask_paths))
            problems.append(f"{names} all have the stem {stem}")
    return pairs, problems


def split_folder(folder: str, split: str) -> str:
    """The part of a folder with the layout `all/{train,val,test}` or `{train,val,test}`.

    :return: the folder itself where it has neither.
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
    """Every file that is not hidden; links are followed, but no folder is entered twice."""
    if not is_local(folder):
        for root, _, names in bf.walk(folder):
            if "/." not in root[len(folder.rstrip("/")) :]:
                yield from (bf.join(root, name) for name in names if not name.startswith("."))
        return
    entered = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(root))
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".")
            and os.path.realpath(os.path.join(root, name)) not in entered
        ]
        yield from (os.path.join(root, name) for name in names if not name.startswith("."))


def _looks_like_image(path: str) -> bool:
    ending = os.path.splitext(path)[1].lower()
    if ending in IMAGE_EXTENSIONS:
        return True
    # modalities name files "IM0001" or by their UID, of which the last number looks like an ending
    if (ending and not ending[1:].isdecimal()) or os.path.basename(path) == "DICOMDIR":
        return False
    with contextlib.suppress(OSError), open_file(path) as file:
        return dicom_io.is_dicom(file.read(dicom_io.HEAD_BYTES))
    return False


def _by_stem(folder: str) -> dict[str, list[str]]:
    """Stem with its sub-folders, separated by slashes -> the files of that stem."""
    found: dict[str, list[str]] = {}
    for path in list_images(folder):
        relative = path[len(folder) :] if path.startswith(folder) else os.path.basename(path)
        relative = relative.replace(os.sep, "/").strip("/") or os.path.basename(path)
        ending = os.path.splitext(relative)[1]
        stem = relative.removesuffix(ending) if ending.lower() in IMAGE_EXTENSIONS else relative
        found.setdefault(stem, []).append(path)
    return found


def _bare(stem: str) -> str:
    """The stem without the suffix that tells a mask."""
    return next((stem[: -len(end)] for end in MASK_SUFFIXES if stem.lower().endswith(end)), stem)


def _same_folder(one: str, other: str) -> bool:
    if not (is_local(one) and is_local(other)):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)
