"""COCO: polygons and run lengths in one JSON file for all images.

Pixels are those of pycocotools.mask: of a polygon those that its own rule takes, which rounds
outlines at a fifth of a pixel; parts of one annotation are joined.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from guided_diffusion.images.names import composed
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.node import Node, load, short
from guided_diffusion.segmentation.annotations.reading.packages import need
from guided_diffusion.segmentation.annotations.reading.raster import Runs
from guided_diffusion.segmentation.annotations.reading.source import (
    Drawing,
    ImageName,
    Options,
    Region,
    Shape,
    Size,
    Source,
)

TITLE = "COCO"
ENDINGS = (".json",)
_FAR = 10  # times the image's size: how far outside a point may lie


@dataclass(frozen=True)
class _Polygons:
    """The parts of one annotation, each x, y, x, y, ..."""

    parts: tuple[np.ndarray, ...]
    where: str

    def draw(self, size: Size) -> np.ndarray:
        mask = need("pycocotools.mask", "pycocotools", "COCO")
        limit = _FAR * max(size)
        far = [x for part in self.parts for x in part.ravel().tolist() if abs(x) > limit]
        if far:
            raise UserError(
                f"{self.where} has a coordinate of {far[0]:g}, far outside of the image of"
                f" {size[0]} x {size[1]} pixels (height x width); correct the annotation"
            )
        runs = mask.frPyObjects([part.ravel().tolist() for part in self.parts], *size)
        counts = uncompressed(mask.merge(runs)["counts"])
        if counts is None:
            raise UserError(f"{self.where} cannot be filled; correct the annotation")
        return Runs(counts, size, self.where, column_wise=True).draw(size)


def recognises(path: str) -> bool:
    value = load(path).value
    return isinstance(value, dict) and all(
        isinstance(value.get(key), list) for key in ("images", "annotations")
    )


def read(path: str, options: Options) -> Source:
    """:raises UserError: naming the file and the annotation, if it is not COCO."""
    content, source = load(path), Source()
    names = _classes(content, source)
    images: dict[Any, Node] = {}
    for image in content.need("images").entries():
        number = _key(image.need("id"))
        if number in images:
            raise UserError(
                f"{image.where}.id is {number}, as that of {images[number].where}; ids must differ"
            )
        images[number] = image
    regions: dict[Any, list[Region]] = {number: [] for number in images}
    boxes = Counter[str]()
    for annotation in content.need("annotations").entries():
        number = _key(annotation.need("image_id"))
        if number not in regions:
            raise annotation.need("image_id").fail("the id of an image in the file")
        category = annotation.need("category_id")
        if _key(category) not in names:
            raise category.fail("the id of a category in the file")
        where = _where(annotation)
        shape = _shape(annotation, where)
        if isinstance(shape, str):
            boxes[shape] += 1
            source.omit(where, shape)
        else:
            regions[number].append(Region(names[_key(category)], where, shape))
    if boxes and not any(regions.values()):
        raise UserError(
            f"{path}: none of its {boxes.total()} annotations has an outline or mask"
            f" ({', '.join(boxes)}); export segmentations, not boxes"
        )
    _drop_headings(content, source, {r.name for found in regions.values() for r in found})
    for number, image in images.items():
        name = image.need("file_name").path()
        size = _size(image)
        drawing = Drawing(ImageName(name), f"{image.where} ({short(name)})", regions[number], size)
        source.drawings.append(drawing)
    return source


def _classes(content: Node, source: Source) -> dict[Any, str]:
    """The names of categories by id."""
    names: dict[Any, str] = {}
    categories = content.get("categories")
    listed = [] if categories is None else list(categories.entries())
    for category in listed:
        number = _key(category.need("id"))
        name = category.need("name").name()
        if names.setdefault(number, name) != name:
            raise UserError(
                f"{category.where}.id is {number}, as that of {names[number]!r}; ids must differ"
            )
        source.add_class(name, _color(category))
    return names


def _drop_headings(content: Node, source: Source, used: set[str]) -> None:
    """Leave out categories that only head others, as Roboflow lists one."""
    categories = content.get("categories")
    headings = set()
    for category in () if categories is None else categories.entries():
        heading = category.value.get("supercategory")
        if isinstance(heading, str) and heading != category.value["name"]:
            headings.add(composed(heading.strip()))
    for name in [name for name in source.classes if name in headings - used]:
        del source.classes[name]
        source.omit(f"category {name}", "it heads others, and no annotation has it")


def _color(category: Node) -> tuple[int, int, int] | None:
    """The colour that panoptic files state."""
    color = category.get("color")
    if color is None or not isinstance(color.value, list) or len(color.value) != 3:
        return None
    red, green, blue = (part.whole(0, 255) for part in color.entries())
    return red, green, blue


def _key(node: Node) -> Any:
    """An id: a whole number, or a text."""
    if isinstance(node.value, str):
        return node.value
    return node.whole(-(2**63), 2**63)


def _where(annotation: Node) -> str:
    number = annotation.value.get("id")
    plain = isinstance(number, int | str) and len(str(number)) < 40 and str(number).isprintable()
    return f"{annotation.where} (id {number})" if plain else annotation.where


def _size(image: Node) -> Size | None:
    height, width = image.get("height"), image.get("width")
    if height is None or width is None:
        return None
    return height.whole(1), width.whole(1)


def _shape(annotation: Node, where: str) -> Shape | str:
    """What an annotation covers; or why it covers nothing."""
    segmentation = annotation.get("segmentation")
    if segmentation is None or not segmentation.value:
        return "a box without an outline"
    if isinstance(segmentation.value, dict):
        return _runs(segmentation, where)
    parts = []
    for part in segmentation.entries():
        points = part.flat_points()
        if len(points) >= 3:
            parts.append(points)
    return _Polygons(tuple(parts), where) if parts else "an outline of fewer than 3 points"


def _runs(segmentation: Node, where: str) -> Runs:
    height, width = _pair(segmentation.need("size"))
    counts = segmentation.need("counts")
    if isinstance(counts.value, str):
        found = None
        with contextlib.suppress(UnicodeEncodeError):
            found = uncompressed(counts.value.encode("ascii"))
        if found is None:
            raise counts.fail("the compressed run lengths of COCO")
    else:
        found = counts.whole_numbers()
    return Runs(found, (height, width), where, column_wise=True)


def _pair(node: Node) -> tuple[int, int]:
    values = node.whole_numbers()
    if len(values) != 2 or not 1 <= values.min() <= values.max() < 2**16:
        raise node.fail("a height and a width")
    return int(values[0]), int(values[1])


def uncompressed(text: bytes) -> np.ndarray | None:
    """Run lengths of COCO's compressed form, int64 [N]; None if it is damaged.

    Each is written in groups of 5 bits, the lowest first, a character each from code 48 on; the
    sixth bit says that more follow, the fifth of the last group is the sign. From the fourth on,
    they are differences to the one before the last.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 12:
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= (codes[ends] >> 4 & 1) << (5 * lengths)
    for first in (1, 2):  # differences add up along every second run, from the second and third on
        values[first::2] = np.cumsum(values[first::2])
    return values if values.min() >= 0 and values.max() < 2**31 else None
