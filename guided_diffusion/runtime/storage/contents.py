"""What files hold, whatever their names, places and times: by this a run knows its data again."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import blobfile as bf

from guided_diffusion.runtime.storage import packed
from guided_diffusion.runtime.storage.files import is_local

# by part of a run's data: the hash of each file, or of both files of a pair, by name
Files = dict[str, dict[str, str]]

_MOST_NAMES = 3
_MOST_CHARACTERS = 60
_BYTES = 16  # of a digest
_CHUNK = 1 << 22
_BLOCK = 1 << 12
_SAMPLES = 4  # blocks of a large file that `summary` reads


def digest(path: str) -> str:
    """A hash of a file's whole content, or of a packed network's weights, hexadecimal."""
    found = hashlib.blake2b(digest_size=_BYTES)
    with bf.BlobFile(packed.weights_file(path), "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def digests(paths: Sequence[str]) -> list[str]:
    """`digest` of every file."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(digest, paths))


def combined(found: Sequence[str]) -> str:
    """One hash of several, in whatever order."""
    return hashlib.blake2b("\n".join(sorted(found)).encode(), digest_size=_BYTES).hexdigest()


def summary(groups: Sequence[Sequence[str]], labels: Sequence[int] = ()) -> str:
    """A hash of many groups of files: of each file its size and 4 blocks of 4 KiB, or all of it.

    A change that keeps the size of a file and these blocks is overlooked, but hundreds of thousands
    of files take minutes rather than hours. Of files in the cloud only name and size count.
    """
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda group: " ".join(map(_sample, group)), groups))
    marks = [f" {label}" for label in labels] or [""] * len(found)
    return combined([text + mark for text, mark in zip(found, marks)])


def _sample(path: str) -> str:
    if not is_local(path):
        return f"{bf.basename(path)} {bf.stat(path).size}"
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.blake2b(str(size).encode(), digest_size=_BYTES)
            if size <= _SAMPLES * _BLOCK:
                found.update(file.read())
            else:
                for number in range(_SAMPLES):
                    file.seek(number * (size - _BLOCK) // (_SAMPLES - 1))
                    found.update(file.read(_BLOCK))
    except OSError:  # such as a broken link, which the run may skip
        return "unreadable"
    return found.hexdigest()


def changes(name: str, before: Any, now: Any) -> list[str]:
    """How a plain value has changed, in words; [] if it has not."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [key for key in now if key in before]
        return [text for key in names for text in changes(f"{name}.{key}", before[key], now[key])]
    if before == now or (isinstance(now, tuple) and before == list(now)):
        return []
    shown = [repr(value)[:_MOST_CHARACTERS] for value in (now, before)]
    if shown[0] == shown[1]:
        return [f"another {name}"]
    return [f"{name} {shown[0]} instead of {shown[1]}"]


def changed_files(before: Files, now: Files) -> list[str]:
    """Which contents have changed, in words, by the names they have now; [] if none have."""
    found = []
    for part in sorted(before.keys() | now.keys()):
        old, new = before.get(part, {}), now.get(part, {})
        added = list((Counter(new.values()) - Counter(old.values())).elements())
        removed = list((Counter(old.values()) - Counter(new.values())).elements())
        changed = [n for n in new if n in old and new[n] != old[n] and new[n] in added]
        more = [n for n in new if n not in old and new[n] in added]
        fewer = [n for n in old if n not in new and old[n] in removed]
        kinds = (("changed", changed), ("new", more), ("gone", fewer))
        texts = [f"{_listing(part, names, old, new)} {kind}" for kind, names in kinds if names]
        if added or removed:
            found += texts or [f"{part} changed"]
    return found


def _listing(part: str, names: list[str], old: dict[str, str], new: dict[str, str]) -> str:
    """Names of files, with what of them has changed."""
    shown = [
        f"{_half(old.get(name, ''), new.get(name, ''))}{os.path.basename(name)}" for name in names
    ]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{part}: {', '.join(shown[:_MOST_NAMES])}{more}"


def _half(old: str, new: str) -> str:
    """Which file of a pair has changed, if only one has."""
    before, now = old.split(), new.split()
    if len(before) != 2 or len(now) != 2 or (before[0] != now[0] and before[1] != now[1]):
        return ""
    return "mask of " if before[0] == now[0] else "image "
