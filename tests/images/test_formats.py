"""Every depth and kind of sample that the formats allow: the right grey levels, or one line."""

import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiff_util import write_any_tiff

from guided_diffusion.images.image_io import ImageError, bit_depth, read_image
from guided_diffusion.images.masks import read_mask

pytestmark = pytest.mark.filterwarnings("error")

H, W = 32, 48
RAMP = np.linspace(0, 1, H * W).reshape(H, W)
COLOURS = np.random.default_rng(0).random((H, W, 4))
ORDERS = {"little": {"order": "<"}, "big": {"order": ">"}, "BigTIFF": {"big": True}}


def levels(path):
    """The image with levels from 0 to 1; None if it is refused in one line with a remedy."""
    try:
        image = read_image(str(path))
    except ImageError as error:
        text = str(error)
        assert text.startswith(f"{path} cannot be read: it "), text
        assert any(word in text for word in ("convert", "save")), text
        assert "\n" not in text
        return None
    return image / 255 if image.dtype == np.uint8 else image


def check(path, expected, may_refuse=False, tolerance=0.006):
    found = levels(path)
    assert found is not None or may_refuse, "refused"
    if found is not None:
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=tolerance)


class TestTiff:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "a.tif"

    @pytest.mark.parametrize("layout", ORDERS)
    @pytest.mark.parametrize("kind", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"])
    @pytest.mark.parametrize("white_is_zero", [False, True])
    @pytest.mark.parametrize("storage", [{}, {"tile": 16}, {"rows": 5}, {"compression": 8}])
    def test_grey_integers(self, path, layout, kind, white_is_zero, storage):
        info = np.iinfo(kind)
        span = float(info.max) - float(info.min)
        values = (float(info.min) + 0.99 * RAMP * span).astype(kind)
        write_any_tiff(
            path, values, photometric=int(not white_is_zero), **ORDERS[layout], **storage
        )
        expected = (values.astype(float) - info.min) / span
        rare = white_is_zero and (kind not in ("u1", "u2") or (layout, kind) == ("big", "u2"))
        refusable = rare or kind[1] == "8" or (layout, kind) == ("big", "u4")
        check(path, 1 - expected if white_is_zero else expected, refusable, 1e-6)

    @pytest.mark.parametrize("layout", ORDERS)
    @pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
    @pytest.mark.parametrize("storage", [{}, {"tile": 16}, {"compression": 8}])
    def test_grey_floats(self, path, layout, kind, storage):
        values = (0.1 + 0.8 * RAMP).astype(kind)
        values[3, 4:7] = np.nan, np.inf, -np.inf
        expected = np.where(np.isfinite(values), values.astype(float), 0)
        for photometric in (0, 1):
            write_any_tiff(path, values, photometric=photometric, **ORDERS[layout], **storage)
            right = expected if photometric else np.where(np.isfinite(values), 1 - expected, 0)
            check(path, right, may_refuse=kind != "f4", tolerance=1e-6)

    @pytest.mark.parametrize("layout", ORDERS)
    @pytest.mark.parametrize("bits", [1, 2, 4, 12, 24])
    @pytest.mark.parametrize("photometric", [0, 1])
    def test_odd_depths(self, path, layout, bits, photometric):
        values = np.rint(RAMP * (2**bits - 1)).astype("u4" if bits > 16 else "u2")
        write_any_tiff(path, values, bits=bits, photometric=photometric, **ORDERS[layout])
        expected = values / (2**bits - 1)
        check(path, expected if photometric else 1 - expected, may_refuse=bits > 8)

    @pytest.mark.parametrize("layout", ORDERS)
    @pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i2", "f4"])
    @pytest.mark.parametrize("planar", [1, 2])
    @pytest.mark.parametrize("storage", [{}, {"compression": 8}, {"rows": 5}, {"tile": 16}])
    def test_colour(self, path, layout, kind, planar, storage):
        top = 1 if kind == "f4" else np.iinfo(kind).max
        values = (COLOURS[..., :3] * top).astype(kind)
        write_any_tiff(path, values, planar=planar, **ORDERS[layout], **storage)
        planes = planar == 2 and kind == "u2" and "compression" in storage
        check(path, values / top, kind not in ("u1", "u2") or planes, tolerance=1e-5)

    @pytest.mark.parametrize("layout", ORDERS)
    @pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
    @pytest.mark.parametrize("planar", [1, 2])
    @pytest.mark.parametrize("samples", [2, 4])
    @pytest.mark.parametrize("meaning", [0, 1, 2])
    def test_further_samples(self, path, layout, kind, planar, samples, meaning):
        top = 1 if kind == "f4" else np.iinfo(kind).max
        shown = COLOURS[..., : samples - 1]
        alpha = COLOURS[..., 3:]
        dimmed = shown if meaning == 0 else shown * alpha  # 0: what it means is not said
        stored = np.dstack([dimmed if meaning == 1 else shown, alpha])
        more = [(338, 3, [meaning])]
        write_any_tiff(
            path, (stored * top).astype(kind), planar=planar, more=more, **ORDERS[layout]
        )
        refusable = not (kind == "u1" and planar == 1 and samples == 4)
        check(path, dimmed[..., 0] if samples == 2 else dimmed, refusable, tolerance=0.02)

    @pytest.mark.parametrize("layout", ORDERS)
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    @pytest.mark.parametrize("depth", [8, 16])
    def test_palettes(self, path, layout, bits, depth):
        indices = np.rint(RAMP * (2**bits - 1)).astype("u1")
        table = np.random.default_rng(bits).integers(0, 2**depth, (3, 2**bits))
        more = [(320, 3, table.ravel().tolist())]
        write_any_tiff(path, indices, photometric=3, bits=bits, more=more, **ORDERS[layout])
        expected = table.T[indices] / (2**depth - 1)
        check(path, expected, may_refuse=layout == "BigTIFF", tolerance=0.005)

    def test_cmyk_lab_and_the_rest(self, path):
        write_any_tiff(path, (COLOURS * 255).astype("u1"), photometric=5)
        check(path, (1 - COLOURS[..., :3]) * (1 - COLOURS[..., 3:]), tolerance=0.01)
        lightness = np.zeros((H, W, 3), np.uint8)
        lightness[..., 0] = RAMP * 255
        write_any_tiff(path, lightness, photometric=8)
        assert np.ptp(levels(path), axis=-1).max() < 0.02
        assert (np.diff(levels(path)[..., 0].ravel()) >= 0).all()
        for values in (RAMP.astype("c8"), COLOURS[..., :2].astype("f8")):
            write_any_tiff(path, values)
            assert levels(path) is None
        write_any_tiff(path, (RAMP * 65535).astype("u2"), sample_format=4)
        assert levels(path) is None

    def test_what_is_not_supported_is_named(self, path):
        write_any_tiff(path, RAMP)
        with pytest.raises(ImageError, match=r"1 x 64 bits, floats.*convert it to grey"):
            read_image(str(path))
        Path(path).write_bytes(Path(path).read_bytes()[:40])
        with pytest.raises(ImageError, match="TIFF that is damaged"):
            read_image(str(path))

    @pytest.mark.parametrize("layout", ORDERS)
    @pytest.mark.parametrize("storage", [{}, {"compression": 8}, {"planar": 2}, {"tile": 16}])
    def test_masks_of_sixteen_bit_colour(self, path, layout, storage):
        classes = np.rint(RAMP * 6).astype("u2")
        values = np.repeat(classes[..., None], 3, axis=-1)
        write_any_tiff(path, values, **{**ORDERS[layout], **storage})
        assert np.array_equal(read_mask(str(path), 7), classes)

    @pytest.mark.parametrize("layout", ORDERS)
    def test_pages(self, path, layout):
        write_any_tiff(path, (RAMP * 255).astype("u1"), pages=2, **ORDERS[layout])
        assert levels(path) is None

    @pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", "lzma"])
    @pytest.mark.parametrize("kind", ["u1", "u2", "f4", "i4", "bool"])
    def test_compressions(self, path, compression, kind):
        top = {"u1": 255, "u2": 65535, "i4": 2**31 - 1}.get(kind, 1)
        picture = Image.fromarray((RAMP * top).astype(kind) if kind != "bool" else RAMP > 0.5)
        try:
            picture.save(path, compression=compression)
        except OSError:
            pytest.skip("this Pillow lacks it")
        right = {"i4": 0.5 + RAMP / 2, "bool": RAMP > 0.5}.get(kind, RAMP)
        check(path, right.astype(float))

    @pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
    def test_fax(self, path, compression):
        Image.fromarray(RAMP > 0.5).save(path, compression=compression)
        check(path, (RAMP > 0.5).astype(float))

    def test_depths_are_reported(self, path):
        for kind, bits in (("u1", 8), ("i2", 16), ("u4", 32), ("f4", 32)):
            write_any_tiff(path, (RAMP * 100).astype(kind))
            assert bit_depth(str(path)) == bits


def png(path, values, bits, colour_type, interlaced=False, chunks=()):
    """A PNG of any kind, written by hand."""

    def chunk(kind, content):
        code = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + code

    def rows(part):
        flat = part.reshape(len(part), -1, 1).astype(np.uint32)
        packed = np.packbits((flat >> np.arange(bits)[::-1] & 1).reshape(len(part), -1), axis=1)
        return b"".join(b"\0" + row.tobytes() for row in packed)

    steps = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    passes = [*steps, (1, 0, 2, 1)] if interlaced else [(0, 0, 1, 1)]
    parts = [values[y::down, x::across] for y, x, down, across in passes]
    data = b"".join(rows(part) for part in parts if part.size)
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, int(interlaced))
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body))


