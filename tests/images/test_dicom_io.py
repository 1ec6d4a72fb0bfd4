import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from images_util import COLOUR, DEEP, GREY, MASK
from PIL import Image
from pydicom import pixels, uid
from pydicom.dataset import Dataset

from guided_diffusion.images import image_io
from guided_diffusion.images.image_io import ImageError, Intensity, pixel_spacing, read_image
from guided_diffusion.images.masks import read_mask

pytestmark = pytest.mark.filterwarnings("error")


def table(values, bits, first=0):
    """A look-up table as an item of a sequence."""
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = values
    item["LUTData"].VR = "US"
    item.ModalityLUTType = "US"
    return item


def tail_of(path, start):
    return Path(path).read_bytes()[start:]


class TestDicom:
    @pytest.mark.parametrize(
        "syntax",
        [
            uid.ImplicitVRLittleEndian,
            uid.ExplicitVRLittleEndian,
            uid.ExplicitVRBigEndian,
            uid.DeflatedExplicitVRLittleEndian,
        ],
    )
    def test_transfer_syntaxes(self, dicom, syntax):
        np.testing.assert_allclose(read_image(dicom(DEEP, syntax)), DEEP / 65535, rtol=1e-6)

    def test_compressed(self, dicom):
        stream = io.BytesIO()
        Image.fromarray(DEEP).save(stream, "JPEG2000", no_jp2=True)
        path = dicom(DEEP, uid.JPEG2000Lossless, stream=stream.getvalue())
        np.testing.assert_allclose(read_image(path), DEEP / 65535, rtol=1e-6)
        stream = io.BytesIO()
        Image.fromarray(GREY).save(stream, "JPEG", quality=100)
        path = dicom(GREY, uid.JPEGBaseline8Bit, stream=stream.getvalue())
        assert np.abs(read_image(path).astype(int) - GREY).max() <= 3
        encoder = pixels.get_encoder(uid.RLELossless)
        shape = {"rows": 6, "columns": 9, "samples_per_pixel": 1, "number_of_frames": 1}
        kind = {
            "bits_allocated": 8,
            "bits_stored": 8,
            "photometric_interpretation": "MONOCHROME2",
            "pixel_representation": 0,
            "planar_configuration": 0,
        }
        path = dicom(GREY, uid.RLELossless, stream=encoder.encode(GREY.tobytes(), **shape, **kind))
        assert np.array_equal(read_image(path), GREY)

    def test_undecodable_compression_names_the_extra(self, dicom):
        path = dicom(GREY, uid.JPEGLosslessSV1, stream=b"\xff\xd8\xff\xd9")
        with pytest.raises(ImageError, match=r"JPEG Lossless.*pip install '\.\[dicom\]'"):
            read_image(path)

    def test_monochrome1_is_inverted(self, dicom):
        path = dicom(GREY, PhotometricInterpretation="MONOCHROME1")
        assert np.array_equal(read_image(path), 255 - GREY)
        path = dicom(DEEP, PhotometricInterpretation="MONOCHROME1")
        for rule in ("full", "percentile", "window"):
            image = read_image(path, None, Intensity(rule))
            assert image[0, 0] == 1
            assert (np.diff(image.ravel()) <= 0).all()

    def test_bits_stored_are_the_full_range(self, dicom):
        values = (DEEP // 64).astype(np.uint16)
        path = dicom(values, BitsStored=10, HighBit=9)
        np.testing.assert_allclose(read_image(path), values / 1023, rtol=1e-6)

    def test_bits_above_bits_stored_are_ignored(self, dicom):
        values = (DEEP // 64).astype(np.uint16)
        path = dicom(values | 0xF000, BitsStored=10, HighBit=9)
        np.testing.assert_allclose(read_image(path), values / 1023, rtol=1e-6)

    def test_values_beyond_bits_stored_are_not_clipped(self, dicom):
        stream = io.BytesIO()
        Image.fromarray(DEEP).save(stream, "JPEG2000", no_jp2=True)
        elements = {"BitsStored": 12, "HighBit": 11}
        path = dicom(DEEP, uid.JPEG2000Lossless, stream=stream.getvalue(), **elements)
        np.testing.assert_allclose(read_image(path), DEEP / 65535, rtol=1e-6)

    def test_the_same_picture_agrees_between_dicom_and_png(self, dicom, save):
        values = (DEEP // 64).astype(np.uint16)
        one = dicom(values, BitsStored=10, HighBit=9, PhotometricInterpretation="MONOCHROME1")
        other = save("a.png", values)
        for rule in (Intensity("percentile"), Intensity("window", center=500, width=700)):
            np.testing.assert_allclose(
                read_image(one, None, rule), 1 - read_image(other, None, rule), atol=1e-6
            )

    def test_signed_values_and_rescaling(self, dicom):
        values = (DEEP.astype(np.int32) // 4 - 8000).astype(np.int16)
        image = read_image(dicom(values, RescaleSlope=2, RescaleIntercept=-1024))
        np.testing.assert_allclose(image, (values.astype(float) + 32768) / 65535, rtol=1e-6)
        window = Intensity("window", center=-1024, width=401)
        image = read_image(dicom(values, RescaleSlope=2, RescaleIntercept=-1024), None, window)
        rescaled = values.astype(float) * 2 - 1024
        np.testing.assert_allclose(image, ((rescaled + 1024.5) / 400 + 0.5).clip(0, 1), atol=1e-6)

    def test_a_negative_slope_turns_black_and_white(self, dicom):
        image = read_image(dicom(DEEP, RescaleSlope=-1, RescaleIntercept=0))
        np.testing.assert_allclose(image, 1 - DEEP / 65535, rtol=1e-5)

    def test_the_files_own_window(self, dicom):
        path = dicom(DEEP, WindowCenter=[20000, 5], WindowWidth=[10001, 5])
        image = read_image(path, None, Intensity("window"))
        expected = ((DEEP - 19999.5) / 10000 + 0.5).clip(0, 1)
        np.testing.assert_allclose(image, expected, atol=1e-5)
        given = read_image(path, None, Intensity("window", center=40000, width=2))
        assert set(np.unique(given)) == {0, 1}

    def test_other_window_functions(self, dicom):
        numbers = {"WindowCenter": 20000, "WindowWidth": 10000}
        path = dicom(DEEP, VOILUTFunction="SIGMOID", **numbers)
        expected = 1 / (1 + np.exp(-4 * (DEEP - 20000.0) / 10000))
        np.testing.assert_allclose(read_image(path, None, Intensity("window")), expected, atol=1e-5)
        path = dicom(DEEP, VOILUTFunction="LINEAR_EXACT", **numbers)
        expected = ((DEEP - 20000.0) / 10000 + 0.5).clip(0, 1)
        np.testing.assert_allclose(read_image(path, None, Intensity("window")), expected, atol=1e-5)

    def test_the_files_own_table(self, dicom):
        values = np.arange(6, dtype=np.uint16).reshape(2, 3)
        path = dicom(values, VOILUTSequence=[table([0, 0, 100, 200, 255], 8, first=1)])
        image = read_image(path, None, Intensity("window"))
        np.testing.assert_allclose(image.ravel() * 255, [0, 0, 0, 100, 200, 255], atol=1e-4)

    def test_values_beyond_a_table_of_signed_values_take_its_ends(self, dicom):
        values = np.arange(-4, 5, dtype=np.int16).reshape(3, 3)
        # the first value, -2, as written to an unsigned element
        path = dicom(values, VOILUTSequence=[table([10, 20, 30, 40], 8, first=2**16 - 2)])
        image = read_image(path, None, Intensity("window"))
        expected = [10, 10, 10, 20, 30, 40, 40, 40, 40]
        np.testing.assert_allclose(image.ravel() * 255, expected, atol=1e-4)

    def test_tables_stored_as_words_and_with_more_than_256_entries(self, dicom):
        levels = (np.arange(1024) // 4).tolist()
        values = np.arange(1020, dtype=np.uint16).reshape(30, 34)
        path = dicom(values, VOILUTSequence=[table(levels, 8)])
        image = read_image(path, None, Intensity("window"))
        np.testing.assert_allclose(image * 255, values // 4, atol=1e-4)
        for syntax, order in ((uid.ExplicitVRLittleEndian, "<"), (uid.ExplicitVRBigEndian, ">")):
            item = table(levels, 8)
            del item.LUTData
            item.add_new(0x00283006, "OW", np.array(levels, f"{order}u2").tobytes())
            path = dicom(values, syntax, VOILUTSequence=[item])
            image = read_image(path, None, Intensity("window"))
            np.testing.assert_allclose(image * 255, values // 4, atol=1e-4)

    def test_modality_table(self, dicom):
        values = np.arange(6, dtype=np.uint16).reshape(2, 3)
        path = dicom(values, ModalityLUTSequence=[table([9, 7, 5, 3, 1, 0], 4)])
        np.testing.assert_allclose(read_image(path).ravel() * 15, [9, 7, 5, 3, 1, 0], atol=1e-5)

    def test_colour(self, dicom):
        path = dicom(COLOUR)
        assert np.array_equal(read_image(path), COLOUR)
        assert read_image(path, 1).shape == (6, 9)
        planes = COLOUR.transpose(2, 0, 1).copy()
        path = dicom(COLOUR, PlanarConfiguration=1, PixelData=planes.tobytes())
        assert np.array_equal(read_image(path), COLOUR)

    def test_luminance_and_chrominance_become_colour(self, dicom):
        ybr = np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))
        image = read_image(dicom(ybr, PhotometricInterpretation="YBR_FULL"))
        assert np.abs(image.astype(int) - COLOUR).max() <= 2
        smooth = np.zeros((16, 16, 3), np.uint8) + np.array([200, 60, 90], np.uint8)
        stream = io.BytesIO()
        Image.fromarray(smooth).save(stream, "JPEG", quality=95)
        elements = {"PhotometricInterpretation": "YBR_FULL_422", "stream": stream.getvalue()}
        image = read_image(dicom(smooth, uid.JPEGBaseline8Bit, **elements))
        assert np.abs(image.astype(int) - smooth).max() <= 3

    def test_palette_colour(self, dicom):
        tables = {}
        for channel, name in enumerate(("Red", "Green", "Blue")):
            tables[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            levels = (np.arange(256, dtype="<u2") * (channel + 1) * 50).tobytes()
            tables[f"{name}PaletteColorLookupTableData"] = levels
        path = dicom(MASK, PhotometricInterpretation="PALETTE COLOR", **tables)
        expected = MASK[..., None] * np.array([50, 100, 150]) / 65535
        np.testing.assert_allclose(read_image(path), expected, atol=1e-6)
        assert np.array_equal(read_mask(path, 7), MASK)

    def test_spacing(self, dicom, save):
        assert pixel_spacing(dicom(GREY, PixelSpacing=[0.2, 0.3])) == (0.2, 0.3)
        assert pixel_spacing(dicom(GREY)) is None
        assert pixel_spacing(save("a.png", GREY)) is None

    @pytest.mark.parametrize(
        ("elements", "size", "at_detector"),
        [
            ({}, (0.1, 0.15), True),
            ({"PixelSpacing": [0.2, 0.3]}, (0.2, 0.3), False),
            ({"PixelSpacing": [0.1, 0.15]}, (0.1, 0.15), True),  # a mere copy
            (
                {"PixelSpacing": [0.1, 0.15], "PixelSpacingCalibrationType": "GEOMETRY"},
                (0.1, 0.15),
                False,
            ),
            ({"EstimatedRadiographicMagnificationFactor": 1.25}, (0.08, 0.12), False),
            (
                {
                    "PixelSpacing": [0.1, 0.15],
                    "EstimatedRadiographicMagnificationFactor": 1.25,
                },
                (0.08, 0.12),
                False,
            ),
            ({"EstimatedRadiographicMagnificationFactor": 0}, (0.1, 0.15), True),
            ({"PixelSpacing": [0, 0]}, (0.1, 0.15), True),
            ({"PixelSpacing": [-0.2, 0.2]}, (0.1, 0.15), True),
            ({"PixelSpacing": 0.2}, (0.1, 0.15), True),
            ({"PixelSpacing": "", "ImagerPixelSpacing": None}, None, None),
            ({"ImagerPixelSpacing": [0, 0]}, None, None),
        ],
    )
    def test_spacing_of_the_detector(self, dicom, elements, size, at_detector):
        path = dicom(GREY, **{"ImagerPixelSpacing": [0.1, 0.15], **elements})
        found = pixel_spacing(path)
        assert found == (size and pytest.approx(size))
        assert found is None or found.at_detector == at_detector

    @pytest.mark.parametrize(
        ("elements", "said"),
        [
            ({"NumberOfFrames": 12}, "holds 12 frames"),
            ({"PixelData": None, "Modality": "RTPLAN"}, r"without an image \(modality RTPLAN\)"),
            ({"PixelData": b"\1\2\3\4"}, "less than expected"),
            ({"BitsAllocated": None}, "BitsAllocated|Bits Allocated"),
        ],
    )
    def test_unusable_files_are_refused_in_one_line(self, dicom, elements, said):
        path = dicom(GREY, **elements)
        with pytest.raises(ImageError, match=said) as caught:
            read_image(path)
        assert path in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_frame_count_that_is_not_a_number(self, dicom):
        path = dicom(GREY, NumberOfFrames=11)
        content = Path(path).read_bytes()
        assert content.count(b"IS\x02\x0011") == 1
        Path(path).write_bytes(content.replace(b"IS\x02\x0011", b"IS\x02\x001A"))
        with pytest.raises(ImageError, match="NumberOfFrames is '1A'"):
            read_image(path)

    @pytest.mark.parametrize("stray", [b"", b" ", b"stray bytes"])
    @pytest.mark.parametrize(
        "syntax",
        [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian],
    )
    def test_without_a_header(self, dicom, tmp_path, stray, syntax):
        content = Path(dicom(DEEP, syntax)).read_bytes()
        body = 132 + 12 + int.from_bytes(content[140:144], "little")
        path = tmp_path / "headerless.dcm"
        path.write_bytes(stray + content[body:])
        np.testing.assert_allclose(read_image(str(path)), DEEP / 65535, rtol=1e-6)
        path.write_bytes(stray + Path(dicom(MASK, syntax)).read_bytes()[body:])
        assert np.array_equal(read_mask(str(path), 7), MASK)

    def test_meta_without_its_preamble(self, dicom, tmp_path):
        path = tmp_path / "no_preamble.dcm"
        path.write_bytes(tail_of(dicom(DEEP), 132))
        np.testing.assert_allclose(read_image(str(path)), DEEP / 65535, rtol=1e-6)

    def test_text_named_dicom(self, tmp_path):
        path = tmp_path / "a.dcm"
        path.write_text("no dicom at all, only words\n" * 40)
        with pytest.raises(ImageError, match=r"a\.dcm cannot be read: it is neither"):
            read_image(str(path))

    def test_a_claim_of_too_many_pixels(self, dicom):
        with pytest.raises(ImageError, match="60000 x 60000 pixels"):
            read_image(dicom(GREY, Rows=60000, Columns=60000))

    def test_a_deflated_bomb(self, dicom, tmp_path, monkeypatch):
        content = Path(dicom(GREY, uid.DeflatedExplicitVRLittleEndian)).read_bytes()
        body = 132 + 12 + int.from_bytes(content[140:144], "little")
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        squeezed = packer.compress(bytes(70 * 2**20)) + packer.flush()
        path = tmp_path / "bomb.dcm"
        path.write_bytes(content[:body] + squeezed)
        monkeypatch.setattr(image_io, "MAX_PIXELS", 1000)
        with pytest.raises(ImageError, match="larger than any radiograph"):
            read_image(str(path))
