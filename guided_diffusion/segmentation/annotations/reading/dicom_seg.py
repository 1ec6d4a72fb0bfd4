"""DICOM segmentations, by the instance of the image that each frame refers to."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from guided_diffusion.images.files import list_images, open_file
from guided_diffusion.images.image_io import MAX_PIXELS, image_errors
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.node import Node, short
from guided_diffusion.segmentation.annotations.reading.source import (
    Color,
    Drawing,
    ImageName,
    Options,
    Region,
    Size,
    Source,
)

TITLE = "DICOM-SEG"
_HALF = 0.5  # of a fraction's maximum, from which a pixel belongs to the segment


def recognises(path: str) -> bool:
    return any(True for _ in _segmentations(path))


def read(path: str, options: Options) -> Source:
    """:raises UserError: naming the file, if it is damaged or refers to no image."""
    source = Source()
    folder = options.images or (path if os.path.isdir(path) else os.path.dirname(path) or ".")
    images = {uid: image for image, modality, uid in _headers(folder) if modality != "SEG"}
    for file in _segmentations(path):
        seg = _Segmentation(file)
        for _, (name, color) in sorted(seg.segments.items()):
            source.add_class(name, color)
        for uid, frames in seg.frames_of.items():
            found = images.get(uid)
            image = ImageName(found or uid, path=found)
            regions = []
            for number in sorted(frames):
                name = seg.segments[number][0]
                shape = _Frames(file, tuple(frames[number]), number)
                regions.append(Region(name, f"{file} segment {number} ({name})", shape))
            source.drawings.append(Drawing(image, f"{file} (of {short(uid)})", regions, seg.size))
    return source


def _headers(folder: str) -> Iterator[tuple[str, str, str]]:
    """Path, modality and instance of DICOM files."""
    import pydicom

    tags = ["Modality", "SOPInstanceUID"]
    try:
        paths = list_images(folder)
    except UserError:
        return
    for path in paths:
        try:
            with open_file(path) as file:
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
                found = str(header.get("Modality", "")), str(header.get("SOPInstanceUID", ""))
        except Exception:  # no DICOM, or damaged: reading it as an image would report it
            continue
        yield path, *found


def _segmentations(path: str) -> Iterator[str]:
    return (file for file, modality, _ in _headers(path) if modality == "SEG")


class _Segmentation:
    """What the header of a segmentation says.

    segments   names and colours by number
    frames_of  frame numbers by segment, of each image that is referred to
    """

    def __init__(self, path: str) -> None:
        data = _parsed(path)
        with image_errors(path):
            rows, columns = int(data.Rows), int(data.Columns)
            count = int(data.get("NumberOfFrames") or 1)
            if rows * columns * count > MAX_PIXELS * 4:
                raise UserError(f"{path} has {count} frames of {rows} x {columns}: too many pixels")
            self.size: Size = (rows, columns)
            self.segments: dict[int, tuple[str, Color | None]] = {}
            for item in data.SegmentSequence:
                number = int(item.SegmentNumber)
                label = Node(str(item.SegmentLabel), f"{path} segment {number}").text()
                lab = item.get("RecommendedDisplayCIELabValue")
                self.segments[number] = label, None if lab is None else rgb_of_lab(list(lab))
            self.frames_of: dict[str, dict[int, list[int]]] = {}
            kind = str(data.get("SegmentationType", ""))
            only = _only_reference(data)
            shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
            for number, groups in enumerate(data.PerFrameFunctionalGroupsSequence):
                uids = _references(groups) or _references(shared) or only
                if len(uids) != 1:
                    raise UserError(
                        f"{path} frame {number + 1} refers to {len(uids) or 'no'} images, not to"
                        " one; export the segmentation of single radiographs"
                    )
                frames = self.frames_of.setdefault(uids[0], {})
                if kind == "LABELMAP":
                    numbers = [n for n in self.segments if n]
                else:
                    numbers = [_segment_of(groups, shared, path, number)]
                for segment in numbers:
                    if segment not in self.segments:
                        raise UserError(
                            f"{path} frame {number + 1} is of segment {segment}, which is not"
                            " described; export it again"
                        )
                    frames.setdefault(segment, []).append(number)
        if not self.frames_of:
            raise UserError(f"{path} has no frames; export it again")


def _segment_of(groups: Any, shared: Any, path: str, number: int) -> int:
    for place in (groups, shared):
        listed = None if place is None else place.get("SegmentIdentificationSequence")
        if listed:
            return int(listed[0].ReferencedSegmentNumber)
    raise UserError(f"{path} frame {number + 1} names no segment; export it again")


def _references(groups: Any) -> list[str]:
    """The images that a frame was derived from."""
    found: dict[str, None] = {}
    derived = None if groups is None else groups.get("DerivationImageSequence")
    for derivation in derived or ():
        for image in derivation.get("SourceImageSequence") or ():
            found[str(image.ReferencedSOPInstanceUID)] = None
    return list(found)


def _only_reference(data: Any) -> list[str]:
    """The images that the whole file refers to."""
    found: dict[str, None] = {}
    for series in data.get("ReferencedSeriesSequence") or ():
        for image in series.get("ReferencedInstanceSequence") or ():
            found[str(image.ReferencedSOPInstanceUID)] = None
    for image in data.get("SourceImageSequence") or ():
        found[str(image.ReferencedSOPInstanceUID)] = None
    return list(found)


@dataclass(frozen=True)
class _Frames:
    """The frames of one segment on one image; decoded when they are drawn."""

    path: str
    frames: tuple[int, ...]
    segment: int

    def draw(self, size: Size) -> np.ndarray:
        values, kind, most = _pixels(self.path)
        chosen = values[list(self.frames)]
        if kind == "LABELMAP":
            found = chosen == self.segment
        else:
            found = chosen >= (_HALF * most if kind == "FRACTIONAL" else 1)
        joined = found.any(axis=0)
        if joined.shape != size:
            raise UserError(
                f"{self.path} has {joined.shape[0]} x {joined.shape[1]} pixels (height x width),"
                f" its image has {size[0]} x {size[1]}; export it again for this image"
            )
        return joined


@lru_cache(maxsize=1)
def _parsed(path: str) -> Any:
    from guided_diffusion.images.dicom_file import parse

    with image_errors(path), open_file(path) as file:
        return parse(file.read(), MAX_PIXELS)


@lru_cache(maxsize=1)
def _pixels(path: str) -> tuple[np.ndarray, str, int]:
    """All frames [N x H x W], the type of segmentation, and the maximum of fractions."""
    from pydicom import pixels

    with image_errors(path):
        data = _parsed(path)
        values = pixels.pixel_array(data)
        values = values[None] if values.ndim == 2 else values
        kind = str(data.get("SegmentationType", "")).upper()
        return values, kind, int(data.get("MaximumFractionalValue") or 255)


def rgb_of_lab(values: list[int]) -> Color | None:
    """DICOM's CIELab (PS3.3 C.10.7.1.1: three numbers of 16 bits, D50) as sRGB."""
    if len(values) != 3:
        return None
    lightness = values[0] / 65535 * 100
    a, b = (value / 65535 * 255 - 128 for value in values[1:])
    middle = (lightness + 16) / 116
    curve = [middle + a / 500, middle, middle - b / 200]
    xyz = [t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29) for t in curve]
    # white of D50; then to the primaries of sRGB, adapted to D65 (Bradford)
    x, y, z = (value * white for value, white in zip(xyz, (0.96422, 1.0, 0.82521)))
    linear = (
        3.1338561 * x - 1.6168667 * y - 0.4906146 * z,
        -0.9787684 * x + 1.9161415 * y + 0.0334540 * z,
        0.0719453 * x - 0.2289914 * y + 1.4052427 * z,
    )
    shown = [
        12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055
        for v in (min(1.0, max(0.0, value)) for value in linear)
    ]
    red, green, blue = (round(255 * value) for value in shown)
    return red, green, blue


def forget() -> None:
    """Release the files that are kept."""
    _parsed.cache_clear()
    _pixels.cache_clear()
