"""What tests of imported annotations share: images, files of tools, and what becomes of them."""

import json
from pathlib import Path

import numpy as np
from conftest import run_script
from PIL import Image

from guided_diffusion.images.masks import read_mask
from guided_diffusion.segmentation.categories import load_categories

FILES = Path(__file__).parent / "preparation" / "importing" / "files"
SIZE = (24, 32)
SQUARE = [[2, 3], [12, 3], [12, 13], [2, 13]]


def save_image(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path, **options)
    return path


def square(size=SIZE, points=SQUARE):
    """The mask of a rectangle by its corners."""
    mask = np.zeros(size, bool)
    (x0, y0), (x1, y1) = np.min(points, axis=0), np.max(points, axis=0)
    mask[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] = True
    return mask


def labelme(*shapes, image="a.png", size=SIZE, **more):
    """The content of a LabelMe file; a shape is (label, points) or a dictionary."""
    plain = [
        shape
        if isinstance(shape, dict)
        else {"label": shape[0], "points": shape[1], "shape_type": "polygon"}
        for shape in shapes
    ]
    height, width = size
    content = {"version": "5", "shapes": plain, "imagePath": image, "imageData": None}
    return {**content, "imageHeight": height, "imageWidth": width, **more}


def coco(*annotations, images=(("a.png", SIZE),), names=("tooth", "caries")):
    """The content of a COCO file; an annotation is (image, category, segmentation), from 1."""
    listed = [
        {"id": n, "file_name": name, "height": height, "width": width}
        for n, (name, (height, width)) in enumerate(images, 1)
    ]
    drawn = [
        {"id": n, "image_id": image, "category_id": category, "segmentation": shape, "iscrowd": 0}
        for n, (image, category, shape) in enumerate(annotations, 1)
    ]
    categories = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
    return {"images": listed, "annotations": drawn, "categories": categories}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def draw_annotations(folder, count):
    """Images with a LabelMe file each."""
    for number in range(count):
        save_image(folder / f"r{number}.png")
        content = labelme(("tooth", SQUARE), image=f"r{number}.png")
        write_json(folder / f"r{number}.json", content)


class Imported:
    """What the command wrote."""

    def __init__(self, folder, said):
        self.folder, self.said = folder, said
        self.table = load_categories(str(folder / "categories.json"))
        self.report = json.loads((folder / "import.json").read_text())
        self.left_out = "; ".join(f"{o['what']}: {o['why']}" for o in self.report["left_out"])
        self.images = sorted(
            str(p.relative_to(folder / "IMG")) for p in (folder / "IMG").rglob("*.*")
        )

    @property
    def names(self):
        return [category.name for category in self.table]

    def indices(self, name="a"):
        return read_mask(str(self.folder / "MASK" / f"{name}.png"), 256)

    def of(self, label, name="a"):
        """The pixels of a class."""
        return self.indices(name) == self.names.index(label)

    def truth(self, name="a"):
        """The mask with the indices of `files/truth.png`."""
        order = [self.names.index(n) for n in ("background", "tooth", "filling")]
        return np.argsort(order)[self.indices(name)]


TRUTH = np.asarray(Image.open(FILES / "truth.png"))


def bring(source, output, *flags):
    """Run the command, which must succeed."""
    ended = run_script("import_labels.py", source, output, *flags)
    assert ended.code == 0, ended.err
    return Imported(Path(output), ended.out)


def refused(source, output, *flags):
    """Run the command, which must refuse and write nothing; returns its line."""
    ended = run_script("import_labels.py", source, output, *flags)
    assert ended.code == 2, ended.out + ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert not Path(output).exists()
    return line
