"""VGG Image Annotator 2: a project, or its annotations as JSON."""

import math

import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.node import Node, load, short
from guided_diffusion.segmentation.annotations.reading.raster import (
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
    Source,
)

TITLE = "VIA 2"
ENDINGS = (".json",)


def recognises(path: str) -> bool:
    value = load(path).value
    if not isinstance(value, dict) or not value:
        return False
    if isinstance(value.get("_via_img_metadata"), dict):
        return True
    return all(
        isinstance(one, dict) and {"filename", "regions"} <= set(one) for one in value.values()
    )


def read(path: str, options: Options) -> Source:
    """:raises UserError: naming the file and the region, if it is not VIA's."""
    content, source = load(path), Source()
    listed = content.get("_via_img_metadata") or content
    images = [image for _, image in listed.items()]
    attribute = options.attribute or _only_attribute(images, path)
    for image in images:
        name = image.need("filename").path()
        regions = []
        for region in _regions(image):
            shape_of = region.need("shape_attributes")
            label = _label(region, attribute)
            if not label:
                source.omit(region.where, f"its attribute {attribute} is empty")
                continue
            where = f"{region.where} ({label})"
            shape = _shape(shape_of, options.line_width)
            if isinstance(shape, str):
                source.omit(where, shape)
                continue
            source.add_class(label)
            regions.append(Region(label, where, shape))
        source.drawings.append(Drawing(ImageName(name), f"{path} ({short(name)})", regions))
    return source


def _regions(image: Node) -> list[Node]:
    regions = image.need("regions")
    if isinstance(regions.value, dict):  # of VIA 1
        return [region for _, region in regions.items()]
    return list(regions.entries())


def _only_attribute(images: list[Node], path: str) -> str:
    """The attribute of regions, where there is one."""
    names: dict[str, None] = {}
    for image in images:
        for region in _regions(image):
            attributes = region.get("region_attributes")
            if attributes is not None:
                names.update((name, None) for name, _ in attributes.items())
    if not names:
        if any(_regions(image) for image in images):
            raise UserError(
                f"{path}: its regions have no attribute that could be the class; define one in VIA"
            )
        return ""
    if len(names) > 1:
        shown = ", ".join(short(name)[1:-1] for name in list(names)[:5])
        raise UserError(
            f"{path}: its regions have the attributes {shown}; name the one that is the class with"
            " --attribute"
        )
    return next(iter(names))


def _label(region: Node, attribute: str) -> str:
    """The value of the attribute; of a set of checkboxes the one that is checked; "" for none."""
    attributes = region.get("region_attributes")
    value = None if attributes is None else attributes.get(attribute)
    if value is None or value.value in ("", {}):
        return ""
    if isinstance(value.value, dict):
        checked = [name for name, flag in value.items() if flag.value]
        if len(checked) > 1:
            raise value.fail("one checked value", "check one of them")
        return Node(checked[0], value.where).text() if checked else ""
    return value.name()


def _shape(shape: Node, line_width: float) -> Shape | str:
    """What a region covers; or why it covers nothing."""
    kind = shape.need("name").text()

    def numbers(*keys: str) -> list[float]:
        return [shape.need(key).coordinate() for key in keys]

    if kind in ("polygon", "polyline"):
        axes = [
            [number.coordinate() for number in shape.need(key).entries()]
            for key in ("all_points_x", "all_points_y")
        ]
        if len(axes[0]) != len(axes[1]):
            raise UserError(f"{shape.where} has {len(axes[0])} x but {len(axes[1])} y coordinates")
        points = np.array(axes, np.float64).T
        if kind == "polygon":
            return Polygon((points,)) if len(points) >= 3 else "a polygon of fewer than 3 points"
        if line_width <= 0:
            return "a line, and --line_width is 0"
        return Line(points, line_width) if len(points) >= 2 else "a line of one point"
    if kind == "rect":
        x, y, width, height = numbers("x", "y", "width", "height")
        return rectangle(x, y, x + width, y + height)
    if kind == "circle":
        x, y, radius = numbers("cx", "cy", "r")
        return Ellipse((x, y), (radius, radius))
    if kind == "ellipse":
        x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
        turn = shape.get("theta")
        return Ellipse((x, y), (rx, ry), 0.0 if turn is None else math.degrees(turn.coordinate()))
    return f"regions of the kind {short(kind)} cover no pixels"
