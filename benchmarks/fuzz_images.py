"""Small valid images of every format, for fuzz_readers.py."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from pydicom import dcmwrite, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate


def valid_files() -> dict[str, bytes]:
    """A small valid file of every format, by file name."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:40, 0:56]
    grey = ((rows * 3 + columns * 2) % 256).astype(np.uint8)
    grey16 = (rows * 900 + columns * 400).astype(np.uint16)
    mask = (rows // 8).astype(np.uint8)
    colour = np.stack([grey, grey.T.reshape(40, 56), rng.integers(0, 256, (40, 56))], -1)
    picture, rgb = Image.fromarray(grey), Image.fromarray(colour.astype(np.uint8))
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    rgba = Image.merge("RGBA", (*rgb.split(), picture))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "grey.png": _encode(picture, "PNG"),
        "grey16.png": _encode(Image.fromarray(grey16), "PNG"),
        "rgb.png": _encode(rgb, "PNG"),
        "rgb16.png": _png_of_16_bits(np.stack([grey16] * 3, -1), 2),
        "grey_alpha16.png": _png_of_16_bits(np.stack([grey16, grey16 | 255], -1), 4),
        "rgba.png": _encode(rgba, "PNG"),
        "grey_alpha.png": _encode(rgba.convert("LA"), "PNG"),
        "palette.png": _encode(palette, "PNG"),
        "bilevel.png": _encode(picture.convert("1"), "PNG"),
        "grey.jpg": _encode(picture, "JPEG"),
        "rgb.jpg": _encode(rgb, "JPEG", exif=exif),
        "progressive.jpg": _encode(rgb, "JPEG", progressive=True),
        "cmyk.jpg": _encode(rgb.convert("CMYK"), "JPEG"),
        "grey.bmp": _encode(picture, "BMP"),
        "rgb.bmp": _encode(rgb, "BMP"),
        "palette.gif": _encode(palette, "GIF"),
        "grey.gif": _encode(picture, "GIF"),
        "lossy.webp": _encode(rgb, "WEBP"),
        "lossless.webp": _encode(rgba, "WEBP", lossless=True),
        "grey.tif": _encode(picture, "TIFF"),
        "grey16.tif": _encode(Image.fromarray(grey16), "TIFF"),
        "int32.tif": _encode(Image.fromarray(grey16.astype(np.int32)), "TIFF"),
        "float.tif": _encode(Image.fromarray(grey16.astype(np.float32) / 7e4), "TIFF"),
        "big_endian.tif": _big_endian(grey16),
        "rgb_lzw.tif": _encode(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tif": _encode(picture, "TIFF", compression="tiff_deflate"),
        "jpeg.tif": _encode(rgb, "TIFF", compression="jpeg"),
        "bilevel.tif": _encode(picture.convert("1"), "TIFF", compression="group4"),
        "palette.tif": _encode(palette, "TIFF"),
        "cmyk.tif": _encode(rgb.convert("CMYK"), "TIFF"),
    }
    stored = grey16.astype("<u2").tobytes()
    compressed = {
        uid.JPEG2000Lossless: (_encode(Image.fromarray(grey16), "JPEG2000", no_jp2=True), 16),
        uid.JPEGBaseline8Bit: (files["grey.jpg"], 8),
        uid.JPEGLosslessSV1: (files["grey.jpg"], 8),
    }
    window = {
        "WindowCenter": 20000,
        "WindowWidth": 30000,
        "RescaleSlope": 2,
        "RescaleIntercept": -9,
    }
    files |= {
        "explicit.dcm": _dicom(stored, uid.ExplicitVRLittleEndian, **window),
        "implicit.dcm": _dicom(stored, uid.ImplicitVRLittleEndian, PixelRepresentation=1),
        "deflated.dcm": _dicom(stored, uid.DeflatedExplicitVRLittleEndian),
        "big_endian.dcm": _dicom(grey16.astype(">u2").tobytes(), uid.ExplicitVRBigEndian),
        "rgb.dcm": _dicom(np.asarray(rgb).tobytes(), uid.ExplicitVRLittleEndian, 8, samples=3),
        "voi_lut.dcm": _dicom(stored, uid.ExplicitVRLittleEndian, VOILUTSequence=[_lut_item()]),
        "modality_lut.dcm": _dicom(
            stored, uid.ExplicitVRLittleEndian, ModalityLUTSequence=[_lut_item()]
        ),
    }
    for syntax, (stream, bits) in compressed.items():
        files[f"{syntax.keyword}.dcm"] = _dicom(encapsulate([stream]), syntax, bits)
    files["padding.dcm"] = _dicom(
        stored, uid.ExplicitVRLittleEndian, PixelPaddingValue=0, PixelPaddingRangeLimit=900
    )
    files["headerless.dcm"] = files["explicit.dcm"][132 + _meta_length(files["explicit.dcm"]) :]
    return files


def _encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _png_of_16_bits(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG of values [H x W x C], which Pillow cannot write."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + kind + part
        content += struct.pack(">I", zlib.crc32(kind + part))
    return content


def _big_endian(grey16: np.ndarray) -> bytes:
    """A TIFF in the other order of bytes."""
    return _encode(Image.frombytes("I;16B", grey16.T.shape, grey16.astype(">u2").tobytes()), "TIFF")


def _dicom(
    stored: bytes, syntax: uid.UID, bits: int = 16, samples: int = 1, **elements: object
) -> bytes:
    """A DICOM file of 40 x 56 pixels with this pixel data and these further elements."""
    dataset = Dataset()
    dataset.SOPClassUID = uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 40, 56, samples
    dataset.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME1"
    if samples == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    for key, value in elements.items():
        setattr(dataset, key, value)
    dataset.PixelData = stored
    dataset["PixelData"].VR = "OB" if syntax.is_encapsulated or bits == 8 else "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    stream = io.BytesIO()
    dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def _lut_item() -> Dataset:
    """A linear lookup table from 8 to 16 bits."""
    item = Dataset()
    item.LUTDescriptor = [256, 0, 16]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = list(range(0, 65536, 256))
    item["LUTData"].VR = "US"
    item.ModalityLUTType = "US"
    return item


def _meta_length(content: bytes) -> int:
    """Length in bytes of the file meta information that follows the preamble and DICM."""
    return 12 + int.from_bytes(content[140:144], "little")
