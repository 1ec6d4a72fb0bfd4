"""Files that are written completely or not at all: any content, JSON, CSV."""

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any

import blobfile as bf

from guided_diffusion.runtime.errors import UserError


def is_local(path: str) -> bool:
    """Whether a path is on a file system of this machine, not in the cloud."""
    return "://" not in path


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that appears at `path` only once it is complete and on disk.

    :raises UserError: if the disk is full; the previous file at `path` is then still there.
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
                f"no space left to write {path}: free some and rerun the command;"
                " older checkpoints are intact"
            ) from error
        raise
    _sync_folder(folder)


def _disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota caused an error: torch wraps the errors of its files."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync_folder(folder: str) -> None:
    """Make renames in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # unsupported by some network file systems
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

    :raises UserError: if it is not valid JSON.
    """
    try:
        with bf.BlobFile(path, "r") as file:
            return json.load(file)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
