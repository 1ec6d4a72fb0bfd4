"""Pixels that only fill the rectangle (PixelPaddingValue) count nowhere and end up black."""

import numpy as np
import pytest
from pydicom import uid
from pydicom.dataelem import DataElement

from guided_diffusion.images.image_io import Intensity, read_counted, read_image
from guided_diffusion.images.reading import ReadingConfig, low_contrast_advice

pytestmark = pytest.mark.filterwarnings("error")

RULES = ("full", "percentile", "window")
FILLED = np.zeros((24, 32), bool)
FILLED[:, :6] = FILLED[20:] = True


def padded(kind, value, low=500, high=3000):
    """A ramp of anatomy, with `value` where FILLED."""
    ramp = np.tile(np.linspace(low, high, 32), (24, 1)).astype(kind)
    ramp[FILLED] = value
    return ramp


def spread(image):
    return float(np.ptp(image[~FILLED]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("meaning", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("kind", "value"), [("i2", -32768), ("i2", -2000), ("u2", 0), ("u2", 65535), ("u1", 255)]
)
def test_padding_does_not_count_and_is_black(dicom, rule, meaning, kind, value):
    top = 200 if kind == "u1" else 3000
    pixels = padded(kind, value, 100, top)
    path = dicom(pixels, PhotometricInterpretation=meaning, PixelPaddingValue=value)
    image, counted = read_counted(path, None, Intensity(rule))
    assert not image[FILLED].any()
    np.testing.assert_array_equal(counted, image[~FILLED])
    plain = dicom(np.where(FILLED, pixels[0, 6], pixels), PhotometricInterpretation=meaning)
    expected = read_image(plain, None, Intensity(rule))
    if rule != "percentile":  # whose percentiles are of all pixels of the plain file
        np.testing.assert_allclose(image[~FILLED], expected[~FILLED], atol=1e-6)
    else:
        assert spread(image) == 1


def test_a_range_of_padding_in_either_order(dicom):
    pixels = padded("i2", -1000)
    pixels[20:] = -1024
    for value, limit in ((-1024, -1000), (-1000, -1024)):
        path = dicom(pixels, PixelPaddingValue=value, PixelPaddingRangeLimit=limit)
        image = read_image(path, None, Intensity("percentile"))
        assert not image[FILLED].any()
        assert spread(image) == 1
    only = dicom(pixels, PixelPaddingRangeLimit=-1024)  # a limit needs a value
    assert read_image(only, None, Intensity("percentile"))[FILLED].max() > 0


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    ("kind", "pixel", "vr", "value"),
    [("i2", -2000, "US", 63536), ("u2", 63536, "SS", -2000), ("i2", -32768, "US", 32768)],
)
def test_the_sign_of_the_element_does_not_matter(dicom, syntax, kind, pixel, vr, value):
    element = DataElement("PixelPaddingValue", vr, value)
    path = dicom(padded(kind, pixel), syntax, PixelPaddingValue=element)
    image = read_image(path, None, Intensity("percentile"))
    assert spread(image) == 1
    assert not image[FILLED].any()


def test_padding_outside_of_the_bits_stored_hides_no_value_that_looks_like_it(dicom):
    # in 12 bits -2000 is 2096, a value of the anatomy
    pixels = padded("u2", 63536)
    pixels[3, 10] = 2096
    path = dicom(pixels, BitsStored=12, HighBit=11, PixelPaddingValue=63536)
    image = read_image(path)
    assert not image[FILLED].any()
    assert image[3, 10] == pytest.approx(2096 / 4095)


def test_padding_is_in_stored_values_before_rescaling(dicom):
    path = dicom(
        padded("i2", -2000), PixelPaddingValue=-2000, RescaleSlope=2, RescaleIntercept=-1024
    )
    image = read_image(path, None, Intensity("window"))
    assert spread(image) == 1
    assert not image[FILLED].any()


@pytest.mark.parametrize("prefix", ["Float", "DoubleFloat"])
def test_padding_of_floats(dicom, prefix):
    kind = "f4" if prefix == "Float" else "f8"
    pixels = padded(kind, -1e30, 0.2, 0.8)
    elements = {
        f"{prefix}PixelData": pixels.tobytes(),
        f"{prefix}PixelPaddingValue": -1e30,
        f"{prefix}PixelPaddingRangeLimit": -1e20,
    }
    path = dicom(pixels, PixelData=None, PhotometricInterpretation="MONOCHROME1", **elements)
    image = read_image(path)
    np.testing.assert_allclose(image, np.where(FILLED, 0, 1 - pixels), atol=1e-6)


def test_values_that_are_no_numbers_are_black_even_where_zero_is_white(dicom):
    pixels = padded("f4", np.nan, 0.2, 0.8)
    elements = {"FloatPixelData": pixels.tobytes(), "PhotometricInterpretation": "MONOCHROME1"}
    for rule in RULES:
        image = read_image(dicom(pixels, PixelData=None, **elements), None, Intensity(rule))
        assert not image[FILLED].any()
        assert np.isfinite(image).all()


def test_nothing_but_padding_is_black(dicom):
    path = dicom(np.full((4, 4), 7, np.uint16), PixelPaddingValue=7)
    for rule in RULES:
        assert not read_image(path, None, Intensity(rule)).any()


def test_advice_about_contrast_ignores_padding(dicom, prepare, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    # without the padding, a tenth of the range; with it, a half
    path = dicom(padded("u2", 0, 30000, 36000), PixelPaddingValue=0, name="films/a.dcm")
    assert "--intensity percentile" in low_contrast_advice([path], ReadingConfig())
    code, out, err = prepare("--action", "analyze", "--image-dir", folder, "--output-dir", tmp_path)
    assert code == 0, err
    assert "--intensity percentile" in out
    image = read_image(path)
    mean = next(line for line in out.splitlines() if line.split()[:1] == ["mean"])
    assert float(mean.split()[1]) == pytest.approx(image[~FILLED].mean(), abs=1e-3)


def test_an_image_of_one_value_and_padding_is_blank(dicom, prepare, tmp_path):
    (tmp_path / "films").mkdir()
    dicom(np.where(FILLED, 0, 9).astype("u2"), PixelPaddingValue=0, name="films/a.dcm")
    flags = ("--action", "validate", "--image-dir", tmp_path / "films")
    _, out, _ = prepare(*flags, "--output-dir", tmp_path / "out")
    assert "blank image" in out
