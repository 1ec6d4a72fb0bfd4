"""Where the logger writes: the screen, log.txt, progress.csv, progress.json, TensorBoard, wandb.

Files are appended to and never erased; a resumed run continues its own progress.csv.

The folder may be any path that blobfile can write. Cloud objects cannot be appended to, so each log
file is kept in a local temporary folder and uploaded whole by `flush` and `close`, and at most once
a minute after a new row. TensorBoard files go to local folders only.
"""

import csv
import io
import json
import os
import os.path as osp
import shutil
import sys
import tempfile
import threading
import time
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import blobfile as bf

from guided_diffusion.runtime import messages
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import is_local, write_atomically, writing
from guided_diffusion.runtime.text import encode, one_line, visible

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PUSH_INTERVAL_S = 60.0


class Writer:
    """A destination of the log; most are KVWriters, SeqWriters or both.

    on_screen: with --quiet it gets warnings alone.
    """

    on_screen = False

    def flush(self) -> None:
        """Make what was written so far survive a power failure."""

    def close(self) -> None:
        """Finish writing."""


class KVWriter(Writer, ABC):
    """Writes rows of named values."""

    @abstractmethod
    def writekvs(self, kvs: Mapping[str, Any]) -> None: ...


class SeqWriter(Writer, ABC):
    """Writes messages, each a sequence of words."""

    @abstractmethod
    def writeseq(self, seq: Sequence[str]) -> None: ...


class LogFile:
    """A text file that grows line by line, local or in the cloud (see the module's docstring)."""

    def __init__(self, path: str) -> None:
        self.target = path
        self.path = path
        self._folder: str | None = None  # of the local copy of a file in the cloud
        self._dirty = False
        self._pushed_at = time.monotonic()
        if not is_local(path):
            self._folder = tempfile.mkdtemp(prefix="guided_diffusion_log_")
            self.path = osp.join(self._folder, osp.basename(path))
            if bf.exists(path):
                bf.copy(path, self.path)

    def read(self) -> str:
        if not osp.exists(self.path):
            return ""
        with open(self.path, encoding="utf-8", errors="replace", newline="") as file:
            return file.read()

    def append(self, text: str) -> None:
        # Unbuffered: a line reaches the file whole or, if the process is killed, not at all.
        with writing(self.path), open(self.path, "ab", buffering=0) as file:
            file.write(encode(text))
        self._dirty = True

    def rewrite(self, text: str) -> None:
        write_atomically(self.path, lambda file: file.write(encode(text)))
        self._dirty = True

    def push(self, at_most_every_s: float = 0.0) -> None:
        """Upload the file, if it belongs in the cloud and has changed.

        :param at_most_every_s: do nothing if the last upload was less than this many seconds ago.
        """
        if self._folder is None or not self._dirty:
            return
        if time.monotonic() - self._pushed_at >= at_most_every_s:
            bf.copy(self.path, self.target, overwrite=True)
            self._dirty = False
            self._pushed_at = time.monotonic()

    def flush(self) -> None:
        """Make what was written so far survive a power failure."""
        if self._folder is None and self._dirty:
            with writing(self.path), open(self.path, "ab") as file:
                os.fsync(file.fileno())
            self._dirty = False
        self.push()

    def close(self) -> None:
        self.push()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def plain(value: Any) -> Any:
    """Convert numbers of NumPy and torch to Python numbers, and other objects to text."""
    if hasattr(value, "item"):  # first, because NumPy's float64 is also a float
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def _cell(value: Any) -> str:
    """One line of text; for a float, the digits that read back as the same number, bit for bit."""
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    return " ".join(str(value).splitlines())


def _superseded(path: str) -> str:
    stem, extension = osp.splitext(path)
    return f"{stem}_superseded{extension}"


def _is_superseded(row: Mapping[str, Any], resume_step: int | None) -> bool:
    """Whether a row belongs to a step that the resumed run will repeat."""
    if resume_step is None:
        return False
    try:
        return float(row.get("step", "nan")) > resume_step
    except (AttributeError, TypeError, ValueError):
        return False


