"""A DICOM file as a data set of pydicom, whatever its header lacks, and the numbers in it."""

import io
import math
import re
import zlib
from typing import Any

import pydicom
from pydicom import uid
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset, read_preamble
from pydicom.filewriter import write_file_meta_info
from pydicom.multival import MultiValue
from pydicom.valuerep import VR

from guided_diffusion.images.decoded import Undecodable
from guided_diffusion.images.dicom_prefix import MAGIC, MAGIC_OFFSET, is_dicom

_VRS = b"(?:" + b"|".join(sorted(str(vr).encode() for vr in VR if len(str(vr)) == 2)) + b")"


def _first_element(groups: bytes) -> dict[uid.UID, re.Pattern[bytes]]:
    """What the first element of these groups looks like in each encoding."""
    return {
        uid.ExplicitVRLittleEndian: re.compile(groups + rb"\x00.." + _VRS, re.DOTALL),
        uid.ExplicitVRBigEndian: re.compile(rb"\x00" + groups + b".." + _VRS, re.DOTALL),
        uid.ImplicitVRLittleEndian: re.compile(groups + rb"\x00...\x00\x00\x00", re.DOTALL),
    }


# Files without a header begin with group 0008, sometimes after a few stray bytes.
_STRAY_BYTES = 512
_HEADERLESS = _first_element(rb"\x08")
# After a header any group may come first that describes patient, study or image.
_BODY = _first_element(rb"[\x04-\x28]")

EXPORT_AGAIN = "export it again, as uncompressed DICOM (Explicit VR Little Endian) or as PNG"


def parse(content: bytes, max_pixels: int) -> pydicom.Dataset:
    """The data set in a file, with a transfer syntax even where the file names none.

    :raises Undecodable: or an error of pydicom, if it is not DICOM or damaged.
    """
    if not is_dicom(content) and not content.startswith(b"\x02\x00"):
        content = _find_headerless(content)
    stream = io.BytesIO(content)
    read_preamble(stream, force=True)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    named, body = str(meta.get("TransferSyntaxUID") or "").strip(), content[stream.tell() :]
    syntax = _transfer_syntax(named, body, max_pixels)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        body, syntax = _inflate(body, max_pixels), uid.ExplicitVRLittleEndian
    if syntax != named:
        content = _with_header(syntax, body)
    return pydicom.dcmread(io.BytesIO(content), force=True)


def _transfer_syntax(named: str, body: bytes, max_pixels: int) -> uid.UID:
    """The encoding that the header names; what the data look like if it names none or another."""
    if named and named not in uid.AllTransferSyntaxes:
        shown = repr(named)[:60]
        raise Undecodable(f"its transfer syntax {shown} is unknown or private; {EXPORT_AGAIN}")
    looks = _looks_like(body)
    if named:
        native = not uid.UID(named).is_compressed or named == uid.DeflatedExplicitVRLittleEndian
        return looks if native and looks else uid.UID(named)
    if looks is None and _looks_like(_inflate(body, max_pixels)):
        return uid.DeflatedExplicitVRLittleEndian
    if looks is None:
        raise _no_syntax()
    return looks


def _looks_like(body: bytes) -> uid.UID | None:
    return next((syntax for syntax, rule in _BODY.items() if rule.match(body)), None)


def _no_syntax() -> Undecodable:
    return Undecodable(
        "its header names no transfer syntax (0002,0010), and it cannot be inferred from the data; "
        + EXPORT_AGAIN
    )


def _inflate(body: bytes, max_pixels: int) -> bytes:
    """Inflate within a limit: a few kilobytes can hold gigabytes."""
    limit = 64 * 2**20 + 8 * max_pixels
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(body, limit)
    except zlib.error as error:
        raise Undecodable(f"its compressed part is damaged; {EXPORT_AGAIN}") from error
    if len(inflated) == limit:
        raise Undecodable(f"its compressed part is larger than any radiograph; {EXPORT_AGAIN}")
    return inflated


def _find_headerless(content: bytes) -> bytes:
    """Prepend the missing header, with the transfer syntax that the first element looks like."""
    head = content[:_STRAY_BYTES]
    found = [(m.start(), s) for s, rule in _HEADERLESS.items() if (m := rule.search(head))]
    if not found:
        raise Undecodable("it is neither an image nor DICOM; remove it, or export it again")
    start, syntax = min(found, key=lambda pair: pair[0])
    return _with_header(syntax, content[start:])


def _with_header(syntax: uid.UID, body: bytes) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    header = DicomBytesIO()
    write_file_meta_info(header, meta, enforce_standard=False)
    return bytes(MAGIC_OFFSET) + MAGIC + header.getvalue() + body


def value_of(dataset: pydicom.Dataset, key: str) -> Any:
    """The value of an element, None if it is absent or empty.

    :raises Undecodable: if it is not what its type demands.
    """
    try:
        value = dataset.get(key)
    except Exception as error:  # values are converted on access, and conversion raises anything
        raise Undecodable(f"its {key} is invalid; correct it, or {EXPORT_AGAIN}") from error
    empty = value is None or (isinstance(value, str | bytes | MultiValue) and len(value) == 0)
    return None if empty else value


def numbers(dataset: pydicom.Dataset, key: str) -> list[float]:
    """The finite numbers of an element; [] if it is absent."""
    value = value_of(dataset, key)
    values = list(value) if isinstance(value, list | MultiValue) else [value]
    try:
        found = [] if value is None else [float(v) for v in values]
    except (TypeError, ValueError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise Undecodable(f"its {key} is {_short(value)}, not a number; correct it")
    return found


def number(dataset: pydicom.Dataset, key: str, default: float) -> float:
    """A value as a number; the first if there are several."""
    found = numbers(dataset, key)
    return found[0] if found else default


def whole(dataset: pydicom.Dataset, key: str, allowed: range, default: int | None = None) -> int:
    """A value as a whole number within a range.

    :raises Undecodable: if it is absent and has no default, or outside.
    """
    value = value_of(dataset, key)
    if value is None and default is not None:
        return default
    if value is None:
        raise Undecodable(f"its {key} is missing; add it, or {EXPORT_AGAIN}")
    try:
        found = int(value) if float(value) == int(value) else None
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None or found not in allowed:
        raise Undecodable(
            f"its {key} is {_short(value)}, but must be a whole number from {allowed[0]} to"
            f" {allowed[-1]}; correct it"
        )
    return found


def _short(value: Any) -> str:
    text = " ".join(str(value).split()) or repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
