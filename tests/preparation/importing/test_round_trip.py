"""Masks that are exported and imported again."""

import json

import numpy as np
import pytest
from annotations_util import CLASSES, hard_mask, write_dicom_radiograph, write_radiographs
from PIL import Image

from guided_diffusion.segmentation.categories import generic_categories, to_plain

MASKS = {"a": hard_mask(), "sub/müller, 1": hard_mask(67, 91, 1)}


@pytest.fixture
def data(tmp_path):
    write_radiographs(tmp_path, MASKS)
    (tmp_path / "c.json").write_text(json.dumps(to_plain(generic_categories(CLASSES))))
    return tmp_path


def round_trip(script, kind):
    """The masks of IMG and MASK after an export and an import, by name."""
    table = ("--categories", "c.json")
    ended = script("export_labels.py", "MASK", "IMG", "OUT", "--format", kind, *table)
    assert ended.code == 0, ended.err
    images = () if kind == "labelme" else ("--images", "IMG")
    ended = script("import_labels.py", f"OUT/{kind}", "BACK", *images, *table)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("kind", ["coco", "labelme", "cvat", "nifti", "nrrd"])
def test_pictures_keep_every_pixel(script, data, kind):
    round_trip(script, kind)
    for name, mask in MASKS.items():
        assert np.array_equal(np.asarray(Image.open(data / f"BACK/MASK/{name}.png")), mask)


def test_dicom_keeps_every_pixel(script, data):
    for number, (name, mask) in enumerate(MASKS.items()):
        (data / f"IMG/{name}.png").unlink()
        path = data / "IMG" / name
        write_dicom_radiograph(path.parent, path.name, mask, InstanceNumber=number)
    round_trip(script, "dicomseg")
    for name, mask in MASKS.items():
        assert np.array_equal(np.asarray(Image.open(data / f"BACK/MASK/{name}.png")), mask)