class HumanOutputFormat(KVWriter, SeqWriter):
    """A table for every row and a line for every message, on a stream or appended to a file."""

    MAX_WIDTH = 40

    def __init__(self, filename_or_file: str | TextIO) -> None:
        self.file: LogFile | None = None
        self.on_screen = not isinstance(filename_or_file, str)
        self.stream: TextIO | str = "stdout"  # the name of one of `sys`
        if isinstance(filename_or_file, str):
            self.file = LogFile(filename_or_file)
            text = self.file.read()
            if text and not text.endswith("\n"):
                self.file.append("\n")  # end the last line of a run that was killed
        elif filename_or_file is sys.stderr:
            self.stream = "stderr"
        elif filename_or_file is not sys.stdout:
            self.stream = filename_or_file

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        rows = []
        for key, value in sorted(kvs.items()):
            value = plain(value)
            text = f"{value:.5g}" if isinstance(value, float) else str(value)
            rows.append((self._shorten(key), self._shorten(text)))
        if not rows or (self.on_screen and messages.hidden("")):
            return
        left = max(len(key) for key, _ in rows)
        right = max(len(text) for _, text in rows)
        rule = "-" * (left + right + 7)
        lines = [rule, *(f"| {key:<{left}} | {text:<{right}} |" for key, text in rows), rule]
        self._write("\n".join(lines) + "\n")
        if self.file is not None:
            self.file.push(PUSH_INTERVAL_S)

    def writeseq(self, seq: Sequence[str]) -> None:
        self._write(" ".join(seq) + "\n")

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _write(self, text: str) -> None:
        if self.file is not None:
            self.file.append(text)
            return
        # Looked up each time, so that replacing sys.stdout takes effect.
        stream = getattr(sys, self.stream) if isinstance(self.stream, str) else self.stream
        messages.write(text.removesuffix("\n"), stream)

    def _shorten(self, text: str) -> str:
        return text if len(text) <= self.MAX_WIDTH else text[: self.MAX_WIDTH - 3] + "..."


class ProgressBarOutputFormat(SeqWriter):
    """Messages on standard error, printed above a progress bar so that they do not break it."""

    on_screen = True

    def writeseq(self, seq: Sequence[str]) -> None:
        messages.write(" ".join(seq), sys.stderr)


class _RowsFile(KVWriter):
    """Rows in a file."""

    def __init__(self, filename: str) -> None:
        self.file = LogFile(filename)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class JSONOutputFormat(_RowsFile):
    """One JSON object per line. `resume_step`: as for CSVOutputFormat."""

    def __init__(self, filename: str, resume_step: int | None = None) -> None:
        super().__init__(filename)
        kept: list[str] = []
        moved: list[str] = []
        for line in self.file.read().splitlines(keepends=True):
            try:
                stale = not line.endswith("\n") or _is_superseded(json.loads(line), resume_step)
            except ValueError:
                stale = True
            (moved if stale else kept).append(line)
        if moved:
            aside = LogFile(_superseded(filename))
            aside.append("".join(moved).rstrip("\n") + "\n")
            aside.close()
            self.file.rewrite("".join(kept))

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        row = {key: plain(value) for key, value in sorted(kvs.items())}
        self.file.append(json.dumps(row) + "\n")
        self.file.push(PUSH_INTERVAL_S)


def _parse(filename: str, text: str) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(
            f"{filename} is damaged, so that no line can be added: move it aside and start again"
        ) from error


class CSVOutputFormat(_RowsFile):
    """A table with one column per key; a new key adds a column to all rows.

    An existing file is continued. First, rows whose "step" is beyond `resume_step`, and a last line
    that a killed run left half-written, are moved to NAME_superseded.csv: the resumed run repeats
    these steps, and NAME.csv reads as if nothing had happened. `resume_step` -1 moves all rows with
    a step, None only a half-written one.
    """

    def __init__(self, filename: str, resume_step: int | None = None) -> None:
        super().__init__(filename)
        self.keys: list[str] = []
        text = self.file.read()
        end = text.rfind("\n") + 1
        lines = _parse(filename, text[:end])
        if not lines:  # empty, or only part of a header
            if text:
                self.file.rewrite("")
            return
        self.keys, rows = lines[0], lines[1:]
        stale: list[list[str]] = []
        kept: list[list[str]] = []
        for row in rows:
            beyond = _is_superseded(dict(zip(self.keys, row)), resume_step)
            (stale if beyond else kept).append(row)
        if end < len(text):
            stale += _parse(filename, text[end:])
        if stale:
            # In this order, so that a row is in both files after a kill in between, never in none.
            aside = CSVOutputFormat(_superseded(filename))
            for row in stale:
                aside.writekvs(dict(zip(self.keys, row)))
            aside.close()
            self.file.rewrite(self._lines([self.keys, *kept]))

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        new = sorted(kvs.keys() - set(self.keys))
        had_header = bool(self.keys)
        self.keys += new
        row = self._lines([[_cell(kvs.get(key)) for key in self.keys]])
        if new and had_header:
            body = self.file.read().split("\n", 1)[1]
            wider = [line + "," * len(new) + "\n" for line in body.splitlines()]
            self.file.rewrite(self._lines([self.keys]) + "".join(wider) + row)
        else:
            self.file.append((self._lines([self.keys]) if new else "") + row)
        self.file.push(PUSH_INTERVAL_S)

    @staticmethod
    def _lines(rows: Sequence[Sequence[str]]) -> str:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()


