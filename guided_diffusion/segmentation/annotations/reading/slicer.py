"""Label maps and segmentations of 3D Slicer and ITK-SNAP: NRRD or NIfTI files beside images."""

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from guided_diffusion.images.files import list_images
from guided_diffusion.images.image_io import ImageError
from guided_diffusion.images.names import composed, is_ignored, stem
from guided_diffusion.images.placement import Placement, find_placement
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import read_text
from guided_diffusion.segmentation.annotations.reading import volumes
from guided_diffusion.segmentation.annotations.reading.label_map import Label, regions
from guided_diffusion.segmentation.annotations.reading.node import Node
from guided_diffusion.segmentation.annotations.reading.source import (
    Color,
    Drawing,
    ImageName,
    Options,
    Region,
    Source,
)

TITLE = "3D Slicer, ITK-SNAP"
_SUFFIX = re.compile(
    r"(.+?)[_\-. ]?(?<![a-z])(masks?|gt|segs?|segm|segmentations?|labels?|labelmaps?)([_\-. ]\d+)?",
    re.IGNORECASE,
)
_SNAP = re.compile(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+[\d.]+\s+[01]\s+[01]\s+"([^"]*)"\s*')
_MOST_TEXT = 1 << 20
_MOST_SEGMENTS = 254


def recognises(path: str) -> bool:
    return bool(_volumes(path))


def read(path: str, options: Options) -> Source:
    """:raises UserError: naming the file, if it is no label map or its image is not found."""
    source = Source()
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    names = _snap_labels(folder, source)
    images: dict[str, list[str]] = {}
    for one in _images(options.images or folder):
        images.setdefault(os.path.basename(stem(one)), []).append(one)
    every = {volumes.name_of(found): found for found in _volumes(folder)}
    for file in _volumes(path):
        name = volumes.name_of(file)
        base = _SUFFIX.fullmatch(name)
        if any(_is_labels_of(other, name) for other in every):
            continue  # the image of another
        if base and base[1] in every:
            picture = every[base[1]]
            image = ImageName(picture, title=base[1], convert=partial(volumes.picture, picture))
        else:
            image = _image_of(file, [name, base[1] if base else name], images)
        plane = _placement(image).axes[:2]
        source.drawings.append(_drawing(file, image, plane, names, source))
    return source


def _placement(image: ImageName) -> Placement:
    """Of the radiograph, as ITK would place it."""
    try:
        return find_placement(image.path) if image.path else Placement()
    except ImageError:  # reading the image reports it
        return Placement()


def _volumes(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path] if volumes.name_of(path) and os.path.isfile(path) else []
    found = []
    for root, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        found += [os.path.join(root, n) for n in sorted(names) if not is_ignored(n)]
    return [file for file in found if volumes.name_of(file)]


def _images(folder: str) -> list[str]:
    try:
        return list_images(folder)
    except UserError:  # none: they may be volumes too
        return []


def _is_labels_of(name: str, image: str) -> bool:
    match = _SUFFIX.fullmatch(name)
    return match is not None and match[1] == image


def _image_of(file: str, names: list[str], images: Mapping[str, list[str]]) -> ImageName:
    """The image with the name of the label map; or the only one in its folder."""
    for name in names:
        found = images.get(composed(name), [])
        if len(found) > 1:
            raise UserError(f"{file} could belong to {' or '.join(found[:3])}; rename one")
        if found:
            return ImageName(found[0], path=found[0])
    beside = [one for found in images.values() for one in found if _same_folder(one, file)]
    if len(beside) == 1:
        return ImageName(beside[0], path=beside[0])
    return ImageName(names[-1])


def _same_folder(one: str, other: str) -> bool:
    return os.path.abspath(os.path.dirname(one)) == os.path.abspath(os.path.dirname(other))


def _drawing(
    file: str,
    image: ImageName,
    plane: volumes.Plane,
    names: Mapping[int, str] | None,
    source: Source,
) -> Drawing:
    def layer(number: int) -> np.ndarray:
        return volumes.read_kept(file).layers(file, plane)[number]

    volume = volumes.read_kept(file)
    shape = volume.layers(file, plane).shape
    segments = _segments(volume.header, file, shape[0])
    if segments:
        found = []
        for name, value, number, color in segments:
            source.add_class(name, color)
            shape_of = Label(partial(layer, number), value, file)
            found.append(Region(name, f"{file} ({name})", shape_of))
    else:
        if shape[0] != 1:
            raise UserError(f"{file} has {shape[0]} layers without names; export it again")
        found = regions(partial(layer, 0), names, file)
        for region in found:
            source.add_class(region.name)
    return Drawing(image, file, found, shape[1:])


def _segments(
    header: Mapping[str, Any], file: str, layers: int
) -> list[tuple[str, int, int, Color | None]]:
    """Name, value, layer and colour of the segments in the header of .seg.nrrd."""
    found = []
    for number in range(_MOST_SEGMENTS):
        key = f"Segment{number}_"
        if f"{key}Name" not in header and f"{key}ID" not in header:
            break
        stated = header.get(f"{key}Name") or header[f"{key}ID"]
        name = Node(str(stated), f"{file} {key}Name").text()
        value, layer = (
            Node(_whole(header.get(f"{key}{what}", default)), f"{file} {key}{what}").whole(0, 2**16)
            for what, default in (("LabelValue", str(number + 1)), ("Layer", "0"))
        )
        if layer >= layers:
            raise UserError(f"{file} {key}Layer is {layer}, of {layers} layers; export it again")
        found.append((name, value, layer, _color(str(header.get(f"{key}Color", "")))))
    return found


def _whole(text: object) -> object:
    shown = str(text).strip()
    return int(shown) if shown.isascii() and shown.isdecimal() and len(shown) < 10 else shown


def _color(text: str) -> Color | None:
    """Three shares of 1."""
    try:
        shares = [float(word) for word in text.split()]
        red, green, blue = (min(255, max(0, round(255 * share))) for share in shares)
    except (ValueError, OverflowError):
        return None
    return red, green, blue


def _snap_labels(folder: str, source: Source) -> dict[int, str] | None:
    """The label descriptions that ITK-SNAP saves, where a text file in the folder holds them."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not name.lower().endswith((".txt", ".label")) or os.path.getsize(path) > _MOST_TEXT:
            continue
        try:
            lines = read_text(path).splitlines()
        except UserError:
            continue
        found = [match for line in lines if (match := _SNAP.fullmatch(line))]
        if not found:
            continue
        labels = {}
        for match in found:
            value = int(match[1][:9])
            red, green, blue = (min(255, int(match[i][:3])) for i in (2, 3, 4))
            if value:
                labels[value] = Node(match[5], f"{path} label {value}").text()
                source.add_class(labels[value], (red, green, blue))
        return labels
    return None
