"""Files that are written completely or not at all; text files as people's programs write them."""

import codecs
import contextlib
import csv
import errno
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import IO, Any

from guided_diffusion.runtime.errors import UserError, system_error, write_error
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.runtime.text import encode

# longer names, in bytes, leave too little room for the rest of a temporary file's name
_LONG_NAME = 200
_TRIAL_BYTES = 4096
# byte order marks; that of UTF-32 begins like that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_local(path: str) -> bool:
    """Whether a path is on a file system of this machine, not in the cloud."""
    return "://" not in path


def expand_path(path: str) -> str:
    """A path with `~` and `$VARIABLE` replaced, as shells do, unless a file is named like that."""
    if not is_local(path) or os.path.lexists(path):
        return path
    return os.path.expandvars(os.path.expanduser(path))


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that appears at `path` only once it is complete and on disk.

    :raises UserError: if it cannot be written, or if another process has taken over this one's run
        folder; the previous file at `path` is then still there.
    """
    if not is_local(path):
        import blobfile as bf  # slow to import, and parsing flags does not need it

        run_lock.check_held()
        with bf.BlobFile(path, "wb") as file:  # a cloud object appears when it is closed
            write(file)
        return
    folder, name = os.path.split(os.path.abspath(path))
    if len(os.fsencode(name)) > _LONG_NAME:
        name = f"{zlib.crc32(os.fsencode(name)):08x}"
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            os.makedirs(folder, exist_ok=True)
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            run_lock.check_held()
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
    _sync_folder(folder)


def copy_file(source: str, target: str) -> None:
    """Copy the content of a local or a cloud file, atomically, making the folders that it needs."""
    import blobfile as bf

    with open(source, "rb") if is_local(source) else bf.BlobFile(source, "rb") as file:
        write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))


def remove_file(path: str) -> None:
    """Remove a local file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """While writing to `path`: what the system refuses becomes a UserError that names it."""
    try:
        yield
    except Exception as error:
        cause = None if isinstance(error, UserError) else system_error(error)
        if cause is None:
            raise
        raise write_error(path, cause) from error


def check_output(path: str, folder: bool = False) -> None:
    """Refuse a place where nothing can be written, before the work whose result belongs there.

    A trial goes to a nameless file in the nearest folder that exists; nothing is left behind.

    :param folder: whether `path` is to be a folder rather than a file.
    :raises UserError: if something is in the way, or the trial fails.
    """
    if not is_local(path):
        return
    with writing(path):
        place = os.path.abspath(path)
        if os.path.exists(place) and os.path.isdir(place) != folder:
            raise OSError(errno.ENOTDIR if folder else errno.EISDIR, "")
        if not folder and os.path.exists(place) and not os.path.isfile(place):
            raise UserError(f"cannot write {path}: it is not a regular file; name another")
        base, missing = (place, []) if folder else (os.path.dirname(place), [place])
        while not os.path.isdir(base):
            if os.path.lexists(base):
                raise OSError(errno.ENOTDIR, "")
            missing.append(base)
            base = os.path.dirname(base)
        for name in map(os.path.basename, missing):  # too long a name is found here
            with contextlib.suppress(FileNotFoundError):
                os.lstat(os.path.join(base, name))
        with tempfile.TemporaryFile(dir=base) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())


def check_outputs(paths: Collection[str]) -> None:
    """Refuse files of which one cannot be written; see `check_output`."""
    for folder in sorted({os.path.dirname(path) for path in paths}):
        check_output(folder or ".", folder=True)
    for path in filter(os.path.isdir, paths):
        raise write_error(path, OSError(errno.EISDIR, ""))


def _sync_folder(folder: str) -> None:
    """Make renames in `folder` survive a power failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # unsupported by some network file systems
        pass
    finally:
        os.close(descriptor)


def save_json(path: str, value: Any) -> None:
    """Save plain values as JSON, atomically. Names that are no UTF-8 read back as they were."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: str, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table, atomically."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomically(path, lambda file: file.write(encode(text.getvalue())))


def read_text(path: str, what: str = "") -> str:
    """A text file, in UTF-8 or UTF-16.

    :param what: what it is, for messages.
    :raises UserError: if it cannot be read, or is in another encoding, which bytes do not tell:
        ü of one code page is a different letter of another.
    """
    import blobfile as bf

    try:
        with bf.BlobFile(path, "rb") as file:
            raw = file.read()
    except (OSError, bf.Error) as error:
        reason = getattr(error, "strerror", None) or "no such file"
        raise UserError(f"cannot read {what} {path}: {reason}".replace("  ", " ")) from error
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "")
    if not encoding and b"\0" in raw[:4]:  # UTF-16 without a mark, as some programs write it
        encoding = "utf-16-be" if raw[:1] == b"\0" else "utf-16-le"
    try:
        text = raw.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding:
            raise UserError(
                f"{path} is a damaged text file in {encoding.upper()}: save it as UTF-8"
            ) from error
        line = raw[: error.start].count(b"\n") + 1
        shown = raw.splitlines()[line - 1].decode("cp1252", "replace")[:60].strip()
        raise UserError(
            f"{path} line {line} is not text in UTF-8 (byte {raw[error.start]:#x}); if it should"
            f" read {shown!r}, the encoding is Windows-1252 or Latin-1: save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is not a text file")
    return text


def read_table(path: str, what: str = "") -> list[list[str]]:
    """The rows of a CSV file, without blank lines, with spaces around the cells removed.

    Cells are separated by whichever of comma, semicolon and tab divides the most rows: programs
    choose it by the country.

    :raises UserError: if it is not such a file; see `read_text`.
    """
    text = read_text(path, what)
    tables: list[list[list[str]]] = []
    faults: list[str] = []
    for separator in ",;\t":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        try:
            rows = [[cell.strip() for cell in row] for row in reader]
        except csv.Error as error:
            faults.append(f"{path} line {reader.line_num} is not CSV: {error}")
            continue
        tables.append([row for row in rows if any(row)])
    best = max(tables, key=_divided, default=[])
    if faults and not _divided(best):
        raise UserError(faults[0])
    return best


def _divided(rows: list[list[str]]) -> int:
    return sum(len(row) > 1 for row in rows)


def read_json(path: str, what: str = "") -> Any:
    """The content of a JSON file.

    :raises UserError: if it is not valid JSON; see `read_text`.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not valid JSON ({where}: {error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_sections(path: str, *required: str) -> dict[str, Any]:
    """Read a JSON file of values by name.

    :param required: names that must be there and hold values by name in turn.
    :raises UserError: if it is another file.
    """
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds no sections by name: this package did not write it")
    for name in required:
        if not isinstance(stored.get(name), dict):
            raise UserError(f"{path} lacks a section {name!r}: this package did not write it")
    return stored
