"""YOLO segmentation: a text file per image with a polygon a line; class names in data.yaml."""

import os
from collections.abc import Iterator

import numpy as np

from guided_diffusion.images.files import list_images
from guided_diffusion.images.names import composed, is_ignored, stem
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import read_text
from guided_diffusion.segmentation.annotations.reading.node import Node, short
from guided_diffusion.segmentation.annotations.reading.packages import need
from guided_diffusion.segmentation.annotations.reading.raster import Polygon
from guided_diffusion.segmentation.annotations.reading.source import (
    Drawing,
    ImageName,
    Options,
    Region,
    Source,
)

TITLE = "YOLO segmentation"
_MOST_BYTES = 1 << 20  # of data.yaml
_FAR = 10  # how far outside of the image a point may lie, in its sizes


def recognises(path: str) -> bool:
    return os.path.isdir(path) and bool(_named(path)) and any(_label_files(path))


def read(path: str, options: Options) -> Source:
    """:raises UserError: naming the file and the line, if it is not of YOLO's segmentation."""
    if not os.path.isdir(path):
        raise UserError(f"{path} is not a folder; name that of data.yaml, images and labels")
    table = _named(path)
    if table is None:
        raise UserError(f"{path} lacks data.yaml, which names the classes")
    source, names = Source(), _names(table)
    for name in names.values():
        source.add_class(name)
    images: dict[str, list[str]] = {}
    for picture in list_images(options.images or path):
        images.setdefault(_key(options.images or path, picture), []).append(picture)
    boxes = 0
    for file in _label_files(path):
        found = images.get(_key(path, file.removesuffix(".txt")), [])
        if len(found) > 1:
            raise UserError(f"{file} belongs to {' and '.join(found)}; keep one of them")
        regions = []
        for number, line in enumerate(read_text(file, "the annotations").splitlines(), 1):
            words = line.split()
            if not words:
                continue
            where = f"{file} line {number}"
            name = _class(words[0], names, where, table)
            if len(words) == 5:
                source.omit(where, "a box without an outline")
                boxes += 1
                continue
            regions.append(Region(name, where, Polygon((_ring(words[1:], where),), relative=True)))
        name = os.path.relpath(file, path).replace(os.sep, "/").removesuffix(".txt")
        image = ImageName(found[0], path=found[0]) if found else ImageName(name)
        source.drawings.append(Drawing(image, file, regions))
    if not source.drawings:
        raise UserError(f"{path} holds no labels: text files in folders named labels are missing")
    if boxes and not any(drawing.regions for drawing in source.drawings):
        raise UserError(
            f"{path}: its {boxes} annotations are boxes; export YOLO segmentation, with polygons"
        )
    return source


def _named(folder: str) -> str | None:
    """The file that names the classes."""
    names = sorted(os.listdir(folder))
    listed = [name for name in names if name.lower().endswith((".yaml", ".yml"))]
    preferred = [name for name in listed if name.lower() in ("data.yaml", "dataset.yaml")]
    for name in [*preferred, *listed, *(n for n in names if n == "classes.txt")]:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.path.getsize(path) <= _MOST_BYTES:
            return path
    return None


def _names(path: str) -> dict[int, str]:
    """The names of classes by number."""
    text = read_text(path, "the class names")
    if path.endswith("classes.txt"):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return {i: Node(line, f"{path} line {i + 1}").text() for i, line in enumerate(lines)}
    yaml = need("yaml", "pyyaml", "YOLO")
    try:
        content = Node(yaml.safe_load(text), path, root=True)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not valid YAML; export it again") from error
    names = content.need("names")
    if isinstance(names.value, dict):
        named = {
            Node(key, f"{path} names").whole(0, 254): Node(value, f"{path} names").name()
            for key, value in names.value.items()
        }
        return dict(sorted(named.items()))
    return {number: name.name() for number, name in enumerate(names.entries())}


def _label_files(folder: str) -> Iterator[str]:
    """Text files in folders named labels, by name."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        parts = os.path.relpath(root, folder).split(os.sep)
        if "labels" in parts or os.path.basename(os.path.abspath(folder)) == "labels":
            for name in sorted(names):
                if name.endswith(".txt") and not is_ignored(name) and name != "classes.txt":
                    yield os.path.join(root, name)


def _key(folder: str, path: str) -> str:
    """What an image and its labels have in common: the path without `images` and `labels`."""
    name = stem(os.path.relpath(path, folder))
    parts = name.split("/")
    return composed("/".join(part for part in parts if part not in ("images", "labels")))


def _class(word: str, names: dict[int, str], where: str, table: str) -> str:
    number = int(word) if word.isascii() and word.isdecimal() and len(word) < 6 else -1
    if number not in names:
        raise UserError(
            f"{where}: class {short(word)} is not among the {len(names)} of"
            f" {os.path.basename(table)}; correct one of them"
        )
    return names[number]


def _ring(words: list[str], where: str) -> np.ndarray:
    """Coordinates as shares of width and height, float64 [N x 2]."""
    try:
        values = np.array(words, np.float64)
    except ValueError:
        values = np.array([np.nan])
    if len(values) < 6 or len(values) % 2 or not (np.abs(values) <= _FAR).all():
        raise UserError(
            f"{where}: expected a class and at least 3 points, each x y as shares of width and"
            f" height; found {len(words)} numbers"
        )
    return values.reshape(-1, 2)
