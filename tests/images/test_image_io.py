import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from images_util import COLOUR, DEEP, GREY, MASK, write_png, write_tiff
from PIL import Image

from guided_diffusion.images.image_io import (
    ImageError,
    Intensity,
    bit_depth,
    is_grey,
    read_image,
    write_image,
)
from guided_diffusion.images.masks import read_mask
from guided_diffusion.runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")


class TestGreyLevels:
    @pytest.mark.parametrize("ending", ["png", "bmp", "gif", "webp", "tif", "tiff"])
    def test_eight_bits_are_read_unchanged(self, save, ending):
        options = {"lossless": True} if ending == "webp" else {}
        image = read_image(save(f"a.{ending}", GREY, **options), 1)
        assert image.dtype == np.uint8
        assert np.array_equal(image, GREY)

    def test_jpeg_is_read_approximately(self, save):
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

    def test_a_constant_image_is_black_under_stretching_rules(self, save):
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

    def test_sixteen_bit_colour_keeps_all_its_bits(self, tmp_path):
        path = str(tmp_path / "a.png")
        values = COLOUR.astype(np.uint16) * 256 + 200
        write_png(path, values.astype(">u2"), colour_type=2)
        np.testing.assert_allclose(read_image(path), values / 65535, atol=1e-6)
        grey = np.repeat(DEEP[..., None] // 16, 3, axis=-1)  # of 12 bits, as some programs save it
        write_png(path, grey.astype(">u2"), colour_type=2)
        assert is_grey(path)
        rule = Intensity("window", center=2000, width=3000)
        expected = ((DEEP // 16 - 1999.5) / 2999 + 0.5).clip(0, 1)
        np.testing.assert_allclose(read_image(path, 1, rule), expected, atol=1e-5)
        assert bit_depth(path) == 16

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

    def test_the_content_decides_not_the_extension(self, save, dicom, tmp_path):
        path = save("a.png", GREY)
        os.rename(path, tmp_path / "really_png.dcm")
        assert np.array_equal(read_image(str(tmp_path / "really_png.dcm")), GREY)
        assert np.array_equal(read_image(dicom(GREY, name="really_dicom.jpg")), GREY)


class TestUnreadableFiles:
    def refused(self, path, said):
        for read in (read_image, read_mask):
            with pytest.raises(ImageError, match=said) as caught:
                read(str(path))
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_text_named_png(self, tmp_path):
        (tmp_path / "a.png").write_text("not a picture")
        self.refused(tmp_path / "a.png", "its content is not an image")

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
        # behind the directory, which Pillow writes before the pixels
        Path(path).write_bytes(content[: len(content) * 2 // 3])
        self.refused(path, "cannot be read")

    def test_tiff_that_lacks_rows(self, tmp_path):
        path = tmp_path / "a.tif"
        write_tiff(path, DEEP.astype("<u2"), height=5000)
        self.refused(path, "only 6 of its 5000 rows")

    def test_decompression_bomb(self, tmp_path):
        path = tmp_path / "a.png"
        write_png(path, np.zeros((1, 1), np.uint8), claimed=(60000, 60000))
        self.refused(path, "it claims more than 100000000 pixels")
        write_png(path, np.zeros((1, 1), np.uint8), claimed=(11000, 11000))
        self.refused(path, "11000 x 11000 pixels")

    @pytest.mark.parametrize("ending", ["gif", "tif", "webp", "png"])
    def test_several_frames(self, save, ending):
        frames = [Image.fromarray(np.roll(GREY, step)) for step in range(3)]
        path = save(f"a.{ending}", frames[0], save_all=True, append_images=frames[1:])
        self.refused(path, "holds 3 frames")

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (MemoryError(), "does not fit into memory"),
            (OSError("broken data stream"), "broken data stream"),
            (PermissionError(13, "Permission denied"), "Permission denied"),
            (RecursionError("deep"), "is damaged.*export it again"),
            (struct.error("deep"), "is damaged"),
            (AttributeError("'NoneType' object has no attribute 'deep'"), "is damaged"),
        ],
    )
    def test_whatever_a_decoder_raises_names_the_file(self, save, monkeypatch, error, said):
        def fail(*args, **kwargs):
            warnings.warn("odd bytes", UserWarning, stacklevel=1)
            raise error

        path = save("a.png", GREY)
        monkeypatch.setattr(Image, "open", fail)
        self.refused(path, rf"a\.png cannot be read: .*{said}(?!.*deep)")


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
    def test_other_extensions_are_refused(self, tmp_path, name):
        with pytest.raises(ImageError, match="cannot be written"):
            write_image(str(tmp_path / name), GREY)

    def test_a_format_that_cannot_hold_it(self, tmp_path):
        with pytest.raises(ImageError, match="cannot be written"):
            write_image(str(tmp_path / "a.jpg"), DEEP)
