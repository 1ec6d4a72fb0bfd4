"""Radiographs to choose from: what the network sees in them, a part of them after the other."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from guided_diffusion.images.image_io import ImageError, read_image
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.storage.files import read_json, save_json, write_atomically
from guided_diffusion.segmentation.pipeline import in_batches, prefetch
from guided_diffusion.segmentation.selection.features import Encoder

_PART = 256
_BATCH = 8


@dataclass
class Pool:
    """The radiographs that can be chosen.

    paths: of their files. vectors: of their features, in parts [n x D]; together in that order.
    notes: a line for each file, or kind of file, that is not among them.
    """

    paths: list[str] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """Some files: vectors of those that can be read, and of all files a digest of the pixels.

    digests: "" for files that cannot be read. errors: what is wrong with those.
    """

    vectors: np.ndarray
    digests: list[str]
    errors: list[str]


def read_pool(
    paths: Sequence[str], encoder: Encoder, folder: str = "", skip_bad_images: bool = False
) -> Pool:
    """Compute the vectors of all radiographs; of those with the same pixels only the first counts.

    :param folder: keeps finished parts, so that the work can be resumed; "" for nowhere.
    :param skip_bad_images: leave out files that cannot be read.
    :raises ImageError: for such a file, unless they are left out.
    """
    pool = Pool()
    first: dict[str, str] = {}
    copies: list[str] = []
    with progress_bar(len(paths), "image", desc="features", leave=False) as bar:

        def compute(files: Sequence[str]) -> _Part:
            return _read_part(files, encoder, skip_bad_images, bar.update)

        for number, start in enumerate(range(0, len(paths), _PART)):
            files = paths[start : start + _PART]
            part = _load(folder, number) or _save(folder, number, compute(files))
            bar.update(start + len(files) - bar.n)
            readable = [(path, digest) for path, digest in zip(files, part.digests) if digest]
            new = [first.setdefault(digest, path) == path for path, digest in readable]
            copies += [
                f"{path} has the same pixels as {first[digest]}"
                for (path, digest), is_new in zip(readable, new)
                if not is_new
            ]
            pool.paths += [path for (path, _), is_new in zip(readable, new) if is_new]
            if any(new):
                pool.vectors.append(part.vectors if all(new) else part.vectors[new])
            pool.notes += [f"skipped: {error}" for error in part.errors]
    if copies:
        more = f", and {len(copies) - 1} more copies" if len(copies) > 1 else ""
        pool.notes.append(f"skipped: {copies[0]}{more}")
    return pool


def _read_part(
    files: Sequence[str], encoder: Encoder, skip_bad_images: bool, advance: Callable[[int], object]
) -> _Part:
    vectors: list[np.ndarray] = []
    digests: list[str] = []
    errors: list[str] = []

    def read(path: str) -> tuple[np.ndarray, str] | ImageError:
        try:
            return _read(path, encoder.reading)
        except ImageError as error:
            return error

    for batch in in_batches(prefetch(read, files, ahead=_BATCH), _BATCH):
        images = []
        for found in batch:
            if not isinstance(found, ImageError):
                images.append(found[0])
                digests.append(found[1])
            elif skip_bad_images:
                digests.append("")
                errors.append(str(found))
            else:
                raise found
        if images:
            vectors.append(encoder(np.stack(images)))
        advance(len(batch))
    return _Part(np.concatenate(vectors) if vectors else np.empty((0, 0)), digests, errors)


def _read(path: str, reading: ReadingConfig) -> tuple[np.ndarray, str]:
    """An image at the network's size, and a digest of its pixels at their own."""
    image = read_image(path, reading.in_channels, reading.intensity_rule())
    content = repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()
    return reading.prepare(image), hashlib.blake2b(content, digest_size=16).hexdigest()


def _names(folder: str, number: int) -> tuple[str, str]:
    stem = os.path.join(folder, f"{number:06d}")
    return f"{stem}.npy", f"{stem}.json"


def _save(folder: str, number: int, part: _Part) -> _Part:
    """Keep a part, whose list is written last, and let the file hold its vectors."""
    if not folder:
        return part
    vectors, listing = _names(folder, number)
    encoded = io.BytesIO()
    np.save(encoded, part.vectors)
    write_atomically(vectors, lambda file: file.write(encoded.getbuffer()))
    save_json(listing, {"digests": part.digests, "errors": part.errors})
    return _load(folder, number) or part


def _load(folder: str, number: int) -> _Part | None:
    if not folder or not os.path.exists(_names(folder, number)[1]):
        return None
    vectors, listing = _names(folder, number)
    return _Part(np.load(vectors, mmap_mode="r"), **read_json(listing))
