import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from PIL import Image
from pydicom import dcmwrite, pixels, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from guided_diffusion.images import files, image_io
from guided_diffusion.images.files import list_images, pair_files
from guided_diffusion.images.image_io import (
    LOSSLESS_EXTENSIONS,
    ImageError,
    Intensity,
    is_grey,
    pixel_spacing,
    read_image,
    read_mask,
    write_image,
    write_mask,
)
from guided_diffusion.runtime import files as runtime_files
from guided_diffusion.runtime.errors import UserError

GREY = (np.arange(6 * 9) * 4).astype(np.uint8).reshape(6, 9)
DEEP = (np.arange(6 * 9) * 1200).astype(np.uint16).reshape(6, 9)
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
MASK = (np.arange(6 * 9) % 7).astype(np.uint8).reshape(6, 9)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def save(tmp_path):
    """Save an array or a picture with Pillow; returns the path."""

    def save_picture(name, picture, **options):
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        path = str(tmp_path / name)
        picture.save(path, **options)
        return path

    return save_picture


@pytest.fixture
def dicom(tmp_path):
    """Write a DICOM file of `stored` [H x W] or [H x W x 3]; elements of the value None go."""

    def write(stored, syntax=uid.ExplicitVRLittleEndian, name="file.dcm", stream=None, **elements):
        dataset = Dataset()
        dataset.SOPClassUID = uid.SecondaryCaptureImageStorage
        dataset.SOPInstanceUID = "1.2.3"
        dataset.Rows, dataset.Columns = stored.shape[:2]
        dataset.SamplesPerPixel = 1 if stored.ndim == 2 else 3
        dataset.PhotometricInterpretation = "MONOCHROME2" if stored.ndim == 2 else "RGB"
        if stored.ndim == 3:
            dataset.PlanarConfiguration = 0
        bits = 8 * stored.dtype.itemsize
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
        dataset.PixelRepresentation = int(stored.dtype.kind == "i")
        order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
        content = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
        dataset.PixelData = content + b"\0" * (len(content) % 2)
        if syntax.is_compressed and syntax.is_encapsulated:
            dataset.PixelData = encapsulate([stream])
        dataset["PixelData"].VR = "OW" if bits == 16 and not stream else "OB"
        for key, value in elements.items():
            if value is None:
                delattr(dataset, key)
            else:
                setattr(dataset, key, value)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        path = str(tmp_path / name)
        dcmwrite(path, dataset, enforce_file_format=True)
        return path

    return write


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


