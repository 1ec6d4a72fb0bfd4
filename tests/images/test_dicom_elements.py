"""Every element that decoding depends on: absent, empty, zero, several values, wrong.

The image is right, or one line names the file and the element.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from images_util import COLOUR, DEEP, GREY
from PIL import Image
from pydicom import uid
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from guided_diffusion.images.image_io import ImageError, Intensity, pixel_spacing, read_image
from guided_diffusion.images.masks import read_mask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

INTERNALS = (
    "object",
    "NoneType",
    "attribute",
    "literal",
    "could not",
    "subscript",
    "reshape",
    "None",
)
VALUES = (np.arange(12 * 10) * 30).astype(np.uint16).reshape(12, 10)  # of 12 bits, in 16
USUAL = {
    "WindowCenter": 1500,
    "WindowWidth": 2000,
    "RescaleSlope": 1,
    "RescaleIntercept": 0,
    "NumberOfFrames": 1,
    "PixelPaddingValue": 9999,
}
NUMBERS = (None, "", 0, 1, 2, 3, 7, 12, 17, 65535, [5, 6])
TEXTS = (None, "", "WORD", "monochrome2", "RGB", "YBR_ICT", "PALETTE COLOR", ["A", "B"])


def outcome(path, rule="full"):
    """The image, or the error once it is checked to be one clear line."""
    try:
        pixel_spacing(path)
        return read_image(path, None, Intensity(rule))
    except ImageError as error:
        text = str(error)
        assert path in text
        assert "\n" not in text
        assert len(text) < 400 + len(path)
        assert not [word for word in INTERNALS if word in text.replace(path, "")], text
        assert any(remedy in text for remedy in ("correct", "Correct", "export", "add", "save")), (
            text
        )
        return text


def window(values, center, width):
    return ((values - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)


WHOLE_RANGE = VALUES / VALUES.max()
RIGHT = {  # the only images that may come out of a changed element, by rule
    ("full", "RescaleSlope", -1): 1 - VALUES / 65535,
    ("full", "RescaleIntercept", 5): VALUES / 65535,
    ("window", "RescaleSlope", -1): np.zeros(VALUES.shape),  # the window lies elsewhere
    ("window", "RescaleIntercept", 5): window(VALUES + 5, 1500, 2000),
    ("window", "WindowCenter", 0): window(VALUES, 0, 2000),
    ("window", "WindowWidth", 1): VALUES > 1499.5,
    ("window", "WindowWidth", 0.5): ((VALUES - 1500.0) / 0.5 + 0.5).clip(0, 1),
    ("window", "VOILUTFunction", "SIGMOID"): 1 / (1 + np.exp(-4 * (VALUES - 1500.0) / 2000)),
    ("window", "VOILUTFunction", "LINEAR_EXACT"): ((VALUES - 1500.0) / 2000 + 0.5).clip(0, 1),
    ("full", "PixelRepresentation", 1): (VALUES + 32768.0) / 65535,
    ("full", "BitsStored", 12): VALUES / 4095,
    ("full", "PresentationLUTShape", "INVERSE"): 1 - VALUES / 65535,
    ("window", "PresentationLUTShape", "INVERSE"): 1 - window(VALUES, 1500, 2000),
    ("full", "PhotometricInterpretation", "MONOCHROME1"): 1 - VALUES / 65535,
    ("window", "PhotometricInterpretation", "MONOCHROME1"): 1 - window(VALUES, 1500, 2000),
    ("full", "PixelPaddingValue", 0): VALUES / 65535,
    ("window", "PixelPaddingValue", 0): np.where(VALUES == 0, 0, window(VALUES, 1500, 2000)),
}
for value in (None, "", 0, -5, "1e400"):
    RIGHT["window", "WindowWidth", value] = WHOLE_RANGE
for value in (None, "", "1e400"):
    RIGHT["window", "WindowCenter", value] = WHOLE_RANGE
SWEPT = {
    **dict.fromkeys(
        (
            *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
            *("PixelRepresentation", "SamplesPerPixel", "PlanarConfiguration"),
        ),
        NUMBERS,
    ),
    "PhotometricInterpretation": (*TEXTS, "MONOCHROME1"),
    "WindowCenter": (None, "", 0, [1500, 3], "1e400"),
    "WindowWidth": (None, "", 0, -5, 0.5, 1, [2000, 3], "1e400"),
    "RescaleSlope": (None, "", 0, -1, "1e400", [1, 2]),
    "RescaleIntercept": (None, "", 5, "1e400"),
    "NumberOfFrames": (None, "", 0, 1, 2, -1),
    "VOILUTFunction": (None, "", "SIGMOID", "LINEAR_EXACT", "WORD"),
    "PresentationLUTShape": (None, "", "INVERSE", "IDENTITY", "WORD"),
    "PixelSpacing": (None, "", 0, [0, 0], 0.1, [-1, 0.1]),
    "ImagerPixelSpacing": (None, "", 0, [0, 0], 0.1, [-1, 0.1]),
    "PixelPaddingValue": (None, "", 0, 65535),
    "PixelPaddingRangeLimit": (None, "", 65535),
    "ModalityLUTSequence": (None, [], [Dataset()]),
    "VOILUTSequence": (None, []),
}
REFUSED_BY_NAME = {
    "Rows": {None, "", 0, 1, 2, 3, 7, 17, 65535},
    "BitsStored": {0, 1, 2, 3, 7, 17, 65535},
    "BitsAllocated": {None, "", 0, 1, 2, 3, 7, 12, 17, 65535},
    "PixelRepresentation": {None, "", 2, 3, 7, 12, 17, 65535},
    "SamplesPerPixel": {0, 2, 3, 7, 12, 17, 65535},
    "PhotometricInterpretation": {None, "", "WORD"},
    "RescaleSlope": {0, "1e400"},
    "RescaleIntercept": {"1e400"},
    "NumberOfFrames": {-1},
}
REFUSED_BY_NAME["Columns"] = REFUSED_BY_NAME["Rows"]
REFUSED_BY_NAME["BitsAllocated"] -= {1}  # BitsStored does not fit in it


@pytest.mark.parametrize("rule", ["full", "window"])
@pytest.mark.parametrize("key", SWEPT)
def test_every_value_of_an_element_gives_the_right_image_or_one_line(dicom, key, rule):
    usual = {"full": VALUES / 65535, "window": window(VALUES, 1500, 2000)}[rule]
    for value in SWEPT[key]:
        elements = {**USUAL, key: value}
        if key == "PixelRepresentation":  # without which pydicom cannot write the padding
            elements["PixelPaddingValue"] = None
        found = outcome(dicom(VALUES, **elements), rule)
        known = (rule, key, str(value) if isinstance(value, list) else value)
        if isinstance(found, str):
            if not isinstance(value, list) and value in REFUSED_BY_NAME.get(key, ()):
                assert key in found
            assert known not in RIGHT, found
            assert key not in ("HighBit", "PixelPaddingValue"), found
        else:
            assert isinstance(value, list) or value not in REFUSED_BY_NAME.get(key, ()), value
            np.testing.assert_allclose(
                found, RIGHT.get(known, usual), atol=1e-5, err_msg=f"{value}"
            )


@pytest.mark.parametrize("key", ["WindowCenter", "RescaleSlope", "PixelSpacing", "NumberOfFrames"])
def test_words_where_numbers_belong(dicom, key):
    value = [1212, 1212] if key == "PixelSpacing" else 1212
    path = dicom(VALUES, **{**USUAL, key: value})
    content = Path(path).read_bytes()
    assert b"1212" in content
    Path(path).write_bytes(content.replace(b"1212", b"word"))
    found = outcome(path)
    assert isinstance(found, str) or key == "WindowCenter"


def test_left_justified_values_where_high_bit_says_so(dicom):
    path = dicom(VALUES * 16, BitsStored=12, HighBit=15)
    np.testing.assert_allclose(read_image(path), VALUES / 4095, atol=1e-6)
    signed = (VALUES.astype(np.int16) - 2000) * 16
    image = read_image(dicom(signed, BitsStored=12, HighBit=15))
    np.testing.assert_allclose(image, (VALUES - 2000.0 + 2048) / 4095, atol=1e-6)


def test_bits_stored_that_are_too_few_are_refused_but_overlays_are_ignored(dicom):
    assert "BitsStored, 8" in outcome(dicom(VALUES, BitsStored=8, HighBit=7))
    overlay = VALUES | (np.indices(VALUES.shape).sum(axis=0) % 2 << 12).astype(np.uint16)
    mark = DataElement(0x60000102, "US", 12)
    path = dicom(overlay, BitsStored=12, HighBit=11, OverlayBitPosition=mark)
    np.testing.assert_allclose(read_image(path), VALUES / 4095, atol=1e-6)


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_every_depth_and_sign(dicom, kind, syntax):
    info = np.iinfo(kind)
    values = np.linspace(info.min, info.max, 54).reshape(6, 9)
    values = values.clip(info.min, info.max / 2 + info.max / 4).astype(kind)
    image = outcome(dicom(values, syntax)) * (1 / 255 if kind == "u1" else 1)
    span = float(info.max) - float(info.min)
    np.testing.assert_allclose(image, (values.astype(float) - info.min) / span, atol=1e-5)


def test_one_bit(dicom):
    bits = (GREY.ravel()[:48].reshape(6, 8) // 4 % 2).astype(np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    elements = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "PixelData": packed}
    path = dicom(bits, **elements)
    assert np.array_equal(read_image(path), bits)
    assert np.array_equal(read_mask(path, 2), bits)


@pytest.mark.parametrize(
    ("elements", "named"),
    [
        ({"PlanarConfiguration": None}, "PlanarConfiguration"),
        ({"PlanarConfiguration": 2}, "PlanarConfiguration"),
        ({"PhotometricInterpretation": "MONOCHROME2"}, "SamplesPerPixel"),
        ({"PhotometricInterpretation": "YBR_RCT"}, "JPEG 2000"),
        ({"BitsAllocated": 16, "BitsStored": 16}, "pixel data"),
        ({"SamplesPerPixel": 1}, "SamplesPerPixel"),
        ({"SamplesPerPixel": 4}, "SamplesPerPixel"),
    ],
)
def test_colour_with_elements_that_contradict_it(dicom, elements, named):
    assert named in outcome(dicom(COLOUR, **elements))


@pytest.mark.parametrize("sides", [(5, 9), (7, 9), (6, 8), (6, 10), (12, 9)])
@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEG2000Lossless])
def test_compressed_pixels_of_another_size(dicom, syntax, sides):
    stream = io.BytesIO()
    kind = ("JPEG", {}) if syntax == uid.JPEGBaseline8Bit else ("JPEG2000", {"no_jp2": True})
    Image.fromarray(GREY).save(stream, kind[0], **kind[1])
    path = dicom(GREY, syntax, stream=stream.getvalue(), Rows=sides[0], Columns=sides[1])
    assert isinstance(outcome(path), str)


def lut(**changes):
    item = Dataset()
    elements = {"LUTDescriptor": ("US", [4, 0, 8]), "LUTData": ("US", [0, 50, 100, 255])}
    for key, (vr, value) in {**elements, **changes}.items():
        if value is not None:
            item.add(DataElement(key, vr, value))
    return Sequence([item])


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize(
    "changes",
    [
        {"LUTDescriptor": ("US", None)},
        {"LUTData": ("US", None)},
        {"LUTDescriptor": ("US", [4, 0])},
        {"LUTDescriptor": ("US", [9, 0, 8])},
        {"LUTDescriptor": ("US", [0, 0, 8])},
        {"LUTDescriptor": ("US", [4, 0, 0])},
        {"LUTDescriptor": ("US", [4, 0, 99])},
        {"LUTDescriptor": ("LO", "words")},
        {"LUTData": ("LO", "words")},
        {"LUTData": ("OW", b"")},
    ],
)
def test_malformed_tables(dicom, sequence, changes):
    path = dicom(VALUES, **{sequence: lut(**changes)})
    found = outcome(path, "window")
    assert isinstance(found, str)
    assert sequence in found
    assert sequence == "ModalityLUTSequence" or isinstance(outcome(path, "full"), np.ndarray)


@pytest.mark.parametrize(
    "data", [("US", [0, 50, 100, 255]), ("OW", bytes([0, 50, 100, 255])), ("US", [12800, 65380])]
)
def test_tables_of_bytes_alone_or_two_to_a_word(dicom, data):
    values = np.arange(4, dtype=np.uint16).reshape(2, 2)
    image = read_image(dicom(values, ModalityLUTSequence=lut(LUTData=data)))
    np.testing.assert_allclose(image.ravel() * 255, [0, 50, 100, 255], atol=1e-4)


def test_palette_that_is_missing_or_short(dicom):
    found = outcome(dicom(GREY, PhotometricInterpretation="PALETTE COLOR"))
    assert "palette is missing" in found


def test_control_characters_do_not_reach_the_screen(dicom):
    path = dicom(VALUES)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content.replace(b"MONOCHROME2", b"MONO\x1b[2JME2"))
    found = outcome(path)
    assert found.isprintable()
    assert "MONO?[2JME2" in found


def test_two_frames_that_are_not_declared(dicom):
    twice = np.concatenate([DEEP, DEEP]).tobytes()
    assert "pixel data" in outcome(dicom(DEEP, PixelData=twice))
