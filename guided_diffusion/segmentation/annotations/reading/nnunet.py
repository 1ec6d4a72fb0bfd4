"""nnU-Net: dataset.json, imagesTr/CASE_0000.*, labelsTr/CASE.*"""

import os
from functools import partial

import numpy as np

from guided_diffusion.images.masks import mask_values
from guided_diffusion.images.names import composed, is_ignored
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading import volumes
from guided_diffusion.segmentation.annotations.reading.label_map import regions
from guided_diffusion.segmentation.annotations.reading.node import Node, load
from guided_diffusion.segmentation.annotations.reading.source import (
    Drawing,
    ImageName,
    Options,
    Source,
)

TITLE = "nnU-Net"
_PARTS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))


def recognises(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "dataset.json")) and os.path.isdir(
        os.path.join(path, "labelsTr")
    )


def read(path: str, options: Options) -> Source:
    """:raises UserError: naming the file, if it is not nnU-Net's."""
    table = os.path.join(path, "dataset.json")
    if not os.path.isfile(table):
        raise UserError(f"{path} lacks dataset.json; name the folder that holds it")
    content, source = load(table), Source()
    names = _names(content.need("labels"))
    for value, name in sorted(names.items()):
        if value:
            source.add_class(name)
    stated = content.get("file_ending")
    end = ".nii.gz" if stated is None else stated.text()
    for images, labels in _PARTS:
        folder = os.path.join(path, labels)
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if name.endswith(end) and not is_ignored(name):
                case = name.removesuffix(end)
                file = os.path.join(folder, name)
                image = _image(os.path.join(path, images), case, end, file)
                found = regions(partial(_values, file), names, file)
                source.drawings.append(Drawing(image, file, found, _values(file).shape))
    if not source.drawings:
        raise UserError(f"{path}/labelsTr holds no files that end in {end!r}, as {table} states")
    return source


def _names(labels: Node) -> dict[int, str]:
    """Names by value: version 1 lists {"1": name}, version 2 {name: 1}."""
    names: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value.value, str) and key.isascii() and key.isdecimal() and len(key) < 6:
            number, name = int(key), value.text()
        elif isinstance(value.value, list):
            raise value.fail("one value", "regions of several labels are not read: name each label")
        else:
            number, name = value.whole(0, 2**16), Node(composed(key), labels.where).text()
        if names.setdefault(number, name) != name:
            raise UserError(f"{labels.where}: {names[number]} and {name} share the value {number}")
    return names


def _image(folder: str, case: str, end: str, labels: str) -> ImageName:
    first = os.path.join(folder, f"{case}_0000{end}")
    second = os.path.join(folder, f"{case}_0001{end}")
    if os.path.isfile(second):
        raise UserError(
            f"{labels}: its image has several channels ({second}); radiographs have one"
        )
    if not os.path.isfile(first):
        return ImageName(first, title=case)
    if volumes.name_of(first):
        return ImageName(first, title=case, convert=partial(volumes.picture, first))
    return ImageName(first, title=case, path=first)


def _values(path: str) -> np.ndarray:
    """The label values, [H x W]."""
    if volumes.name_of(path):
        return volumes.read_kept(path).layers(path)[0]
    return mask_values(path)[0]