class TensorBoardOutputFormat(KVWriter):
    """Scalars for TensorBoard in the folder `dir`, at the row's own "step", else counted from 1.

    A resumed run writes a new event file; `resume_step` makes TensorBoard hide later steps in
    earlier files. Without a working tensorboard package, the first row warns and none is written.
    """

    def __init__(self, dir: str, resume_step: int | None = None) -> None:
        self.dir = dir
        self.step = 0
        self._purge_step = None if resume_step is None else max(resume_step + 1, 0)
        self._opened = False
        self._writer: SummaryWriter | None = None

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        if not self._opened:
            self._opened = True
            self._writer = self._open()
        if self._writer is None:
            return
        step = plain(kvs.get("step"))
        self.step = int(step) if isinstance(step, int | float) else self.step + 1
        with writing(self.dir):
            for key, value in kvs.items():
                value = plain(value)
                if isinstance(value, int | float):
                    self._writer.add_scalar(key, value, self.step)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with writing(self.dir):
                self._writer.close()

    def _open(self) -> "SummaryWriter | None":
        # Imported at the first row: it takes seconds, and most short commands log none.
        try:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _leave_to_next_row
            return SummaryWriter(self.dir, purge_step=self._purge_step)
        except Exception as error:  # a broken installation raises anything
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"no TensorBoard files: {reason}", stacklevel=3)
            return None


def _leave_to_next_row(failed: threading.ExceptHookArgs) -> None:
    """No traceback for what tensorboard's own thread cannot write: the next row raises it again."""
    if not type(failed.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failed)


class WandbOutputFormat(KVWriter):
    """Rows for Weights & Biases, at the row's own "step".

    wandb's own environment variables set the project and more (WANDB_PROJECT, WANDB_MODE=offline,
    ...). The folder identifies the run, so that a resumed run continues it.

    :raises UserError: if the package is missing or refuses to start.
    """

    def __init__(self, dir: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "--wandb: the package wandb is not installed: pip install wandb, or leave it out"
            ) from error
        folder = osp.abspath(dir) if is_local(dir) else dir
        name = osp.basename(folder.rstrip("/"))
        try:
            self._run = wandb.init(
                dir=folder if is_local(dir) else None,
                name=visible(name),
                id=f"{zlib.crc32(encode(folder)):08x}",
                resume="allow",
            )
        except Exception as error:  # no login, no network: many types
            raise UserError(
                f"--wandb: {one_line(error)}: log in with `wandb login`, set"
                " WANDB_MODE=offline, or leave it out"
            ) from error

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        row = {key: plain(value) for key, value in kvs.items()}
        step = row.get("step")
        self._run.log(row, step=int(step) if isinstance(step, int | float) else None)

    def close(self) -> None:
        self._run.finish()


def make_output_format(
    format: str, ev_dir: str, log_suffix: str = "", resume_step: int | None = None
) -> KVWriter | SeqWriter:
    """Create the writer named `format`, writing into the folder `ev_dir`.

    :param format: stdout, stderr, tqdm (messages only, on stderr), log, json, csv, tensorboard or
        wandb.
    :param resume_step: as for CSVOutputFormat.
    :raises UserError: for an unknown format.
    """
    if format == "stdout":
        return HumanOutputFormat(sys.stdout)
    if format == "stderr":
        return HumanOutputFormat(sys.stderr)
    if format == "tqdm":
        return ProgressBarOutputFormat()
    if format == "log":
        return HumanOutputFormat(bf.join(ev_dir, f"log{log_suffix}.txt"))
    if format == "json":
        return JSONOutputFormat(bf.join(ev_dir, f"progress{log_suffix}.json"), resume_step)
    if format == "csv":
        return CSVOutputFormat(bf.join(ev_dir, f"progress{log_suffix}.csv"), resume_step)
    if format == "tensorboard":
        return TensorBoardOutputFormat(bf.join(ev_dir, f"tb{log_suffix}"), resume_step)
    if format == "wandb":
        return WandbOutputFormat(ev_dir)
    raise UserError(
        f"OPENAI_LOG_FORMAT contains the unknown format {format!r}: choose from stdout, stderr,"
        " tqdm, log, json, csv, tensorboard and wandb, separated by commas"
    )