class TestGreyLevels:
    @pytest.mark.parametrize("ending", ["png", "bmp", "gif", "webp", "tif", "tiff"])
    def test_eight_bits_come_back_as_they_are(self, save, ending):
        options = {"lossless": True} if ending == "webp" else {}
        image = read_image(save(f"a.{ending}", GREY, **options), 1)
        assert image.dtype == np.uint8
        assert np.array_equal(image, GREY)

    def test_jpeg_comes_back_nearly(self, save):
        smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
        image = read_image(save("a.jpg", smooth, quality=95))
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - smooth).max() <= 4

    @pytest.mark.parametrize("ending", ["png", "tif"])
    def test_sixteen_bits_are_never_clipped(self, save, ending):
        image = read_image(save(f"a.{ending}", DEEP))
        assert image.dtype == np.float32
        np.testing.assert_allclose(image, DEEP / 65535, rtol=1e-6)
        assert len(np.unique(image)) == DEEP.size

    def test_signed_sixteen_bit_tiff(self, tmp_path):
        values = (DEEP.astype(np.int32) - 32768).astype("<i2")
        path = str(tmp_path / "a.tif")
        write_tiff(path, values, sample_format=2)
        np.testing.assert_allclose(read_image(path), DEEP / 65535, rtol=1e-6)

    @pytest.mark.parametrize("ending", ["tif"])
    def test_thirty_two_bit_integers(self, tmp_path, ending):
        values = (np.arange(6, dtype=np.uint64) * 858993459).astype("<u4").reshape(2, 3)
        path = str(tmp_path / f"a.{ending}")
        write_tiff(path, values, sample_format=1)
        np.testing.assert_allclose(read_image(path).ravel(), np.arange(6) / 5, rtol=1e-6)
        write_tiff(path, values.view("<i4"), sample_format=2)
        expected = (values.view("<i4").astype(float) + 2**31) / (2**32 - 1)
        np.testing.assert_allclose(read_image(path), expected, rtol=1e-6)

    def test_floats_within_0_and_1_are_kept(self, save):
        values = np.linspace(0.25, 0.75, 54, dtype=np.float32).reshape(6, 9)
        np.testing.assert_allclose(read_image(save("a.tif", values)), values)

    def test_other_floats_span_the_files_own_range(self, save):
        values = np.linspace(-1000, 3000, 54, dtype=np.float32).reshape(6, 9)
        expected = np.linspace(0, 1, 54).reshape(6, 9)
        np.testing.assert_allclose(read_image(save("a.tif", values)), expected, atol=1e-6)

    def test_not_a_number_is_black(self, save):
        values = np.array([[np.nan, 2, 3], [np.inf, -np.inf, 4]], dtype=np.float32)
        image = read_image(save("a.tif", values))
        np.testing.assert_allclose(image, [[0, 0, 0.5], [0, 0, 1]])
        with pytest.raises(ImageError, match="no finite number"):
            read_image(save("b.tif", values * np.nan))

    def test_tiff_whose_zero_is_white(self, tmp_path):
        path = str(tmp_path / "a.tif")
        write_tiff(path, DEEP.astype("<u2"), photometric=0)
        np.testing.assert_allclose(read_image(path), 1 - DEEP / 65535, rtol=1e-5)
        write_tiff(path, GREY, photometric=0)
        assert np.array_equal(read_image(path), 255 - GREY)

    def test_percentiles_stretch_and_cut_the_rest(self, save):
        values = np.arange(1000, dtype=np.uint16).reshape(25, 40)
        image = read_image(save("a.png", values), None, Intensity("percentile", 10, 90))
        low, high = np.percentile(values, [10, 90])
        expected = ((values - low) / (high - low)).clip(0, 1)
        np.testing.assert_allclose(image, expected, atol=1e-6)

    def test_percentiles_that_coincide_give_way_to_the_whole_range(self, save):
        values = np.zeros((40, 40), np.uint16)
        values[3, 3:5] = 300, 700
        image = read_image(save("a.png", values), None, Intensity("percentile"))
        assert image[3, 3:5] == pytest.approx([3 / 7, 1])
        assert np.count_nonzero(image) == 2

    def test_a_flat_picture_is_black_under_stretching_rules(self, save):
        path = save("a.png", np.full((4, 4), 77, np.uint8))
        for rule in ("percentile", "window"):
            assert not read_image(path, None, Intensity(rule)).any()
        assert (read_image(path) == 77).all()

    def test_a_window_is_in_the_files_values(self, save):
        image = read_image(save("a.png", DEEP), None, Intensity("window", center=6000, width=2401))
        assert image[DEEP <= 4800 - 1].max() == 0
        assert image[DEEP == 6000] == pytest.approx(0.5, abs=1e-3)
        assert image[DEEP >= 7200].min() == 1

    def test_a_window_without_numbers_spans_a_file_that_has_none(self, save):
        image = read_image(save("a.png", DEEP), None, Intensity("window"))
        np.testing.assert_allclose(image, DEEP / DEEP.max(), atol=1e-6)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"rule": "auto"}, "one of full, percentile, window"),
            ({"low": 60, "high": 40}, "rise"),
            ({"rule": "window", "center": 3.0}, "both"),
            ({"rule": "window", "center": 3.0, "width": 0.0}, "above 0"),
        ],
    )
    def test_impossible_rules_are_refused(self, values, said):
        with pytest.raises(UserError, match=said):
            Intensity(**values)


