"""Sizes and checksums of files, by which a complete one is known."""

import zlib
from typing import TypedDict


class Fingerprint(TypedDict):
    """Size in bytes and CRC-32 of a file."""

    size: int
    crc: int


def file_fingerprint(path: str) -> Fingerprint:
    """Size and CRC-32 of a file."""
    import blobfile as bf  # slow to import, and parsing flags does not need it

    size = crc = 0
    with bf.BlobFile(path, "rb") as file:
        while chunk := file.read(1 << 22):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return {"size": size, "crc": crc}
