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
    """Export IMG and MASK to OUT, and import it to BACK."""
    table = ("--categories", "c.json")
    ended = script("export_labels.py", "MASK", "IMG", "OUT", "--format", kind, *table)
    assert ended.code == 0, ended.err
    ended = script("import_labels.py", f"OUT/{kind}", "BACK", "--images", "IMG", *table)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("kind", ["coco", "labelme", "cvat", "nifti", "nrrd"])
def test_pictures_keep_every_pixel(script, data, kind):
    round_trip(script, kind)
    for name, mask in MASKS.items():
        assert np.array_equal(np.asarray(Image.open(data / f"BACK/MASK/{name}.png")), mask)


@pytest.mark.parametrize("kind", ["dicomseg", "labelme"])
def test_dicom_keeps_every_pixel(script, data, kind):
    for number, (name, mask) in enumerate(MASKS.items()):
        (data / f"IMG/{name}.png").unlink()
        path = data / "IMG" / name
        write_dicom_radiograph(path.parent, path.name, mask, InstanceNumber=number)
    round_trip(script, kind)
    for name, mask in MASKS.items():
        original = (data / f"IMG/{name}.dcm").read_bytes()
        assert (data / f"BACK/IMG/{name}.dcm").read_bytes() == original
        assert np.array_equal(np.asarray(Image.open(data / f"BACK/MASK/{name}.png")), mask)