class TestColourAndOrientation:
    def test_channels(self, save):
        grey, colour = save("a.png", GREY), save("b.png", COLOUR)
        assert read_image(grey).shape == (6, 9)
        assert read_image(colour).shape == (6, 9, 3)
        assert np.array_equal(read_image(grey, 3), np.repeat(GREY[..., None], 3, axis=2))
        luma = COLOUR @ np.array([0.299, 0.587, 0.114])
        assert np.abs(read_image(colour, 1) - luma).max() <= 0.51
        floats = read_image(colour, 1, Intensity("window", center=127.5, width=256))
        assert np.abs(floats * 255 - luma).max() < 0.6

    def test_equal_channels_become_grey_exactly(self, save):
        path = save("a.png", np.repeat(GREY[..., None], 3, axis=2))
        assert np.array_equal(read_image(path, 1), GREY)
        rule = Intensity("percentile", 0, 100)
        np.testing.assert_array_equal(
            read_image(path, 1, rule), read_image(save("b.png", GREY), 1, rule)
        )

    def test_is_grey(self, save):
        assert is_grey(save("a.png", GREY))
        assert is_grey(save("b.png", np.repeat(GREY[..., None], 3, axis=2)))
        assert is_grey(save("c.tif", DEEP))
        assert not is_grey(save("d.png", COLOUR))
        tinted = np.repeat(GREY[..., None], 3, axis=2)
        tinted[5, 8, 2] += 1
        assert not is_grey(save("e.png", tinted))

    def test_palettes_become_grey_or_colour(self, save):
        picture = Image.fromarray(MASK).convert("P")
        picture.putpalette([v for i in range(256) for v in (i * 30 % 256,) * 3])
        assert np.array_equal(read_image(save("a.png", picture)), MASK * 30)
        picture.putpalette([v for i in range(256) for v in (i, 255 - i, 9)])
        expected = np.stack([MASK, 255 - MASK, np.full_like(MASK, 9)], -1)
        for ending in ("png", "gif", "tif", "bmp"):
            assert np.array_equal(read_image(save(f"b.{ending}", picture)), expected)

    def test_one_bit(self, save):
        picture = Image.fromarray((MASK > 3).astype(np.uint8) * 255).convert("1")
        for ending in ("png", "tif", "bmp"):
            assert np.array_equal(read_image(save(f"a.{ending}", picture)), (MASK > 3) * 255)

    def test_transparent_pixels_are_shown_on_black(self, save):
        alpha = np.full((6, 9), 255, np.uint8)
        alpha[0], alpha[1] = 0, 128
        for ending in ("png", "tif", "webp"):
            options = {"lossless": True} if ending == "webp" else {}
            rgba = np.dstack([COLOUR, alpha])
            image = read_image(save(f"a.{ending}", rgba, **options))
            assert not image[0].any()
            assert np.abs(image[1] - COLOUR[1] * (128 / 255)).max() <= 1
            assert np.array_equal(image[2:], COLOUR[2:])
        image = read_image(save("la.png", Image.fromarray(np.dstack([GREY, alpha]), "LA")))
        assert image.shape == (6, 9)
        assert not image[0].any()
        assert np.array_equal(image[2:], GREY[2:])

    def test_transparent_palette_entries_are_shown_on_black(self, save):
        picture = Image.fromarray(MASK).convert("P")
        picture.putpalette([v for i in range(256) for v in (200, 100, 50)])
        image = read_image(save("a.png", picture, transparency=3))
        assert not image[MASK == 3].any()
        assert (image[MASK == 2] == (200, 100, 50)).all()

    @pytest.mark.parametrize("ending", ["jpg", "tif"])
    def test_cmyk(self, save, ending):
        ink = np.zeros((16, 16, 4), np.uint8)
        ink[:, :8, 3] = 255
        image = read_image(save(f"a.{ending}", Image.fromarray(ink, "CMYK")))
        assert image.shape == (16, 16, 3)
        assert image[:, :8].max() <= 2
        assert image[:, 8:].min() >= 253

    def test_sixteen_bit_colour_keeps_its_high_bits(self, tmp_path):
        path = str(tmp_path / "a.png")
        write_png(path, (COLOUR.astype(np.uint16) * 256 + 200).astype(">u2"), colour_type=2)
        assert np.array_equal(read_image(path), COLOUR)

    @pytest.mark.parametrize(
        ("orientation", "upright"),
        [
            (1, lambda a: a),
            (2, lambda a: a[:, ::-1]),
            (3, lambda a: a[::-1, ::-1]),
            (6, lambda a: np.rot90(a, -1)),
            (8, np.rot90),
        ],
    )
    def test_orientation_is_applied_to_images_and_masks(self, save, orientation, upright):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in ("a.png", "a.tif", "a.webp"):
            options = {"lossless": True} if name.endswith("webp") else {}
            path = save(name, MASK, exif=exif, **options)
            assert np.array_equal(read_image(path, 1), upright(MASK))
            assert np.array_equal(read_mask(path, 7), upright(MASK))
        deep = read_image(save("deep.png", DEEP, exif=exif))
        np.testing.assert_allclose(deep, upright(DEEP) / 65535, rtol=1e-6)
        jpeg = read_image(save("a.jpg", GREY, exif=exif, quality=100))
        assert np.abs(jpeg.astype(int) - upright(GREY)).max() <= 3

    def test_the_content_decides_not_the_ending(self, save, dicom, tmp_path):
        path = save("a.png", GREY)
        os.rename(path, tmp_path / "really_png.dcm")
        assert np.array_equal(read_image(str(tmp_path / "really_png.dcm")), GREY)
        assert np.array_equal(read_image(dicom(GREY, name="really_dicom.jpg")), GREY)


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

    def test_bits_above_those_stored_are_no_part_of_the_picture(self, dicom):
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

    def test_table_of_signed_values_holds_its_ends_beyond_them(self, dicom):
        values = np.arange(-4, 5, dtype=np.int16).reshape(3, 3)
        # the first value, -2, as writers put it into an unsigned element
        path = dicom(values, VOILUTSequence=[table([10, 20, 30, 40], 8, first=2**16 - 2)])
        image = read_image(path, None, Intensity("window"))
        expected = [10, 10, 10, 20, 30, 40, 40, 40, 40]
        np.testing.assert_allclose(image.ravel() * 255, expected, atol=1e-4)

    def test_tables_of_words_and_of_more_entries_than_their_values(self, dicom):
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
        assert pixel_spacing(dicom(GREY, ImagerPixelSpacing=[0.1, 0.1])) == (0.1, 0.1)
        both = dicom(GREY, PixelSpacing=[0.2, 0.3], ImagerPixelSpacing=[0.1, 0.1])
        assert pixel_spacing(both) == (0.2, 0.3)
        assert pixel_spacing(dicom(GREY)) is None
        assert pixel_spacing(save("a.png", GREY)) is None

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

    def test_a_frame_count_that_is_no_number(self, dicom):
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


