"""Where images lie: what SimpleITK 2.5.7 said of the same files."""

import numpy as np
import pytest
from images_util import GREY

from guided_diffusion.images.placement import Placement, find_placement

STORAGE = "1.2.840.10008.5.1.4.1.1."
KINDS = {"CR": "1", "DX": "1.1", "IO": "1.3", "XA": "12.1", "SC": "7", "CT": "2", "US": "6.1"}
PROJECTIONS = ("CR", "DX", "IO", "XA")


@pytest.mark.parametrize("kind", KINDS)
def test_spacing_of_dicom(dicom, kind):
    def spacing(**elements):
        return find_placement(dicom(GREY, SOPClassUID=STORAGE + KINDS[kind], **elements)).spacing

    projection = kind in PROJECTIONS
    assert spacing() == (1, 1)
    assert spacing(PixelSpacing=[0.3, 0.2]) == ((1, 1) if projection else (0.2, 0.3))
    assert spacing(ImagerPixelSpacing=[0.5, 0.4]) == ((0.4, 0.5) if projection else (1, 1))
    both = spacing(ImagerPixelSpacing=[0.5, 0.4], PixelSpacing=[0.3, 0.2])
    assert both == ((0.4, 0.5) if projection else (0.2, 0.3))
    nominal = spacing(NominalScannedPixelSpacing=[0.6, 0.7])
    assert nominal == ((0.7, 0.6) if kind == "SC" else (1, 1))


def test_position_and_orientation(dicom):
    place = {"ImagePositionPatient": [1, 2, 3], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    found = find_placement(dicom(GREY, PixelSpacing=[0.3, 0.2], **place))
    assert found.origin == (1, 2, 3)
    assert np.allclose(found.steps(), [[0, 0.2, 0], [0, 0, -0.3], [-1, 0, 0]])


def test_what_is_no_orientation_is_ignored(dicom):
    found = find_placement(dicom(GREY, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]))
    assert found == Placement()


@pytest.mark.parametrize(
    ("name", "options", "spacing"),
    [
        ("a.png", {"dpi": (300, 150)}, (1, 1)),
        ("a.bmp", {"dpi": (300, 150)}, (1, 1)),
        ("a.jpg", {}, (1, 1)),
        ("a.jpg", {"dpi": (300, 150)}, (25.4 / 300, 25.4 / 150)),
        ("a.tif", {}, (1, 1)),
        ("a.tif", {"dpi": (300, 150)}, (25.4 / 300, 25.4 / 150)),
        ("a.tif", {"resolution_unit": 3, "x_resolution": 100, "y_resolution": 50}, (0.1, 0.2)),
    ],
)
def test_pictures(save, name, options, spacing):
    assert find_placement(save(name, GREY, **options)).spacing == pytest.approx(spacing)
