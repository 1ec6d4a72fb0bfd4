import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images_util import COLOUR, DEEP, GREY, MASK
from PIL import Image

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.image_io import ImageError
from guided_diffusion.images.masks import (
    LOSSLESS_EXTENSIONS,
    MaskRule,
    black_and_white,
    count_classes,
    ignored_values,
    read_mask,
    resembles_radiograph,
    write_mask,
)
from guided_diffusion.preparation.phantoms import make_phantom
from guided_diffusion.runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")


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


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_radiographs_are_told_from_masks(save, ending):
    image, mask = make_phantom(3, (96, 96))
    assert resembles_radiograph(save(f"a.{ending}", image))
    assert resembles_radiograph(save(f"b.{ending}", np.stack([image] * 3, axis=2)))
    areas = np.kron(np.arange(49, dtype=np.uint8).reshape(7, 7), np.ones((9, 9), np.uint8))
    for drawn in (mask, 40 * mask, np.where(mask > 1, 255, 0).astype(np.uint8), areas):
        assert not resembles_radiograph(save(f"c.{ending}", drawn))
        assert not resembles_radiograph(save("d.jpg", drawn))


def _discs(size=64):
    down, across = np.mgrid[:size, :size]
    return ((across - 20) ** 2 + (down - 32) ** 2 < 100) | ((across - 44) ** 2 < 30)


def _grey_png(path, mask, bits):
    """A grey PNG of 1, 2, 4 or 8 bits, which Pillow cannot write."""
    per_byte = 8 // bits
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % per_byte))).astype(np.uint16)
    packed = np.zeros((len(mask), padded.shape[1] // per_byte), np.uint16)
    for place in range(per_byte):
        packed |= padded[:, place::per_byte] << (8 - bits * (place + 1))
    rows = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in packed)

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], bits, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return str(path)


