"""Label Studio's JSON: a list of tasks, each with the annotations of one or more people."""

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading import brush, embedded
from guided_diffusion.segmentation.annotations.reading.node import Node, load, short
from guided_diffusion.segmentation.annotations.reading.raster import (
    Bitmap,
    Ellipse,
    Polygon,
    rectangle,
    turned,
)
from guided_diffusion.segmentation.annotations.reading.source import (
    Drawing,
    ImageName,
    Options,
    Region,
    Shape,
    Size,
    Source,
)

TITLE = "Label Studio"
ENDINGS = (".json",)
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # that Label Studio puts before names of files


def recognises(path: str) -> bool:
    value = load(path).value
    return isinstance(value, list) and any(
        isinstance(task, dict) and "data" in task and "annotations" in task for task in value
    )


def read(path: str, options: Options) -> Source:
    """:raises UserError: naming the file and the annotation, if it is not Label Studio's JSON."""
    source = Source()
    for task in load(path).entries():
        if not isinstance(task.value, dict) or "annotations" not in task.value:
            raise UserError(f"{task.where} has no annotations; export as JSON, not as JSON-MIN")
        image = ImageName(_image(task.need("data")))
        found = []
        for annotation in task.need("annotations").entries():
            cancelled = annotation.get("was_cancelled")
            if cancelled is not None and cancelled.value:
                source.omit(annotation.where, "skipped by its annotator")
            else:
                found.append(_drawing(annotation, image, source))
        source.drawings += found or [Drawing(image, f"{task.where} ({short(image.name)})", [])]
    return source


def _image(data: Node) -> str:
    """The name of a task's image, without what the web adds to it."""
    texts = {key: value for key, value in data.items() if isinstance(value.value, str)}
    chosen = texts.get("image") or (next(iter(texts.values())) if len(texts) == 1 else None)
    if chosen is None:
        raise UserError(f"{data.where} lacks 'image', the address of the task's image")
    address = chosen.path()
    parts = urlsplit(address) if "://" in address or address.startswith("/data/") else None
    if parts is None:
        return address
    inside = parse_qs(parts.query).get("d")
    return unquote(inside[0] if inside else parts.path)


def original_name(name: str) -> str:
    """A file's name before it was uploaded."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + _UPLOADED.sub("", last, count=1)


def _drawing(annotation: Node, image: ImageName, source: Source) -> Drawing:
    results = list(annotation.need("result").entries())
    names: dict[Any, str] = {}  # of regions whose label is a result of its own
    for result in results:
        if label := _label(result):
            names.setdefault(_id(result), label)
    sizes: dict[Size, str] = {}
    regions = []
    for result in results:
        kind = result.need("type").text()
        value = result.get("value")
        if kind in ("labels", "choices", "textarea", "rating") or value is None:
            continue
        turned = result.get("image_rotation")
        if turned is not None and turned.value:
            raise turned.fail("0", "turn the image file itself, and draw on that")
        size = _size(result)
        label = _label(result) or names.get(_id(result), "")
        if size is None or not label:
            source.omit(result.where, f"a {kind[:40]} without " + ("a label" if size else "a size"))
            continue
        where = f"{result.where} ({label})"
        sizes.setdefault(size, where)
        shape = _shape(kind, value, size, where)
        if isinstance(shape, str):
            source.omit(where, shape)
            continue
        source.add_class(label)
        regions.append(Region(label, where, shape))
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise UserError(
            f"{first} was drawn on {one[0]} x {one[1]} pixels (height x width), {second} on"
            f" {other[0]} x {other[1]}; delete one of them"
        )
    where = f"{annotation.where} ({short(image.name)})"
    return Drawing(image, where, regions, next(iter(sizes), None), _annotator(annotation))


def _annotator(annotation: Node) -> str:
    """Who drew an annotation: address of mail or number."""
    person = annotation.get("completed_by")
    if person is not None and isinstance(person.value, dict):
        person = person.get("email") or person.get("id")
    if person is None:
        person = annotation.get("id")
    return "" if person is None else person.name()


def _id(result: Node) -> Any:
    value = result.value.get("id") if isinstance(result.value, dict) else None
    return value if isinstance(value, str) else id(result)


def _label(result: Node) -> str:
    """The label of a result, such as its polygonlabels; "" if it has none."""
    value = result.get("value")
    kind = result.need("type").text()
    if value is None or not isinstance(value.value, dict) or not kind.endswith("labels"):
        return ""
    labels = value.get(kind)
    if labels is None or not labels.value:
        return ""
    listed = [label.text() for label in labels.entries()]
    if len(listed) > 1:
        raise labels.fail("one label", "choose one of them")
    return listed[0]


def _size(result: Node) -> Size | None:
    height, width = result.get("original_height"), result.get("original_width")
    if height is None or width is None:
        return None
    return height.whole(1, 2**16), width.whole(1, 2**16)


@dataclass(frozen=True)
class _Brush:
    """Run lengths that are unpacked when they are drawn."""

    rle: Node
    painted_size: Size
    where: str

    def draw(self, size: Size) -> np.ndarray:
        if size != self.painted_size:
            raise UserError(
                f"{self.where} was painted on {self.painted_size[0]} x {self.painted_size[1]}"
                f" pixels (height x width), the image has {size[0]} x {size[1]}"
            )
        return brush.painted(self.rle, size)


def _shape(kind: str, value: Node, size: Size, where: str) -> Shape | str:
    """What a result covers; or why it covers nothing. Coordinates are per cent of the size."""
    turn = value.value.get("rotation") if isinstance(value.value, dict) else None
    angle = 0.0 if turn is None else Node(turn, f"{value.where}.rotation").coordinate()

    def pixels(key: str, side: int) -> float:
        return value.need(key).coordinate() * side / 100

    height, width = size
    kind = kind.removesuffix("labels")
    if kind == "polygon":
        points = value.need("points").points() * np.array([width, height]) / 100
        return Polygon((points,)) if len(points) >= 3 else "a polygon of fewer than 3 points"
    if kind == "rectangle":
        x, y = pixels("x", width), pixels("y", height)
        right, low = x + pixels("width", width), y + pixels("height", height)
        box = rectangle(x, y, right, low)
        return Polygon((turned(box.rings[0], np.array([x, y]), angle),))
    if kind == "ellipse":
        radii = pixels("radiusX", width), pixels("radiusY", height)
        return Ellipse((pixels("x", width), pixels("y", height)), radii, angle)
    if kind == "brush":
        stated = value.get("format")
        if stated is not None and stated.value != "rle":
            raise stated.fail("'rle'")
        return _Brush(value.need("rle"), size, where)
    if kind == "bitmask":
        mask = embedded.mask_of(value.need("imageDataURL"))
        if mask.shape != size:
            raise UserError(
                f"{where} has a mask of {mask.shape[0]} x {mask.shape[1]} pixels (height x width),"
                f" its image has {height} x {width}"
            )
        return Bitmap(mask)
    return f"results of the type {short(kind)} cover no pixels"
