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

from guided_diffusion.images.dicom_prefix import HEAD_BYTES, is_dicom
from guided_diffusion.images.left_out import BY_SUFFIX, left_out, summary
from guided_diffusion.images.names import (
    DICOM_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MASK_SUFFIXES,
    composed,
    ending,
    fixed_part,
    is_ignored,
    is_pattern,
    stem,
    varying_part,
    without_mask_suffix,
)
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import expand_path, is_local

# formats of images that are not read, and that must not go unnoticed among those that are
_OTHER_FORMATS = (
    *(".jp2", ".j2k", ".jpf", ".jfif", ".jxl", ".avif", ".heic", ".heif", ".tga", ".psd", ".svs"),
    *(".pgm", ".ppm", ".pnm", ".nii", ".gz", ".mha", ".mhd", ".nrrd", ".npy", ".raw", ".dng"),
)

T = TypeVar("T")


def list_images(path: str) -> list[str]:
    """List the images in a folder and its sub-folders, those a glob matches, or the one file.

    The list is sorted by name. Hidden files are ignored; files without one of the usual extensions
    are included if they begin as DICOM. In a glob, ** stands for any number of folders.

    :raises UserError: if there are none.
    """
    return _list(expand_path(path))[0]


def _list(path: str) -> tuple[list[str], list[str]]:
    """The images, and the other files."""
    if bf.isdir(path):
        names = sorted(_walk(path))
    elif bf.exists(path):
        return [path], []
    elif is_pattern(path):
        names = _matches(path)
    elif path and is_local(path) and os.path.islink(path):
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    else:
        raise UserError(f"{path or repr(path)} does not exist")
    images: list[str] = []
    others: list[str] = []
    for name in names:
        (images if looks_like_image(name) else others).append(name)
    if not images:
        endings = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in others)
        seen = ", ".join(f"{count} {end}" for end, count in endings.most_common(5))
        raise UserError(
            f"no images in {path}; images end in {', '.join(IMAGE_EXTENSIONS)}; "
            + (f"there are other files: {seen}" if seen else "it holds no files")
        )
    return images, others


def _matches(pattern: str) -> list[str]:
    """The files that a glob matches, and those in folders that it matches, each once."""
    # of the wildcards, blobfile knows only "*" in local paths
    found = glob.iglob(pattern, recursive=True) if is_local(pattern) else bf.glob(pattern)
    names: list[str] = []
    for name in sorted(found):
        if not any(map(is_ignored, name[len(fixed_part(pattern)) :].split("/"))):
            names += sorted(_walk(name)) if bf.isdir(name) else [name]
    return list(dict.fromkeys(names))


def list_radiographs(path: str, *without: str) -> tuple[list[str], str]:
    """`list_images` without masks, results of this project's commands, and files in other folders.

    :param without: further folders whose files do not count, such as that of the results.
    :return: the images, and a line about what was left out and might surprise the user.
    :raises UserError: if none remain.
    """
    path = expand_path(path)
    images, others = _list(path)
    hidden = tuple(os.path.realpath(folder) + os.sep for folder in without if folder)
    if hidden:
        images = [image for image in images if not real_path(image).startswith(hidden)]
    found = {} if images == [path] else _no_radiographs(path, images)
    images = [image for image in images if image not in found]
    notes = [summary(found)] if found else []
    unread = Counter(os.path.splitext(name)[1].lower() for name in others)
    counts = ", ".join(f"{unread[end]} {end}" for end in _OTHER_FORMATS if unread[end])
    if counts:
        notes.append(f"files of formats that are not read: {counts}")
    if not images:
        raise UserError(
            "; ".join([f"no radiographs in {path}: all of its images are masks or results", *notes])
        )
    return images, "; ".join(notes)


def _no_radiographs(source: str, images: Sequence[str]) -> dict[str, str]:
    """What the images among these are that `left_out` finds, by path."""
    base = source if bf.isdir(source) else fixed_part(source)
    name_of = {image: image[len(base) :].strip("/") for image in images}
    found = left_out(list(name_of.values()), base)
    return {image: found[name] for image, name in name_of.items() if name in found}


def name_images(source: str, paths: Sequence[str]) -> list[str]:
    """The names (see `names.py`) of images that `list_images(source)` found."""
    source = expand_path(source)
    if bf.isdir(source):
        return [stem(path[len(source) :].strip("/")) for path in paths]
    if bf.exists(source) or not is_pattern(source):
        return [stem(bf.basename(path)) for path in paths]
    return [stem(varying_part(path, source)) for path in paths]


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
    """Pair every image with its mask: (name, image, mask), sorted by name.

    Names (see `names.py`) must agree; a mask's may end in one of MASK_SUFFIXES. One folder may lie
    in the other. Masks and results in folders among the images, see `left_out.py`, need no masks.

    :raises UserError: if a file does not pair; it lists the first ten.
    """
    pairs, unpaired = find_pairs(image_dir, mask_dir)
    if unpaired:
        more = f"; and {len(unpaired) - 10} more" if len(unpaired) > 10 else ""
        raise UserError(
            f"{len(unpaired)} {'names' if len(unpaired) > 1 else 'name'} in {image_dir} and"
            f" {mask_dir} {'do' if len(unpaired) > 1 else 'does'} not pair: "
            + "; ".join(f"{one.path} {one.text}" for one in unpaired[:10])
            + more
            + ". A mask has the name of its image, any extension, and may end in "
            + ", ".join(MASK_SUFFIXES)
        )
    return pairs


