"""COCO: one JSON file for all radiographs, an annotation for each part of a class.

Parts are polygons; those with holes, which polygons of COCO cannot have, are run-length encoded.
"""

import json
from typing import Any

import numpy as np

from guided_diffusion.runtime.storage.files import write_atomically
from guided_diffusion.segmentation.annotations.writing.labelled import Labelled, Shape, file_name
from guided_diffusion.segmentation.annotations.writing.runs import run_lengths
from guided_diffusion.segmentation.annotations.writing.writer import TableWriter


class CocoWriter(TableWriter):
    FILE = "annotations.json"

    def record(self, labelled: Labelled) -> dict[str, Any]:
        height, width = labelled.mask.shape
        image = {"file_name": file_name(labelled.source), "height": height, "width": width}
        return {
            "image": image,
            "annotations": [_annotation(s, height, width) for s in labelled.shapes],
        }

    def write(self, records: list[dict[str, Any]]) -> None:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, record in enumerate(records, start=1):
            images.append({"id": number, **record["image"]})
            for annotation in record["annotations"]:
                annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation})
        plain = {
            "info": {"description": "exported by guided-diffusion", "version": "1.0"},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": label.index, "name": label.name, "supercategory": ""}
                for label in self.labels
            ],
        }
        text = json.dumps(plain, allow_nan=False) + "\n"
        write_atomically(self.path, lambda file: file.write(text.encode()))


def _annotation(shape: Shape, height: int, width: int) -> dict[str, Any]:
    label, part = shape
    rows, columns = part.pixels.shape
    if len(part.rings) == 1:
        segmentation: Any = [part.rings[0].ravel().tolist()]
    else:
        segmentation = {"size": [height, width], "counts": _runs(shape, height, width)}
    return {
        "category_id": label.index,
        "segmentation": segmentation,
        "area": part.area,
        "bbox": [part.left, part.top, columns, rows],
        "iscrowd": 0,
    }


def _runs(shape: Shape, height: int, width: int) -> list[int]:
    """Lengths of runs down the columns, of pixels outside and inside in turn."""
    part = shape.part
    rows, columns = part.pixels.shape
    mask = np.zeros((height, width), bool)
    mask[part.top : part.top + rows, part.left : part.left + columns] = part.pixels
    return run_lengths(mask.T)
