"""Freed memory stays with the process."""

import ctypes
import os

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc allows
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let the C library reuse freed memory instead of giving it back to the system.

    On a CPU every step frees and asks for the same large tensors. By default glibc returns them to
    the system, and getting them back costs a page fault for each 4 KiB: a seventh of the time of a
    training step. Without effect on another C library, and where the user has set MALLOC_
    variables or GLIBC_TUNABLES.

    :return: whether it was done.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    done = mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER) and done)