def find_pairs(image_dir: str, mask_dir: str) -> tuple[list[tuple[str, str, str]], list[Unpaired]]:
    """The pairs as `pair_files` returns them, and every file that is in none."""
    image_paths, mask_paths = list_images(image_dir), list_images(mask_dir)
    image_files, mask_files = (set(map(real_path, p)) for p in (image_paths, mask_paths))
    if mask_files < image_files:  # one folder lies in the other: its files are its own
        image_paths = [path for path in image_paths if real_path(path) not in mask_files]
    elif image_files < mask_files:
        mask_paths = [path for path in mask_paths if real_path(path) not in image_files]
    images, masks = _by_name(image_dir, image_paths), _by_name(mask_dir, mask_paths)
    if image_files == mask_files:  # side by side: only the suffix distinguishes a mask
        masks = {
            name: paths
            for name, paths in masks.items()
            if without_mask_suffix(name) in images.keys() - {name}
        }
        images = {name: paths for name, paths in images.items() if name not in masks}
    masks_of: dict[str, list[str]] = {}
    for name, paths in masks.items():
        key = name if name in images else without_mask_suffix(name)
        masks_of.setdefault(key, []).extend(paths)
    pairs, unpaired = [], []
    no_radiographs = _no_radiographs(expand_path(image_dir), image_paths)
    for name in sorted(images.keys() | masks_of.keys()):
        ours, theirs = images.get(name, []), masks_of.get(name, [])
        if len(ours) == len(theirs) == 1:
            pairs.append((name, ours[0], theirs[0]))
        elif not theirs:
            ours = [path for path in ours if no_radiographs.get(path, BY_SUFFIX) == BY_SUFFIX]
            unpaired += [Unpaired("image without mask", p, "has no mask") for p in ours]
        elif not ours:
            unpaired += [Unpaired("mask without image", p, "has no image") for p in theirs]
        else:
            first, *others = sorted(ours) + sorted(theirs)
            text = f"and {' and '.join(others)} all have the stem {name}"
            if any(composed(path) != path for path in (first, *others)):
                text += ", written with composed and with decomposed accents (NFC, NFD)"
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
    return ending(path).lower() in DICOM_EXTENSIONS


def open_file(path: str) -> BinaryIO:
    """Open a local or a cloud file for reading."""
    return open(path, "rb", opener=_open_now) if is_local(path) else bf.BlobFile(path, "rb")


def _open_now(path: str, flags: int) -> int:
    """Open without waiting for what would write to a named pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _walk(folder: str) -> Iterator[str]:
    """Every file that is not hidden; links are followed, but no folder is visited twice."""
    if not is_local(folder):
        for root, _, names in bf.walk(folder):
            if not any(map(is_ignored, root[len(folder) :].strip("/").split("/"))):
                yield from (bf.join(root, name) for name in names if not is_ignored(name))
        return
    visited = set()
    for root, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in visited else [n for n in folders if not is_ignored(n)]
        # links last, so that a folder has its own name
        folders.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))
        if real not in visited:
            yield from (os.path.join(root, name) for name in names if not is_ignored(name))
        visited.add(real)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be searched: {error.strerror}") from error


def looks_like_image(path: str, name: str = "") -> bool:
    """Whether `list_images` finds a file: by its ending, or as DICOM by how it begins.

    :param name: that it will have; by default its own.
    """
    name = name or path
    extension = os.path.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return True
    # modalities name files "IM0001" or by UID, whose last number looks like an extension
    if (extension and not extension[1:].isdecimal()) or os.path.basename(name) == "DICOMDIR":
        return False
    with contextlib.suppress(OSError), open_file(path) as file:
        return is_dicom(file.read(HEAD_BYTES))
    return False


def _by_name(source: str, paths: Sequence[str]) -> dict[str, list[str]]:
    """Map each name to its files."""
    found: dict[str, list[str]] = {}
    for name, path in zip(name_images(source, paths), paths):
        found.setdefault(name, []).append(path)
    return found


def real_path(path: str) -> str:
    """The path without links among its folders; a file that is a link counts as itself."""
    if not is_local(path):
        return path
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
