"""CVAT for images 1.1: one XML file for all images of a task."""

import math
import re
from functools import lru_cache
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import numpy as np

from guided_diffusion.images.names import composed
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.node import MOST_COORDINATE, Node, short
from guided_diffusion.segmentation.annotations.reading.packages import need
from guided_diffusion.segmentation.annotations.reading.raster import (
    Ellipse,
    Line,
    Polygon,
    Runs,
    rectangle,
)
from guided_diffusion.segmentation.annotations.reading.source import (
    Color,
    Drawing,
    ImageName,
    Options,
    Region,
    Shape,
    Source,
)

TITLE = "CVAT for images 1.1"
ENDINGS = (".xml",)
_PLAIN = re.compile(r"[0-9]{1,10}")
_EXPORT = 'export the task as "CVAT for images 1.1"'


def recognises(path: str) -> bool:
    root = _parsed(path)
    return root.tag == "annotations" and (
        root.find("image") is not None or root.find("meta") is not None
    )


def read(path: str, options: Options) -> Source:
    """:raises UserError: naming the file and the annotation, if it is not CVAT's."""
    root, source = _parsed(path), Source()
    if root.tag != "annotations":
        raise UserError(f"{path} is XML of another program; {_EXPORT}")
    if root.find("track") is not None:
        raise UserError(f"{path} holds the tracks of a video; {_EXPORT}")
    for label in root.iterfind("meta//labels/label"):
        name = Node(label.findtext("name"), f"{path} label").text()
        source.add_class(name, _color(label.findtext("color")))
    ignored: set[str] = set()
    for number, image in enumerate(root.iterfind("image")):
        name = Node(image.get("name"), f"{path} image {number} name").path()
        where = f"{path} image {number} ({short(name)})"
        ordered = []
        for place, element in enumerate(image):
            here = f"{where} {element.tag} {place}"
            if element.tag == "tag":
                continue
            label_of = Node(element.get("label"), f"{here} label").text()
            values = _attributes(element, here)
            chosen = values.pop(options.attribute, "") if options.attribute else ""
            ignored |= values.keys()
            shape = _shape(element, here, options.line_width)
            if isinstance(shape, str):
                source.omit(here, shape)
                continue
            source.add_class(chosen or label_of)
            order = _number(element, "z_order", here, "0")
            ordered.append((order, Region(chosen or label_of, here, shape)))
        ordered.sort(key=lambda pair: pair[0])
        height, width = (
            Node(_whole(image.get(side)), f"{where} {side}") for side in ("height", "width")
        )
        size = None if height.value is None else (height.whole(1), width.whole(1))
        regions = [region for _, region in ordered]
        source.drawings.append(Drawing(ImageName(name), where, regions, size))
    for name in sorted(ignored):
        source.omit(f"attribute {name}", "--attribute names the one whose value is the class")
    return source


@lru_cache(maxsize=1)
def _parsed(path: str) -> Element:
    """The root of an XML file, without entities and without a document type."""
    reader = need("defusedxml.ElementTree", "defusedxml", "CVAT")
    common = need("defusedxml.common", "defusedxml", "CVAT")
    try:
        return reader.parse(path, forbid_dtd=True).getroot()
    except common.DefusedXmlException as error:
        raise UserError(
            f"{path} declares a document type or entities, which no annotation needs; {_EXPORT}"
        ) from error
    except ParseError as error:
        raise UserError(
            f"{path} is not valid XML ({short(str(error))[1:-1]}); {_EXPORT}"
        ) from error
    except (ValueError, LookupError, RecursionError) as error:  # of encodings
        raise UserError(f"{path} is not valid XML; {_EXPORT}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _color(text: str | None) -> Color | None:
    """A colour such as #ff0000."""
    try:
        red, green, blue = bytes.fromhex((text or "").strip().removeprefix("#"))
    except ValueError:
        return None
    return red, green, blue


def _attributes(element: Element, where: str) -> dict[str, str]:
    found = {}
    for attribute in element.iterfind("attribute"):
        name = Node(attribute.get("name"), f"{where} attribute").text()
        found[name] = composed((attribute.text or "").strip())
    return found


def _whole(text: str | None) -> int | str | None:
    return int(text) if text is not None and _PLAIN.fullmatch(text) else text


def _number(element: Element, key: str, where: str, default: str | None = None) -> float:
    return _float(element.get(key, default), f"{where} {key}")


def _float(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not abs(value) <= MOST_COORDINATE:
        raise UserError(f"{where} is {short(text)}, not a number in or near the image; {_EXPORT}")
    return value


def _points(element: Element, where: str) -> np.ndarray:
    """x,y;x,y;... as float64 [N x 2]."""
    pairs = [pair.split(",") for pair in (element.get("points") or "").split(";") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{where} points are not pairs x,y;x,y;...; {_EXPORT}")
    values = [_float(text, f"{where} points") for pair in pairs for text in pair]
    return np.array(values, np.float64).reshape(-1, 2)


def _shape(element: Element, where: str, line_width: float) -> Shape | str:
    """What an element covers; or why it covers nothing."""

    def numbers(*keys: str) -> list[float]:
        return [_number(element, key, where) for key in keys]

    if element.tag == "polygon":
        points = _points(element, where)
        return Polygon((points,)) if len(points) >= 3 else "a polygon of fewer than 3 points"
    if element.tag == "box":
        angle = _number(element, "rotation", where, "0")
        x0, y0, x1, y1 = numbers("xtl", "ytl", "xbr", "ybr")
        return rectangle(x0, y0, x1, y1, angle)
    if element.tag == "ellipse":
        x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
        return Ellipse((x, y), (rx, ry), _number(element, "rotation", where, "0"))
    if element.tag == "polyline":
        points = _points(element, where)
        if line_width <= 0:
            return "a line, and --line_width is 0"
        return Line(points, line_width) if len(points) >= 2 else "a line of one point"
    if element.tag == "mask":
        return _runs(element, where)
    return f"annotations of the kind {element.tag[:40]} cover no pixels"


def _runs(element: Element, where: str) -> Runs:
    def whole(key: str, least: int) -> int:
        return Node(_whole(element.get(key)), f"{where} {key}").whole(least, 2**16)

    listed: list[Any] = [_whole(text.strip()) for text in (element.get("rle") or "").split(",")]
    counts = Node(listed, f"{where} rle").whole_numbers()
    size, corner = (whole("height", 1), whole("width", 1)), (whole("top", 0), whole("left", 0))
    return Runs(counts, size, where, corner)


def forget() -> None:
    """Release the file that is kept."""
    _parsed.cache_clear()
