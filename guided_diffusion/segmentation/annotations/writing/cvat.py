"""CVAT for images 1.1: one XML file for all radiographs.

Parts are polygons; those with holes, which polygons of CVAT cannot have, are its masks.
"""

from typing import NamedTuple
from xml.etree import ElementTree

from guided_diffusion.runtime.storage.files import write_atomically
from guided_diffusion.segmentation.annotations.writing.labelled import (
    Labelled,
    Shape,
    check_text_names,
    file_name,
)
from guided_diffusion.segmentation.annotations.writing.runs import run_lengths
from guided_diffusion.segmentation.annotations.writing.writer import TableWriter


class _Image(NamedTuple):
    name: str
    height: int
    width: int
    shapes: list[ElementTree.Element]


class CvatWriter(TableWriter):
    FILE = "annotations.xml"

    def check(self, skip_unreadable: bool) -> None:
        check_text_names(self.sources, "XML")

    def record(self, labelled: Labelled) -> _Image:
        height, width = labelled.mask.shape
        shapes = [_element(shape) for shape in labelled.shapes]
        return _Image(file_name(labelled.source), height, width, shapes)

    def write(self, records: list[_Image]) -> None:
        root = ElementTree.Element("annotations")
        ElementTree.SubElement(root, "version").text = "1.1"
        task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
        ElementTree.SubElement(task, "size").text = str(len(records))
        ElementTree.SubElement(task, "mode").text = "annotation"
        labels = ElementTree.SubElement(task, "labels")
        for label in self.labels:
            element = ElementTree.SubElement(labels, "label")
            ElementTree.SubElement(element, "name").text = label.name
            ElementTree.SubElement(element, "color").text = "#{:02x}{:02x}{:02x}".format(
                *label.color
            )
            ElementTree.SubElement(element, "type").text = "any"
            ElementTree.SubElement(element, "attributes")
        for number, image in enumerate(records):
            size = {"width": str(image.width), "height": str(image.height)}
            attributes = {"id": str(number), "name": image.name, **size}
            ElementTree.SubElement(root, "image", attributes).extend(image.shapes)
        ElementTree.indent(root)
        content = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"
        write_atomically(self.path, lambda file: file.write(content))


def _element(shape: Shape) -> ElementTree.Element:
    label, part = shape
    common = {"label": label.name, "source": "file", "occluded": "0", "z_order": "0"}
    if len(part.rings) == 1:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in part.rings[0])
        return ElementTree.Element("polygon", {**common, "points": points})
    height, width = part.pixels.shape
    place = {"left": part.left, "top": part.top, "width": width, "height": height}
    runs = ", ".join(map(str, run_lengths(part.pixels)))
    texts = {name: str(value) for name, value in place.items()}
    return ElementTree.Element("mask", {**common, "rle": runs, **texts})
