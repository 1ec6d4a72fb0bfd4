"""Reading DICOM files with pydicom. Errors are ValueErrors that do not name the file."""

import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom import pixels, uid
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset, read_preamble
from pydicom.filewriter import write_file_meta_info
from pydicom.valuerep import VR

Window = Callable[[np.ndarray], np.ndarray]

_MAGIC, _MAGIC_OFFSET = b"DICM", 128
HEAD_BYTES = _MAGIC_OFFSET + len(_MAGIC)
"""How much of the beginning of a file `is_dicom` needs."""
_PIXEL_KEYS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

# Files without a header begin with group 0008, sometimes after a few stray bytes.
_STRAY_BYTES = 512
_VRS = b"|".join(sorted(str(vr).encode() for vr in VR if len(str(vr)) == 2))
_FIRST_ELEMENT = {
    uid.ExplicitVRLittleEndian: re.compile(rb"\x08\x00..(?:" + _VRS + rb")", re.DOTALL),
    uid.ExplicitVRBigEndian: re.compile(rb"\x00\x08..(?:" + _VRS + rb")", re.DOTALL),
    uid.ImplicitVRLittleEndian: re.compile(rb"\x08\x00...\x00\x00\x00", re.DOTALL),
}
_INSTALL_DECODERS = "install more decoders: pip install '.[dicom]' in the checkout"


@dataclass
class DecodedImage:
    """The pixels of any file format, before an intensity rule is applied.

    values    [H x W] or [H x W x 3], rescaled (DICOM: slope and intercept, or modality table)
    limits    smallest and largest value that the stored bits can hold, rescaled likewise; None for
              floats, which have none
    inverted  whether the smallest value is white
    window    maps values to [0, 1] by the file's own table or window; None if it has neither
    """

    values: np.ndarray
    limits: tuple[float, float] | None
    inverted: bool = False
    window: Window | None = None


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with `head` (HEAD_BYTES or more) has the DICOM prefix."""
    return head[_MAGIC_OFFSET:HEAD_BYTES] == _MAGIC


def read_dicom(content: bytes, max_pixels: int) -> DecodedImage:
    """Decode the image of a DICOM file.

    :raises ValueError: or an error of pydicom, if it holds no image, several, or a damaged one.
    """
    dataset = _parse(content, max_pixels)
    stored = _stored(dataset, max_pixels)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colours = pixels.apply_color_lut(stored, dataset)
        return DecodedImage(colours, (0.0, float(np.iinfo(colours.dtype).max)))
    limits = _stored_limits(dataset, stored)
    if stored.ndim == 3:
        return DecodedImage(stored, limits)
    values, limits = _modality_values(dataset, stored, limits)
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    return DecodedImage(values, limits, inverted, _own_window(dataset))


def read_dicom_stored(content: bytes, max_pixels: int) -> np.ndarray:
    """The stored values [H x W] or [H x W x 3] as they are, for index masks."""
    return _stored(_parse(content, max_pixels), max_pixels)


def read_dicom_spacing(content: bytes, max_pixels: int) -> tuple[float, float] | None:
    """Millimetres between (rows, columns): PixelSpacing, else ImagerPixelSpacing, else None."""
    dataset = _parse(content, max_pixels)
    for key in ("PixelSpacing", "ImagerPixelSpacing"):
        spacing = dataset.get(key)
        if spacing and len(spacing) == 2 and min(map(float, spacing)) > 0:
            return float(spacing[0]), float(spacing[1])
    return None


def linear_window(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """Map values to [0, 1] by the function LINEAR of DICOM PS3.3 C.11.2.1.2.1."""
    if width <= 1:
        return (values > center - 0.5).astype(np.float32)
    scaled = (values - (center - 0.5)) / (width - 1) + 0.5
    return scaled.clip(0.0, 1.0).astype(np.float32)


def _parse(content: bytes, max_pixels: int) -> pydicom.Dataset:
    group_2_first = content.startswith((b"\x02\x00", b"\x00\x02"))
    if not is_dicom(content) and not group_2_first:
        content = _find_headerless(content)
    stream = io.BytesIO(content)
    read_preamble(stream, force=True)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        # inflated here, within a limit: a few kilobytes can hold gigabytes
        limit = 64 * 2**20 + 8 * max_pixels
        body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[stream.tell() :], limit)
        if len(body) == limit:
            raise ValueError("its compressed part is larger than any radiograph")
        content = _with_header(uid.ExplicitVRLittleEndian, body)
    return pydicom.dcmread(io.BytesIO(content), force=True)


def _find_headerless(content: bytes) -> bytes:
    """Prepend the missing header, with the transfer syntax that the first element looks like."""
    head = content[:_STRAY_BYTES]
    found = [(m.start(), s) for s, rule in _FIRST_ELEMENT.items() if (m := rule.search(head))]
    if not found:
        raise ValueError("it is neither an image nor DICOM")
    start, syntax = min(found, key=lambda pair: pair[0])
    return _with_header(syntax, content[start:])


def _with_header(syntax: uid.UID, body: bytes) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    header = DicomBytesIO()
    write_file_meta_info(header, meta, enforce_standard=False)
    return bytes(_MAGIC_OFFSET) + _MAGIC + header.getvalue() + body


def _stored(dataset: pydicom.Dataset, max_pixels: int) -> np.ndarray:
    """Decoded values before rescaling, [H x W] or [H x W x 3]."""
    if not any(key in dataset for key in _PIXEL_KEYS):
        modality = dataset.get("Modality")
        what = f" (modality {modality})" if modality else ""
        raise ValueError(f"it is DICOM without an image{what}")
    frames = dataset.get("NumberOfFrames") or 1
    if not str(frames).isdecimal():
        raise ValueError(f"its NumberOfFrames is {str(frames)!r}, not a number")
    if int(frames) != 1:
        raise ValueError(f"it holds {int(frames)} frames; save the wanted one as a file of its own")
    if int(dataset.Rows) * int(dataset.Columns) > max_pixels:
        raise ValueError(
            f"it claims {dataset.Rows} x {dataset.Columns} pixels; {max_pixels} is the limit"
        )
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not pixels.get_decoder(syntax).is_available:
        raise ValueError(f"it is compressed as {syntax.name}; {_INSTALL_DECODERS}")
    try:
        stored = pixels.pixel_array(dataset)
    except RuntimeError as error:
        if not syntax.is_encapsulated:
            raise
        raise ValueError(
            f"its {syntax.name} data could not be decoded: it is damaged, or of a kind for which "
            f"to {_INSTALL_DECODERS}"
        ) from error
    if stored.ndim not in (2, 3) or (stored.ndim == 3 and stored.shape[2] != 3):
        raise ValueError(f"its pixels have the shape {stored.shape}, which is not an image")
    return stored


def _stored_limits(dataset: pydicom.Dataset, stored: np.ndarray) -> tuple[float, float] | None:
    """The smallest and largest value that BitsStored allows; None for floats."""
    if stored.dtype.kind == "f":
        return None
    for bits in (int(dataset.BitsStored), 8 * stored.dtype.itemsize):
        half = 2.0 ** (bits - 1)
        low, high = (-half, half - 1) if stored.dtype.kind == "i" else (0.0, 2 * half - 1)
        # some files hold larger values than they declare; these must not be clipped
        if stored.size == 0 or (low <= stored.min() and stored.max() <= high):
            break
    return low, high


def _modality_values(
    dataset: pydicom.Dataset, stored: np.ndarray, limits: tuple[float, float] | None
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Values after the modality table or rescaling (PS3.3 C.11.1), and their limits likewise."""
    if "ModalityLUTSequence" in dataset:
        values, top = _look_up(dataset, "ModalityLUTSequence", stored)
        return values, (0.0, top)
    slope = _number(dataset, "RescaleSlope", 1.0)
    intercept = _number(dataset, "RescaleIntercept", 0.0)
    if slope == 1.0 and intercept == 0.0:
        return stored, limits
    if limits is not None:
        low, high = sorted(limit * slope + intercept for limit in limits)
        limits = low, high
    return stored * np.float64(slope) + intercept, limits


