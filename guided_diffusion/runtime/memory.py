"""Keep freed memory in the process."""

import ctypes
import os

# parameters of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; the largest that glibc accepts
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let the C library reuse freed memory instead of returning it to the system.

    On a CPU, every step frees and allocates the same large tensors. By default glibc returns them
    to the system, and getting them back costs one page fault per 4 KiB: a seventh of the time of a
    training step. No effect with other C libraries, or if MALLOC_ variables or GLIBC_TUNABLES are
    set.

    :return: whether it took effect.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    done = mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER) and done)