class TestForeground:
    """One rule for black-and-white masks, whatever wrote them."""

    RULE = MaskRule(2, binary=True)

    @pytest.mark.parametrize("quality", [20, 50, 75, 95])
    def test_noise_of_lossy_files_is_no_foreground(self, save, quality):
        for ending in ("jpg", "webp"):
            drawn = Image.fromarray(_discs().astype(np.uint8) * 255)
            path = save(f"{quality}.{ending}", drawn, quality=quality)
            assert np.array_equal(self.RULE.read(path), _discs())

    @pytest.mark.parametrize("white", [1, 2, 128, 254, 255, 65535])
    def test_any_single_value_is_foreground(self, save, white):
        kind = np.uint16 if white > 255 else np.uint8
        path = save("m.png", _discs().astype(kind) * kind(white))
        assert np.array_equal(self.RULE.read(path), _discs())

    def test_of_class_indices_all_but_0_are_foreground(self, save):
        assert np.array_equal(self.RULE.read(save("m.png", MASK)), MASK > 0)
        many = (np.arange(64 * 64).reshape(64, 64) // 64).astype(np.uint8)
        assert np.array_equal(self.RULE.read(save("n.png", many)), many > 0)

    def test_grey_edges_are_halved(self, save):
        large = Image.fromarray(np.kron(_discs(), np.full((4, 4), 255)).astype(np.uint8))
        small = large.resize((100, 100), Image.Resampling.BICUBIC)
        grey = np.asarray(small) > 127
        assert np.array_equal(self.RULE.read(save("m.png", small)), grey)
        deep = np.asarray(small).astype(np.uint16) * 257
        assert np.array_equal(self.RULE.read(save("n.png", deep)), grey)

    def test_what_is_neither_is_refused(self, save):
        bordered = np.where(np.arange(8) > 6, 255, MASK[:, :1] % 3).astype(np.uint8)
        with pytest.raises(ImageError, match=r"neither .* pass --ignore_index 255"):
            self.RULE.read(save("m.png", bordered))
        with pytest.raises(ImageError, match="JPEG alters values"):
            self.RULE.read(save("m.jpg", np.kron(MASK, np.full((9, 9), 20, np.uint8))))

    def test_thresholds_are_levels_of_255(self, save):
        levels = np.array([[0, 100, 101, 255]], np.uint8)
        rule = MaskRule(2, binary=True, threshold=100)
        for path in (save("m.png", levels), save("n.png", levels.astype(np.uint16) * 257)):
            assert rule.read(path).tolist() == [[0, 0, 1, 1]]

    def test_the_black_and_white_are_told_from_classes_with_a_border(self):
        assert np.array_equal(black_and_white(_discs() * 255, ""), _discs())
        assert black_and_white(np.where(_discs(), 1, 0), "") is None
        thin = np.zeros((40, 40), int)
        thin[5], thin[:, 30:] = 1, 255
        assert black_and_white(thin, "") is None
        thick = np.where(_discs(), 2, 0)
        thick[:, 50:] = 255
        assert black_and_white(thick, "") is black_and_white(thick, "JPEG") is None


class TestPolarity:
    def test_palettes_of_greys_keep_it(self, save):
        mask = _discs().astype(np.uint8)
        white_first = Image.fromarray(1 - mask).convert("P")
        white_first.putpalette([255, 255, 255, 0, 0, 0])
        black_first = Image.fromarray(mask).convert("P")
        black_first.putpalette([0, 0, 0, 255, 255, 255])
        bitmap = Image.fromarray(mask * 255).convert("1")
        for ending in ("png", "gif", "tif", "bmp"):
            for number, picture in enumerate((white_first, black_first, bitmap)):
                path = save(f"{number}.{ending}", picture)
                if (ending, number) == ("bmp", 1):
                    with pytest.raises(ImageError, match="BMP file of 8 bits"):
                        read_mask(path)
                    continue
                assert np.array_equal(MaskRule(2, binary=True).read(path), mask), path
        for ending in ("png", "tif"):
            assert np.array_equal(read_mask(save(f"b.{ending}", black_first), 2), mask)
        with pytest.raises(ImageError, match=r"\{0, 255\}.*black-and-white"):
            read_mask(save("w.png", white_first), 2)

    def test_inverted_dicom_is_refused_where_it_matters(self, dicom):
        inverted = {"PhotometricInterpretation": "MONOCHROME1"}
        with pytest.raises(ImageError, match="foreground is unclear"):
            MaskRule(2, binary=True).read(dicom(_discs().astype(np.uint8) * 255, **inverted))
        assert np.array_equal(read_mask(dicom(MASK, **inverted), 7), MASK)

    def test_dark_greys_of_optimised_palettes_are_values(self, save):
        picture = Image.fromarray(np.searchsorted([0, 3, 6], MASK // 3 * 3).astype(np.uint8))
        picture = picture.convert("P")
        picture.putpalette([v for grey in (0, 3, 6) for v in (grey,) * 3])
        assert np.array_equal(read_mask(save("a.png", picture), 7), MASK // 3 * 3)

    def test_indices_that_are_hardly_classes_are_refused(self, save):
        picture = Image.fromarray((MASK % 3).astype(np.uint8)).convert("P")
        picture.putpalette([255, 0, 0, 0, 0, 0, 0, 255, 0])
        with pytest.raises(ImageError, match="index 1 in black and index 0 in colour"):
            read_mask(save("a.png", picture), 3)
        picture.putpalette([0, 0, 0, 200, 200, 200, 100, 100, 100])
        with pytest.raises(ImageError, match="do not rise with the index"):
            read_mask(save("b.png", picture), 3)

    def test_white_is_zero_tiffs_show_what_they_show(self, save, tmp_path):
        mask = _discs().astype(np.uint8)
        picture = Image.fromarray(mask * 255).convert("1")
        deep = Image.fromarray((1 - mask).astype(np.uint16) * np.uint16(65535))
        for path in (
            save("a.tif", picture, tiffinfo={262: 0}),
            save("b.tif", deep, tiffinfo={262: 0}),
        ):
            assert np.array_equal(MaskRule(2, binary=True).read(path), mask)


class TestStoredValues:
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_grey_of_few_bits_is_not_scaled(self, tmp_path, bits):
        mask = MASK % min(2**bits, 16)
        assert np.array_equal(read_mask(_grey_png(tmp_path / "a.png", mask, bits), 7), mask)

    def test_lossy_files_are_no_class_indices(self, save, dicom):
        classes = np.kron(MASK % 3, np.ones((9, 9), np.uint8))
        for path in (
            save("a.jpg", classes, quality=95),
            save("a.webp", Image.fromarray(classes), quality=80, lossless=False),
            save("a.tif", Image.fromarray(classes), compression="jpeg"),
            dicom(classes, LossyImageCompression="01"),
        ):
            with pytest.raises(ImageError, match="alters values; save masks as PNG or TIFF"):
                read_mask(path, 7)
        assert np.array_equal(read_mask(save("b.webp", classes, lossless=True), 7), classes)


class TestIgnoredValues:
    def test_they_are_read_as_ignore(self, save):
        path = save("a.png", np.where(MASK > 4, 200, MASK).astype(np.uint8))
        expected = np.where(MASK > 4, IGNORE, MASK)
        assert np.array_equal(read_mask(path, 5, (200,)), expected)
        assert np.array_equal(MaskRule(5, (200, 255)).read(path), expected)
        with pytest.raises(ImageError, match="200"):
            read_mask(path, 5)
        joined = MaskRule(2, (200,), binary=True).read(path)
        assert np.array_equal(joined, np.where(MASK > 4, IGNORE, MASK > 0))

    def test_undeclared_ones_are_named_with_the_flag(self, save):
        path = save("a.png", np.where(MASK > 4, 255, MASK).astype(np.uint8))
        for rule in (MaskRule(5), MaskRule()):
            with pytest.raises(ImageError, match=r"255.*pass --ignore_index 255"):
                rule.read(path)

    def test_only_what_masks_can_hold(self):
        assert ignored_values(-1) == ()
        assert ignored_values(255) == (255,)
        for value in (-2, 256):
            with pytest.raises(UserError, match=f"--ignore_index {value}"):
                ignored_values(value)


@pytest.mark.parametrize(
    ("values", "classes"),
    [([0], 2), ([0, 1], 2), ([0, 2], 3), ([0, 1, 3], 4), ([0, 1, 2, IGNORE], 3), ([5, 4, 3, 1], 6)],
)
def test_classes_are_counted(values, classes):
    assert count_classes(values, "--out_channels") == classes


@pytest.mark.parametrize("values", [[0, 128], [0, 85, 170], [0, 5], [0, 50, 100, 150, 200]])
def test_values_with_gaps_are_no_class_indices(values):
    remedy = "--binary" if len(values) == 2 else r"tools/rgb2tif\.py"
    with pytest.raises(UserError, match=f"{remedy}.* pass --out_channels {max(values) + 1}"):
        count_classes(values, "--out_channels")


def test_grey_levels_for_display_are_told_from_an_ignore_label(save):
    path = save("a.png", np.choose(MASK % 4, [0, 85, 170, 255]).astype(np.uint8))
    for rule in (MaskRule(4), MaskRule()):
        with pytest.raises(ImageError, match=r"255.* tools/rgb2tif\.py and a class table"):
            rule.read(path)
