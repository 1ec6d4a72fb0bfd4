"""LabelMe: one JSON file per image, beside it or with the image embedded."""

import os

import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading import embedded
from guided_diffusion.segmentation.annotations.reading.node import Node, load
from guided_diffusion.segmentation.annotations.reading.raster import (
    Bitmap,
    Ellipse,
    Line,
    Polygon,
    rectangle,
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

TITLE = "LabelMe"
ENDINGS = (".json",)


def recognises(path: str) -> bool:
    value = load(path).value
    return isinstance(value, dict) and isinstance(value.get("shapes"), list)


def read(path: str, options: Options) -> Source:
    """:raises UserError: naming the file and the shape, if it is not LabelMe's."""
    content, source = load(path), Source()
    name = content.get("imagePath")
    stored = content.get("imageData")
    image = ImageName(
        os.path.splitext(os.path.basename(path))[0] if name is None else name.path(),
        embedded=None if stored is None else lambda: embedded.decode(load(path).need("imageData")),
    )
    regions = []
    for shape in content.need("shapes").entries():
        label = shape.need("label").name()
        where = f"{shape.where} ({label})"
        drawn = _shape(shape, where, options.line_width)
        if isinstance(drawn, str):
            source.omit(where, drawn)
            continue
        source.add_class(label)
        regions.append(Region(label, where, drawn))
    source.drawings.append(Drawing(image, path, regions, _size(content)))
    return source


def _size(content: Node) -> Size | None:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if height is None or width is None:
        return None
    return height.whole(1), width.whole(1)


def _shape(shape: Node, where: str, line_width: float) -> Shape | str:
    """What a shape covers; or why it covers nothing."""
    stated = shape.get("shape_type")
    kind = "polygon" if stated is None else stated.text()
    listed = shape.need("points")
    points = listed.points()
    needed = {"rectangle": (2, 4), "circle": (2,), "line": (2,), "mask": (2,)}.get(kind)
    if needed and len(points) not in needed:
        counts = " or ".join(map(str, needed))
        raise UserError(f"{where}: a {kind} has {counts} points, not {len(points)}; draw it again")
    if kind in ("polygon", "oriented_rectangle"):
        return Polygon((points,)) if len(points) >= 3 else "a polygon of fewer than 3 points"
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        return rectangle(x0, y0, x1, y1)
    if kind == "circle":
        radius = float(np.hypot(*(points[1] - points[0])))
        return Ellipse((points[0, 0], points[0, 1]), (radius, radius))
    if kind in ("line", "linestrip"):
        return _line(points, line_width)
    if kind == "mask":
        mask = embedded.mask_of(shape.need("mask"))
        column, row = np.rint(points.min(axis=0)).astype(int)
        return Bitmap(mask, (int(row), int(column)))
    return f"shapes of the type {kind[:40]} cover no pixels"


def _line(points: np.ndarray, width: float) -> Shape | str:
    if width <= 0:
        return "a line, and --line_width is 0"
    return Line(points, width) if len(points) >= 2 else "a line of one point"
