"""Whether a file of an image is complete, by what stands at its end: fast, without decoding it."""

import os
import struct
from typing import BinaryIO

from PIL import Image, TiffImagePlugin

# the last bytes of a complete file, by format
_ENDS = {"PNG": b"IEND\xae\x42\x60\x82", "JPEG": b"\xff\xd9", "GIF": b";"}
_SEQUENCE_END = b"\xfe\xff\xdd\xe0\0\0\0\0"
# offsets and sizes of the strips or tiles of a TIFF file
_TIFF_PARTS = ((273, 279), (324, 325))


def is_complete(file: BinaryIO, picture: Image.Image | None, max_pixels: int) -> bool:
    """Whether a file surely holds one whole image of a size that is read.

    :param picture: opened from the file, not decoded; None for DICOM.
    :return: False also where the file does not tell: it may have something behind its image.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if picture is None:
        return _dicom_is_complete(file, size)
    if getattr(picture, "n_frames", 1) != 1 or picture.width * picture.height > max_pixels:
        return False
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return _tiff_is_complete(picture, size)
    if picture.format in ("WEBP", "BMP"):  # they state their size
        place, beyond = {"WEBP": (4, 8), "BMP": (2, 0)}[picture.format]
        file.seek(place)
        stated = struct.unpack("<I", file.read(4))[0] + beyond
        return 32 < stated <= size
    end = _ENDS.get(picture.format or "")
    if end is None:
        return False
    file.seek(max(0, size - len(end)))
    return file.read() == end


def _tiff_is_complete(picture: TiffImagePlugin.TiffImageFile, size: int) -> bool:
    tags = picture.tag_v2
    for offsets, sizes in _TIFF_PARTS:
        if tags.get(offsets) and len(tags[offsets]) == len(tags.get(sizes, ())):
            return all(o + s <= size for o, s in zip(tags[offsets], tags[sizes]))
    return False


def _dicom_is_complete(file: BinaryIO, size: int) -> bool:
    import pydicom
    from pydicom import pixels

    tags = ["Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "NumberOfFrames"]
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        begin = file.tell()
        if file.read(4) != b"\xe0\x7f\x10\x00":
            return False
        if header.get("NumberOfFrames", 1) != 1:
            return False
        syntax = header.file_meta.TransferSyntaxUID
        if syntax.is_compressed:
            if not pixels.get_decoder(syntax).is_available:
                return False
            file.seek(size - len(_SEQUENCE_END))
            return file.read() == _SEQUENCE_END
        count = header.Rows * header.Columns * header.SamplesPerPixel
        needed = count * header.BitsAllocated // 8
    except Exception:  # whatever is wrong, decoding says it
        return False
    return 0 < needed <= size - begin - 8
