"""LabelMe: a JSON file beside a copy of each radiograph.

Polygons of LabelMe have no holes: a line without width joins a hole to what surrounds it.
"""

import os
import shutil
from typing import Any

import numpy as np

from guided_diffusion.images.image_io import Intensity, open_image, read_image, write_image
from guided_diffusion.runtime.storage.files import is_local, save_json, write_atomically
from guided_diffusion.segmentation.annotations.polygons import without_holes
from guided_diffusion.segmentation.annotations.writing.labelled import Labelled, Shape, Source
from guided_diffusion.segmentation.annotations.writing.writer import FileWriter

# of the format, which has been the same since 4.5
VERSION = "5.5.0"


class LabelMeWriter(FileWriter):
    TRACES = True
    PACKAGES = ("shapely",)
    ENDING = ".json"

    def paths(self) -> list[str]:
        pictures = [path for source in self.sources for path in self._pictures(source)]
        return super().paths() + pictures

    def _pictures(self, source: Source) -> list[str]:
        """What the copy of a radiograph may be called."""
        base = os.path.join(self.folder, source.name)
        own = os.path.splitext(source.path)[1].lower()
        return [f"{base}.png"] + [f"{base}{own}"] * (own in (".jpg", ".jpeg", ".bmp"))

    def add(self, labelled: Labelled) -> None:
        height, width = labelled.mask.shape
        plain = {
            "version": VERSION,
            "flags": {},
            "shapes": [_plain(shape) for shape in labelled.shapes],
            "imagePath": os.path.basename(self._copy(labelled.source)),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        save_json(self.path_of(labelled.source), plain)

    def _copy(self, source: Source) -> str:
        """Copy a radiograph, or a picture of it where LabelMe does not show its format."""
        picture = open_image(source.path)
        copy, *others = self._pictures(source)
        named = os.path.splitext(source.path)[1].lower() == ".png" or bool(others)
        if (
            named
            and is_local(source.path)
            and not isinstance(picture, bytes)
            and picture.mode in ("1", "L", "P", "RGB", "RGBA", "LA")
            and picture.info.get("deep") is None
        ):
            copy = others[0] if others else copy
            with open(source.path, "rb") as file:
                write_atomically(copy, lambda target: shutil.copyfileobj(file, target))
            return copy
        image = read_image(source.path, None, Intensity("window"))  # for eyes, not for a network
        if image.dtype != np.uint8:
            image = np.rint(image * 255).astype(np.uint8)
        write_image(copy, image)
        return copy


def _plain(shape: Shape) -> dict[str, Any]:
    return {
        "label": shape.label.name,
        "points": without_holes(shape.part.rings).tolist(),
        "group_id": None,
        "description": "",
        "shape_type": "polygon",
        "flags": {},
        "mask": None,
    }
