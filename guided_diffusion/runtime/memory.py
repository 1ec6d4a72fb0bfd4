"""The memory of this process: keeping what is freed, measuring what was used."""

import contextlib
import ctypes
import os
import sys

# parameters of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# bytes; the largest that glibc accepts
KEPT_BELOW = 32 << 20
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let the C library reuse freed memory instead of returning it to the system.

    On a CPU, every step frees and allocates the same large tensors. By default glibc returns them
    to the system, and getting them back costs one page fault per 4 KiB: a seventh of the time of a
    training step. Larger tensors than KEPT_BELOW go back all the same. No effect with other C
    libraries, or if MALLOC_ variables or GLIBC_TUNABLES are set.

    :return: whether it took effect.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    done = mallopt(_M_MMAP_THRESHOLD, KEPT_BELOW)
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER) and done)


def peak_of_process() -> int:
    """The most bytes of memory that this process has held until now; 0 where that is unknown."""
    # getrusage would include the peak of the process that started this one
    return _status("VmHWM") or _largest_resident()


def held_by_process() -> int:
    """Bytes of memory that this process holds; where that is unknown, the most until now."""
    return _status("VmRSS") or _largest_resident()


def _status(name: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _largest_resident() -> int:
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def private_bytes(process: int) -> int:
    """Bytes of memory that a process does not share with others; 0 where that is unknown.

    :param process: its number.
    """
    with contextlib.suppress(OSError), open(f"/proc/{process}/smaps_rollup") as file:
        lines = [line.split() for line in file]
        return 1024 * sum(int(words[1]) for words in lines if words[0].startswith("Private_"))
    return 0