def _own_window(dataset: pydicom.Dataset) -> Window | None:
    """The file's own mapping to grey levels: its table, else its first window (PS3.3 C.11.2)."""
    if dataset.get("VOILUTSequence"):

        def table_window(values: np.ndarray) -> np.ndarray:
            looked_up, top = _look_up(dataset, "VOILUTSequence", values)
            return (looked_up / top).clip(0.0, 1.0).astype(np.float32)

        return table_window
    if dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        return None
    center, width = _number(dataset, "WindowCenter", 0.0), _number(dataset, "WindowWidth", 0.0)
    function = dataset.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID" and width > 0:
        return lambda values: (1 / (1 + np.exp(-4 * (values - center) / width))).astype(np.float32)
    if function == "LINEAR_EXACT" and width > 0:
        return lambda v: ((v - center) / width + 0.5).clip(0.0, 1.0).astype(np.float32)
    return lambda values: linear_window(values, center, width)


def _look_up(
    dataset: pydicom.Dataset, sequence: str, values: np.ndarray
) -> tuple[np.ndarray, float]:
    """Map values by the first table of a sequence.

    Values below the range of the table take its first entry, values above it the last (PS3.3 C.11.1
    and C.11.2). pydicom's apply_modality_lut and apply_voi fail for some depths of entries, wrap
    indices above 255 if entries have 8 bits, and do not recognise a negative first value that was
    written as unsigned.

    :return: the mapped values, float64, and the largest that the bits of an entry can hold.
    """
    item = dataset[sequence].value[0]
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    table = item.LUTData
    if isinstance(table, bytes):  # entries of one byte each, else words
        order = ">" if dataset.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian else "<"
        table = np.frombuffer(table, np.uint8 if len(table) == entries else f"{order}u2")
    table = np.atleast_1d(np.asarray(table, dtype=np.float64))[: entries or 2**16]
    if first >= 2**15 and values.min() < 0:  # a negative number, written as unsigned
        first -= 2**16
    places = np.rint(values).astype(np.int64) - first
    return table[places.clip(0, len(table) - 1)], max(2.0**bits - 1, table.max())


def _number(dataset: pydicom.Dataset, key: str, default: float) -> float:
    """A value as a number; the first if there are several."""
    value = dataset.get(key)
    if isinstance(value, list | pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    number = default if value is None or value == "" else float(value)
    if not np.isfinite(number):
        raise ValueError(f"its {key} is {number}")
    return number
