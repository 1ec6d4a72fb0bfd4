"""Decoded images kept in memory, as far as memory allows."""

import contextlib
import math
import os
from collections.abc import Callable

import numpy as np
import torch as th

from guided_diffusion.runtime.errors import UserError

CACHES = ("auto", "ram", "none")

_SHARED_MEMORY = "/dev/shm"
# bytes that are free at least where the system does not tell
_UNKNOWN_MEMORY = 2 << 30
_CONTROL_GROUP = "/sys/fs/cgroup"


class ImageCache:
    """Decoded images in memory that worker processes share, each loaded when first requested."""

    def __init__(self, count: int, shape: tuple[int, ...], shared: bool):
        self.images = th.zeros((count, *shape), dtype=th.uint8)
        self.filled = th.zeros(count, dtype=th.uint8)
        if shared:
            self.images.share_memory_()
            self.filled.share_memory_()

    def get(self, index: int, load: Callable[[int], np.ndarray]) -> np.ndarray:
        """The image with this index, loaded once."""
        kept = self.images[index].numpy()
        if not self.filled[index]:
            kept[...] = load(index)
            self.filled[index] = 1  # last, so that no process sees an incomplete image
        return kept


def make_cache(
    kind: str, count: int, shape: tuple[int, ...], copies: int, shared: bool
) -> ImageCache | None:
    """Reserve memory for `count` uint8 images.

    :param kind: "ram" for a cache, "none" for None, "auto" for a cache if it takes at most a
        quarter of the free memory.
    :param shape: of an image.
    :param copies: caches on this machine, one per rank.
    :param shared: whether worker processes use the cache.
    :raises UserError: if "ram" needs more than the free memory.
    """
    if not fits(kind, count, shape, copies, shared):
        return None
    needed = count * math.prod(shape) * copies
    free, limit = _free_memory(shared)
    if needed > min(free, limit):
        raise UserError(
            f"--cache ram needs {needed / 2**30:.1f} GiB for {count} images and "
            f"{min(free, limit) / 2**30:.1f} GiB are free; use --cache none"
        )
    return ImageCache(count, shape, shared)


def fits(kind: str, count: int, shape: tuple[int, ...], copies: int, shared: bool) -> bool:
    """Whether `make_cache` makes a cache of the same arguments, or tries to.

    :raises UserError: for an unknown `kind`.
    """
    if kind not in CACHES:
        raise UserError(f"cache {kind!r} must be one of {', '.join(CACHES)}")
    if kind != "auto":
        return kind == "ram"
    free, limit = _free_memory(shared)
    return count * math.prod(shape) * copies <= min(free // 4, limit)


def free_memory() -> int:
    """Bytes of memory that this machine, or this container, has free."""
    return _free_memory(shared=False)[0]


def _free_memory(shared: bool) -> tuple[int, int]:
    """Free memory, and how much of it a cache may take, in bytes; containers limit both."""
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            sizes = dict(line.split(":") for line in file)
        free = int(sizes["MemAvailable"].split()[0]) * 1024
    elif hasattr(os, "sysconf"):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    else:  # on Windows
        free = _UNKNOWN_MEMORY
    with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max": no limit
        free = min(free, _control_group("memory.max") - _control_group("memory.current"))
    if shared and os.path.isdir(_SHARED_MEMORY):
        stats = os.statvfs(_SHARED_MEMORY)
        return free, stats.f_bavail * stats.f_frsize
    return free, free


def _control_group(name: str) -> int:
    with open(f"{_CONTROL_GROUP}/{name}") as file:
        return int(file.read())
