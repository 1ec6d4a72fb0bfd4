"""The images of a source: one entry each, with its file and the drawings that count."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from guided_diffusion.images.files import real_path
from guided_diffusion.images.image_io import save_picture
from guided_diffusion.images.names import ending, stem
from guided_diffusion.preparation.config import ImportConfig
from guided_diffusion.preparation.importing.finding import ImageFinder
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.embedded import ending_of
from guided_diffusion.segmentation.annotations.reading.source import Drawing, Source

FIRST, VOTE = "first", "vote"
_SHOWN = 5
_LONG_NAME = 200  # bytes


@dataclass(frozen=True)
class ImageItem:
    """An image that becomes a pair.

    name      of both files, without ending; it may hold sub-folders
    path      of the image file
    origin    what to call it in messages
    drawings  of one person, or of all that vote
    """

    name: str
    path: str
    origin: str
    drawings: list[Drawing]


def find_items(source: Source, folder: str, scratch: str, config: ImportConfig) -> list[ImageItem]:
    """The images to convert, by name.

    :param folder: in which images are searched for.
    :param scratch: where to write images that are embedded or converted.
    :raises UserError: for images that are missing, annotated twice, or that share a name.
    """
    finder = ImageFinder(folder)
    drawn: dict[str, list[tuple[str, Drawing]]] = {}
    missing: list[Drawing] = []
    for drawing in source.drawings:
        if not drawing.regions and config.empty == "skip":
            source.omit(drawing.where, "without annotations (--empty background keeps it)")
            continue
        path = _file_of(drawing, finder, scratch)
        if path is None:
            missing.append(drawing)
        else:
            drawn.setdefault(real_path(path), []).append((path, drawing))
    _report_missing(source, missing, folder, config.skip_missing)
    # names in a data set that is joined tell patients apart, so they keep all folders
    base = config.images if config.into else ""
    names = _names([entries[0] for entries in drawn.values()], [folder, scratch], base)
    items: dict[str, ImageItem] = {}
    for name, entries in zip(names, drawn.values()):
        path, first = entries[0]
        made = path.startswith(scratch + os.sep)
        origin = f"the image of {first.where}" if made else path
        drawings = _choose([drawing for _, drawing in entries], origin, config.annotator, source)
        if not drawings:
            continue
        if name in items:
            raise UserError(
                f"{items[name].origin} and {origin} would both be {name}; rename one of them"
            )
        items[name] = ImageItem(name, path, origin, drawings)
    return [items[name] for name in sorted(items)]


def _file_of(drawing: Drawing, finder: ImageFinder, scratch: str) -> str | None:
    image = drawing.image
    if image.path is not None:
        return image.path
    if image.convert is not None:
        path = _scratch_file(scratch, image.title, ".tif")
        save_picture(path, _picture(image.convert()))
        return path
    found = finder.find(image.name, image.base, drawing.where)
    if found is None and image.embedded is not None:
        content = image.embedded()
        end = ending_of(content)
        if end is None:
            raise UserError(
                f"{drawing.where}: its embedded image is of no format that is read; put the image"
                " beside it"
            )
        name = image.name.replace("\\", "/").rpartition("/")[2]
        if len(os.fsencode(name)) > _LONG_NAME:
            raise UserError(f"{drawing.where}: the name of its image is too long; shorten it")
        path = _scratch_file(scratch, name.removesuffix(ending(name)) or "image", end)
        with open(path, "wb") as file:
            file.write(content)
        return path
    return found


def _scratch_file(scratch: str, name: str, end: str) -> str:
    """A path in a folder of its own, so that equal names do not meet."""
    if name in (".", ".."):
        name = "image"
    return os.path.join(tempfile.mkdtemp(dir=scratch), name + end)


def _picture(values: np.ndarray) -> Image.Image:
    """Values [H x W] as a picture that TIFF can hold: 8 or 16 bits, else 32-bit floats."""
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return Image.fromarray(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
    return Image.fromarray(np.ascontiguousarray(values, np.float32))


def _report_missing(
    source: Source, missing: Sequence[Drawing], folder: str, skip_missing: bool
) -> None:
    for drawing in missing:
        source.omit(drawing.where, f"its image {drawing.image.name!r} is not in {folder}")
    if missing and not skip_missing:
        shown = ", ".join(ascii(d.image.name)[1:-1][-80:] for d in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UserError(
            f"{missing[0].where}: {len(missing)} images are not in {folder}: {shown}{more}; name"
            " their folder with --images, or pass --skip_missing"
        )


def _names(
    images: Sequence[tuple[str, Drawing]], folders: Sequence[str], below: str = ""
) -> list[str]:
    """Names of images: their titles, or their paths below a folder.

    :param below: that folder; "" for the innermost that holds all of them.
    """
    folder, scratch = (os.path.realpath(path) for path in folders)
    real = [real_path(path) for path, _ in images]
    own = [path for path in real if not path.startswith(scratch + os.sep)]
    base = os.path.commonpath([os.path.dirname(path) for path in own]) if own else folder
    base = os.path.realpath(below) if below else base
    names = []
    for path, (_, drawing) in zip(real, images):
        scratched = path.startswith(scratch + os.sep)
        below = os.path.basename(path) if scratched else os.path.relpath(path, base)
        names.append(drawing.image.title or stem(below))
    return names


def _choose(drawings: list[Drawing], path: str, annotator: str, source: Source) -> list[Drawing]:
    """Of several drawings of one image, those that count."""
    people = [drawing.annotator for drawing in drawings]
    if annotator and annotator not in (FIRST, VOTE):
        if not any(people):
            return _only(drawings, path)
        chosen = [drawing for drawing in drawings if drawing.annotator == annotator]
        for drawing in drawings:
            if drawing not in chosen:
                source.omit(drawing.where, f"drawn by {drawing.annotator}, not by {annotator}")
        return _only(chosen, path) if chosen else []
    if len(drawings) == 1:
        return drawings
    if not all(people) or len(set(people)) < len(people) or not annotator:
        return _only(drawings, path)
    if annotator == VOTE:
        return drawings
    for drawing in drawings[1:]:
        source.omit(drawing.where, f"{drawings[0].annotator} drew on the image first")
    return drawings[:1]


def _only(drawings: list[Drawing], path: str) -> list[Drawing]:
    """:raises UserError: if there are several."""
    if len(drawings) > 1:
        one, other = drawings[:2]
        if one.annotator and other.annotator and one.annotator != other.annotator:
            raise UserError(
                f"{path} is annotated by {one.annotator} ({one.where}) and by {other.annotator}"
                f" ({other.where}); choose with --annotator: a name, first or vote"
            )
        raise UserError(
            f"{path} is annotated twice: {one.where} and {other.where}; remove one of them"
        )
    return drawings