class TestUnreadableFiles:
    def refused(self, path, said):
        for read in (read_image, read_mask):
            with pytest.raises(ImageError, match=said) as caught:
                read(str(path))
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_text_named_png(self, tmp_path):
        (tmp_path / "a.png").write_text("not a picture")
        self.refused(tmp_path / "a.png", "its content is no image")

    def test_empty(self, tmp_path):
        (tmp_path / "a.tif").touch()
        self.refused(tmp_path / "a.tif", "is empty")

    def test_absent_and_folder(self, tmp_path):
        self.refused(tmp_path / "a.tif", "does not exist")
        self.refused(tmp_path, "is a folder")

    @pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp", "tif"])
    def test_truncated(self, save, ending):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
        path = save(f"a.{ending}", noise)
        content = Path(path).read_bytes()
        # past its directory, which Pillow writes before the pixels
        Path(path).write_bytes(content[: len(content) * 2 // 3])
        self.refused(path, "cannot be read")

    def test_tiff_that_lacks_rows(self, tmp_path):
        path = tmp_path / "a.tif"
        write_tiff(path, DEEP.astype("<u2"), height=5000)
        self.refused(path, "only 6 of its 5000 rows")

    def test_decompression_bomb(self, tmp_path):
        path = tmp_path / "a.png"
        write_png(path, np.zeros((1, 1), np.uint8), claimed=(60000, 60000))
        self.refused(path, "60000|bomb")
        write_png(path, np.zeros((1, 1), np.uint8), claimed=(11000, 11000))
        self.refused(path, "11000 x 11000 pixels")

    @pytest.mark.parametrize("ending", ["gif", "tif", "webp", "png"])
    def test_several_frames(self, save, ending):
        frames = [Image.fromarray(np.roll(GREY, step)) for step in range(3)]
        path = save(f"a.{ending}", frames[0], save_all=True, append_images=frames[1:])
        self.refused(path, "holds 3 frames")

    @pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), struct.error("x")])
    def test_whatever_a_decoder_raises_names_the_file(self, save, monkeypatch, error):
        def fail(*args, **kwargs):
            warnings.warn("odd bytes", UserWarning, stacklevel=1)
            raise error

        path = save("a.png", GREY)
        monkeypatch.setattr(Image, "open", fail)
        self.refused(path, str(error) or "MemoryError")

    def test_damaged_files_of_every_format(self):
        script = ROOT / "benchmarks" / "fuzz_readers.py"
        command = [sys.executable, str(script), "--files", "300", "--seed", "11"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "all 300" in done.stdout


class TestMasks:
    @settings(max_examples=40, deadline=None)
    @given(
        st.sampled_from(LOSSLESS_EXTENSIONS),
        st.tuples(st.integers(1, 60), st.integers(1, 60)),
        st.integers(2, 256),
        st.integers(0, 2**32),
    )
    def test_reading_after_writing_is_the_identity(self, tmp_path_factory, ending, size, n, seed):
        path = str(tmp_path_factory.mktemp("m") / f"a{ending}")
        mask = np.random.default_rng(seed).integers(0, n, size, dtype=np.uint8)
        write_mask(path, mask)
        assert np.array_equal(read_mask(path, n), mask)

    def test_palette_masks_are_their_indices(self, save):
        picture = Image.fromarray(MASK).convert("P")
        picture.putpalette(COLOUR.tobytes())
        for ending in ("png", "gif", "tif", "bmp"):
            assert np.array_equal(read_mask(save(f"a.{ending}", picture), 7), MASK)

    def test_a_gif_of_greys_is_a_grey_mask(self, save):
        assert np.array_equal(read_mask(save("a.gif", MASK), 7), MASK)
        assert np.array_equal(read_mask(save("b.gif", MASK + 3), 10), MASK + 3)

    def test_sixteen_bit_one_bit_and_repeated_masks(self, save, dicom):
        assert np.array_equal(read_mask(save("a.png", MASK.astype(np.uint16)), 7), MASK)
        assert np.array_equal(read_mask(save("a.tif", MASK.astype(np.int32)), 7), MASK)
        assert np.array_equal(read_mask(save("b.tif", MASK.astype(np.float32)), 7), MASK)
        bits = Image.fromarray((MASK > 3).astype(np.uint8) * 255).convert("1")
        assert np.array_equal(read_mask(save("b.png", bits), 2), MASK > 3)
        assert np.array_equal(read_mask(save("c.png", np.dstack([MASK] * 3)), 7), MASK)
        opaque = np.dstack([MASK, MASK, MASK, np.full_like(MASK, 255)])
        assert np.array_equal(read_mask(save("d.png", opaque), 7), MASK)
        rescaled = dicom(MASK, RescaleSlope=3, PhotometricInterpretation="MONOCHROME1")
        assert np.array_equal(read_mask(rescaled, 7), MASK)

    def test_colour_masks_are_refused(self, save):
        with pytest.raises(ImageError, match=r"a\.png is a colour mask.*tools/rgb2tif\.py"):
            read_mask(save("a.png", COLOUR))

    def test_transparent_masks_are_refused(self, save):
        with pytest.raises(ImageError, match="transparent"):
            read_mask(save("a.png", np.dstack([MASK] * 4)))

    def test_black_and_white_masks_are_refused_with_the_remedy(self, save):
        path = save("img_07.png", np.where(MASK > 3, 255, 0).astype(np.uint8))
        with pytest.raises(ImageError) as caught:
            read_mask(path, 7)
        assert str(caught.value) == (
            f"{path} holds the values {{0, 255}}; 7 classes allow 0 to 6. A black-and-white mask? "
            "Convert it with tools/prepare_data.py --action validate --fix-issues."
        )

    def test_values_out_of_range_are_listed(self, save):
        with pytest.raises(ImageError, match=r"\{0, 1, 2, 3, 4, 5, 6\}; 5 classes allow 0 to 4"):
            read_mask(save("a.png", MASK), 5)
        with pytest.raises(ImageError, match=r"holds the values .*13200, \.\.\.\}"):
            read_mask(save("b.png", DEEP), 7)
        with pytest.raises(ImageError, match="-1"):
            read_mask(save("c.tif", MASK.astype(np.int32) - 1), 7)
        with pytest.raises(ImageError, match="fractions"):
            read_mask(save("d.tif", MASK.astype(np.float32) / 2), 7)

    def test_jpeg_masks_only_with_values_in_range(self, save):
        flat = save("a.jpg", np.full((8, 8), 3, np.uint8))
        assert (read_mask(flat, 7) == 3).all()
        blurred = save("b.jpg", np.kron(MASK, np.full((3, 3), 30, np.uint8)))
        with pytest.raises(ImageError, match="JPEG alters values"):
            read_mask(blurred, 7)

    def test_without_a_number_of_classes_every_byte_is_allowed(self, save):
        assert np.array_equal(read_mask(save("a.png", GREY)), GREY)

    def test_masks_are_not_written_with_loss(self, tmp_path):
        with pytest.raises(ImageError, match=r"a\.jpg would not keep"):
            write_mask(str(tmp_path / "a.jpg"), MASK)


class TestWriting:
    def test_images(self, tmp_path):
        for name, image in (("a.png", GREY), ("sub/b.tif", COLOUR), ("c.bmp", GREY)):
            path = str(tmp_path / name)
            write_image(path, image)
            assert np.array_equal(read_image(path), image)
        write_image(str(tmp_path / "one_channel.png"), GREY[..., None])
        assert np.array_equal(read_image(str(tmp_path / "one_channel.png")), GREY)
        write_image(str(tmp_path / "d.png"), DEEP)
        np.testing.assert_allclose(read_image(str(tmp_path / "d.png")), DEEP / 65535, rtol=1e-6)
        write_image(str(tmp_path / "e.png"), GREY / np.float32(255))
        assert np.array_equal(read_image(str(tmp_path / "e.png")), GREY)

    @pytest.mark.parametrize("name", ["a.dcm", "a.xyz", "a"])
    def test_other_endings_are_refused(self, tmp_path, name):
        with pytest.raises(ImageError, match="cannot be written"):
            write_image(str(tmp_path / name), GREY)

    def test_a_format_that_cannot_hold_it(self, tmp_path):
        with pytest.raises(ImageError, match="cannot be written"):
            write_image(str(tmp_path / "a.jpg"), DEEP)


class TestListing:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("b.png", "a.JPG", "sub/c.tif", "sub/deep/d.dcm", "notes.txt", ".hidden.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "e.png").touch()
        return tmp_path

    def names(self, paths, folder):
        return [os.path.relpath(path, folder) for path in paths]

    def test_folders_are_searched_recursively_and_sorted(self, folder):
        expected = ["a.JPG", "b.png", "sub/c.tif", "sub/deep/d.dcm"]
        assert self.names(list_images(str(folder)), folder) == expected

    def test_files_and_globs(self, folder):
        assert list_images(str(folder / "b.png")) == [str(folder / "b.png")]
        assert self.names(list_images(f"{folder}/*"), folder) == [
            *("a.JPG", "b.png"),
            *("sub/c.tif", "sub/deep/d.dcm"),
        ]
        assert self.names(list_images(f"{folder}/sub/*.tif"), folder) == ["sub/c.tif"]

    def test_no_images(self, tmp_path):
        for name in ("a.txt", "b.txt", "c.csv"):
            (tmp_path / name).touch()
        with pytest.raises(UserError) as caught:
            list_images(str(tmp_path))
        assert f"no images in {tmp_path};" in str(caught.value)
        assert "2 .txt, 1 .csv" in str(caught.value)
        assert ".tiff" in str(caught.value)
        with pytest.raises(UserError, match="does not exist"):
            list_images(str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="it holds no files"):
            list_images(str(tmp_path / "*.png"))

    def test_dicom_without_an_ending(self, dicom, tmp_path):
        dicom(GREY, name="IM0001")
        dicom(GREY, name="1.2.840.7")
        dicom(GREY, name="DICOMDIR")
        (tmp_path / "README").write_text("words " * 100)
        assert self.names(list_images(str(tmp_path)), tmp_path) == ["1.2.840.7", "IM0001"]

    def test_links_in_a_circle_end(self, folder):
        os.symlink(folder, folder / "sub" / "circle")
        assert len(list_images(str(folder))) == 4

    def test_linked_folders_are_entered(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("linked")
        os.symlink(folder, other / "data")
        assert len(list_images(str(other))) == 4

    def test_cloud_paths_go_through_blobfile(self, folder, save, monkeypatch):
        path = save("b.png", GREY)
        plain = list_images(str(folder))
        for module in (files, runtime_files):
            monkeypatch.setattr(module, "is_local", lambda path: False)
        assert sorted(list_images(str(folder))) == sorted(plain)
        assert np.array_equal(read_image(path), GREY)
        write_mask(str(folder / "m.png"), MASK)
        assert np.array_equal(read_mask(str(folder / "m.png")), MASK)


class TestPairing:
    @pytest.fixture
    def touch(self, tmp_path):
        def make(*names):
            for name in names:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).touch()
            return str(tmp_path / "img"), str(tmp_path / "mask")

        return make

    def test_stems_decide(self, touch, tmp_path):
        folders = touch(
            *("img/a.jpg", "img/b.dcm", "img/c.x.png", "img/d.png", "img/s/a.png", "img/e.tif"),
            *("mask/a.png", "mask/b_mask.tif", "mask/c.x_GT.png", "mask/d_seg.bmp"),
            *("mask/s/a_label.png", "mask/e.png"),
        )
        pairs = pair_files(*folders)
        assert [stem for stem, _, _ in pairs] == ["a", "b", "c.x", "d", "e", "s/a"]
        assert pairs[-1][1:] == (f"{tmp_path}/img/s/a.png", f"{tmp_path}/mask/s/a_label.png")
        assert pairs[1][2].endswith("b_mask.tif")
        assert pair_files(folders[0] + "/", folders[1] + "/")[2][0] == "c.x"

    def test_an_exact_name_is_taken_before_a_suffix(self, touch):
        folders = touch("img/a_gt.png", "img/a.png", "mask/a_gt.png", "mask/a.png")
        assert [(s, os.path.basename(m)) for s, _, m in pair_files(*folders)] == [
            ("a", "a.png"),
            ("a_gt", "a_gt.png"),
        ]

    def test_images_and_masks_side_by_side(self, touch):
        folder, _ = touch("img/a.png", "img/a_mask.png", "img/b.jpg", "img/b_seg.png")
        assert [s for s, _, _ in pair_files(folder, folder)] == ["a", "b"]
        touch("img/c.png")
        with pytest.raises(UserError, match=r"c\.png has no mask"):
            pair_files(folder, folder)

    def test_everything_that_does_not_pair_is_listed(self, touch):
        folders = touch(
            *("img/a.png", "img/b.png", "img/c.png", "img/c.jpg", "img/d.png"),
            *("mask/b.png", "mask/b_mask.png", "mask/c.png", "mask/x.png", "mask/d.png"),
        )
        with pytest.raises(UserError) as caught:
            pair_files(*folders)
        message = str(caught.value)
        assert message.startswith("4 names in")
        assert "img/a.png has no mask" in message
        assert "mask/x.png has no image" in message
        assert "mask/b.png and" in message
        assert "mask/b_mask.png all have the stem b" in message
        assert "img/c.jpg and" in message
        assert "d.png" not in message
        assert "\n" not in message

    def test_long_lists_end_with_a_count(self, touch):
        folders = touch("mask/x.png", *(f"img/{i:02}.png" for i in range(40)))
        with pytest.raises(UserError, match=r"^41 names .*09\.png has no mask; and 31 more"):
            pair_files(*folders)


def write_png(path, pixels_, colour_type=0, claimed=None):
    """A PNG written by hand, with a header that may claim any (height, width)."""

    def chunk(kind, content):
        code = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", code)

    height, width = claimed or pixels_.shape[:2]
    bits = 8 * pixels_.dtype.itemsize
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels_)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def write_tiff(path, values, sample_format=1, photometric=1, height=None):
    """A grey uncompressed little-endian TIFF written by hand, of one strip."""
    content = values.tobytes()
    tags = [
        (256, values.shape[1]),
        (257, height or values.shape[0]),
        (258, 8 * values.dtype.itemsize),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, values.shape[0]),
        (279, len(content)),
        (339, sample_format),
    ]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(content))
    Path(path).write_bytes(start + content + directory + struct.pack("<I", 0))
