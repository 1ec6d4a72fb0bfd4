"""Files written whole or not at all: text, JSON, CSV."""

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import blobfile as bf

from guided_diffusion.runtime.errors import UserError


def is_local(path: str) -> bool:
    """Whether a path is of this machine's file systems, not of a cloud."""
    return "://" not in path


def write_atomically(path: str, write: Callable[[io.IOBase], None]) -> None:
    """Let `write` fill a file that appears under `path` only when complete and on the disk.

    :raises UserError: if the disk is full; what was at `path` before is still there.
    """
    if not is_local(path):
        with bf.BlobFile(path, "wb") as file:  # a cloud object appears when it is closed
            write(file)
        return
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if _disk_full(error):
            raise UserError(
                f"no space left to write {path}: free some and run the same command again;"
                " older checkpoints are intact"
            ) from error
        raise
    _sync_folder(folder)


def _disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a quota, is behind an error: torch wraps what its file raises."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync_folder(folder: str) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)


def save_json(path: str, value: Any) -> None:
    """Save plain values as JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: str, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table, atomically."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_json(path: str) -> Any:
    """Read what `save_json` wrote.

    :raises UserError: if it is not JSON.
    """
    try:
        with bf.BlobFile(path, "r") as file:
            return json.load(file)
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