KINDS_OF_PNG = [
    *itertools.product([0], [1, 2, 4, 8, 16]),
    *itertools.product([2, 4, 6], [8, 16]),
    *itertools.product([3], [1, 2, 4, 8]),
]


class TestPng:
    @pytest.mark.parametrize("interlaced", [False, True])
    @pytest.mark.parametrize(("colour_type", "bits"), KINDS_OF_PNG)
    def test_every_kind(self, tmp_path, colour_type, bits, interlaced):
        path, top = tmp_path / "a.png", 2**bits - 1
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
        source = RAMP[..., None] if channels == 1 else COLOURS[..., -channels:]
        values = np.rint(source * top).astype(np.uint32)
        expected = values / top
        chunks = []
        if colour_type == 3:
            table = np.random.default_rng(bits).integers(0, 256, (2**bits, 3), dtype=np.uint8)
            chunks = [(b"PLTE", table.tobytes())]
            expected = table[values[..., 0]] / 255
        if colour_type in (4, 6):
            expected = expected[..., :-1] * expected[..., -1:]
        if channels < 3 and colour_type != 3:
            expected = expected[..., 0]
        png(path, values, bits, colour_type, interlaced, chunks)
        check(path, expected, tolerance=1e-5 if bits == 16 else 0.01)

    @pytest.mark.parametrize("interlaced", [False, True])
    @pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
    def test_masks_of_sixteen_bits(self, tmp_path, colour_type, interlaced):
        path, channels = tmp_path / "a.png", {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
        classes = np.rint(RAMP * 6).astype(np.uint32)
        values = np.repeat(classes[..., None], channels, axis=-1)
        if colour_type > 2:
            values[..., -1] = 65535
        png(path, values, 16, colour_type, interlaced)
        assert np.array_equal(read_mask(str(path), 7), classes)
        if colour_type > 2:
            values[3, 4, -1] = 65000
            png(path, values, 16, colour_type, interlaced)
            with pytest.raises(ImageError, match="transparent"):
                read_mask(str(path), 7)

    def test_transparent_colours_are_black(self, tmp_path):
        path = tmp_path / "a.png"
        values = (COLOURS[..., :3] * 255).astype(np.uint32)
        values[4] = 200, 100, 50
        png(path, values, 8, 2, chunks=[(b"tRNS", struct.pack(">HHH", 200, 100, 50))])
        expected = values / 255
        expected[4] = 0
        check(path, expected)
        indices = np.rint(RAMP * 3).astype(np.uint32)
        table = [(b"PLTE", bytes([10, 20, 30] * 4)), (b"tRNS", bytes([255, 0, 128]))]
        png(path, indices, 2, 3, chunks=table)
        share = np.array([1, 0, 128 / 255, 1])[indices]
        check(path, share[..., None] * np.array([10, 20, 30]) / 255)
        deep = (COLOURS[..., :3] * 65535).astype(np.uint32)
        deep[4] = 60000, 300, 7
        deep[5] = 60000, 300, 8  # of the same upper bytes
        png(path, deep, 16, 2, chunks=[(b"tRNS", struct.pack(">HHH", 60000, 300, 7))])
        expected = deep / 65535
        expected[4] = 0
        check(path, expected, tolerance=1e-5)

    @pytest.mark.parametrize("bits", [8, 16])
    def test_a_transparent_grey_of_a_grey_file_counts_as_any_other(self, tmp_path, bits):
        values = np.rint(RAMP * (2**bits - 1)).astype(np.uint32)
        png(tmp_path / "a.png", values, bits, 0, chunks=[(b"tRNS", struct.pack(">H", 0))])
        check(tmp_path / "a.png", values / (2**bits - 1))

    @pytest.mark.parametrize("ending", ["png", "tif", "webp"])
    def test_a_file_that_is_all_transparent_is_refused(self, save, ending):
        rgba = (COLOURS * 255).astype(np.uint8)
        rgba[..., 3] = 0
        options = {"lossless": True, "exact": True} if ending == "webp" else {}
        assert levels(save(f"a.{ending}", Image.fromarray(rgba), **options)) is None


class TestOthers:
    @pytest.mark.parametrize("bits", [16, 24, 32])
    @pytest.mark.parametrize("top_down", [False, True])
    def test_bmp(self, tmp_path, bits, top_down):
        path, bytes_each = tmp_path / "a.bmp", bits // 8
        colours = np.rint(COLOURS[..., :3] * (31 if bits == 16 else 255)).astype(np.uint32)
        red, green, blue = np.moveaxis(colours, -1, 0)
        shift = 5 if bits == 16 else 8
        words = (red << 2 * shift | green << shift | blue).astype("<u4")
        rows = words if top_down else words[::-1]
        raw = rows.view(np.uint8).reshape(H, W, 4)[..., :bytes_each].tobytes()
        header = struct.pack(
            "<IiiHHIIiiII", 40, W, -H if top_down else H, 1, bits, 0, 0, 0, 0, 0, 0
        )
        path.write_bytes(struct.pack("<2sIHHI", b"BM", 54 + len(raw), 0, 0, 54) + header + raw)
        check(path, colours / (31 if bits == 16 else 255), tolerance=0.01)

    @pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
    def test_animations_are_refused(self, save, ending):
        frames = [Image.fromarray((np.roll(RAMP, n) * 255).astype(np.uint8)) for n in range(2)]
        path = save(f"a.{ending}", frames[0], save_all=True, append_images=frames[1:])
        assert levels(path) is None

    def test_jpeg_of_cmyk_and_grey(self, save):
        smooth = (RAMP * 255).astype(np.uint8)
        check(save("a.jpg", smooth, quality=95), smooth / 255, tolerance=0.02)
        ink = np.dstack([0 * smooth] * 3 + [smooth])
        picture = Image.fromarray(ink, "CMYK")
        check(save("b.jpg", picture, quality=95), np.dstack([1 - smooth / 255] * 3), tolerance=0.03)
