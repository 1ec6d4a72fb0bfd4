"""How a DICOM file is recognised, without pydicom, which is slow to import."""

MAGIC, MAGIC_OFFSET = b"DICM", 128
HEAD_BYTES = MAGIC_OFFSET + len(MAGIC)
"""How much of the beginning of a file `is_dicom` needs."""


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with `head` (HEAD_BYTES or more) has the DICOM prefix."""
    return head[MAGIC_OFFSET:HEAD_BYTES] == MAGIC
