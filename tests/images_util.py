"""What the tests of images share: small arrays, and files written by hand."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import dcmwrite, uid
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

GREY = (np.arange(6 * 9) * 4).astype(np.uint8).reshape(6, 9)
DEEP = (np.arange(6 * 9) * 1200).astype(np.uint16).reshape(6, 9)
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
MASK = (np.arange(6 * 9) % 7).astype(np.uint8).reshape(6, 9)


def save_picture(folder, name, picture, **options):
    """Save an array or a picture with Pillow; returns the path."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    path = str(folder / name)
    picture.save(path, **options)
    return path


def write_dicom(
    folder, stored, syntax=uid.ExplicitVRLittleEndian, name="file.dcm", stream=None, **elements
):
    """Write a DICOM file of `stored` [H x W] or [H x W x 3]; elements that are None are omitted."""
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
            dataset.pop(key, None)
        elif isinstance(value, DataElement):
            dataset.add(value)
        else:
            setattr(dataset, key, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    path = str(folder / name)
    dcmwrite(path, dataset, enforce_file_format=True)
    return path


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
