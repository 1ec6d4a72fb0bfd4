"""Numbers and messages of a run: progress.csv, log.txt, TensorBoard and a table on the screen.

Names and calls are those of OpenAI Baselines' logger, as in guided-diffusion. More than there:
files are appended to and never erased, a resumed run continues its own progress.csv, numbers keep
all their digits, and means of CUDA tensors are summed on the GPU without waiting for it.

The folder may be any path that blobfile writes. Cloud objects cannot grow, so each log file is
kept in a local temporary folder and sent whole by `flush` and `close`, and at most once a minute
by `dumpkvs`. TensorBoard files go to local folders only.
"""

import csv
import datetime
import functools
import io
import json
import os
import os.path as osp
import shutil
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import blobfile as bf
import torch as th
import torch.distributed as dist

from .errors import UserError

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50

DEFAULT_FORMATS = "stdout,log,csv,tensorboard"
DEFAULT_FORMATS_OTHER_RANKS = "log"
PUSH_INTERVAL_S = 60.0


class KVWriter(ABC):
    """Writes one row of named values."""

    @abstractmethod
    def writekvs(self, kvs: Mapping[str, Any]) -> None: ...


class SeqWriter(ABC):
    """Writes one message, given in pieces."""

    @abstractmethod
    def writeseq(self, seq: Sequence[str]) -> None: ...


class _LogFile:
    """A text file that grows line by line, local or in the cloud (see the top of this module)."""

    def __init__(self, path: str) -> None:
        self.target = path
        self.path = path
        self._folder = None
        self._dirty = False
        self._pushed_at = time.monotonic()
        if "://" in path:
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
        # Unbuffered: a line reaches the file in one piece or, if the process is killed, not at all.
        with open(self.path, "ab", buffering=0) as file:
            file.write(text.encode("utf-8"))
        self._dirty = True

    def rewrite(self, text: str) -> None:
        temporary = self.path + ".tmp"
        with open(temporary, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._dirty = True

    def push(self, at_most_every_s: float = 0.0) -> None:
        """Send the file to the cloud, if that is where it belongs and something is new."""
        if self._folder is None or not self._dirty:
            return
        if time.monotonic() - self._pushed_at >= at_most_every_s:
            bf.copy(self.path, self.target, overwrite=True)
            self._dirty = False
            self._pushed_at = time.monotonic()

    def flush(self) -> None:
        """What was written so far survives a power failure."""
        if self._folder is None and self._dirty:
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())
            self._dirty = False
        self.push()

    def close(self) -> None:
        self.push()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _plain(value: Any) -> Any:
    """A number as a Python number, text as text."""
    if hasattr(value, "item"):  # first: numpy's float64 is a float too
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def _cell(value: Any) -> str:
    """The text that reads back as the same number, bit for bit; one line."""
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    return " ".join(str(value).splitlines())


def _superseded(path: str) -> str:
    stem, extension = osp.splitext(path)
    return f"{stem}_superseded{extension}"


def _is_superseded(row: Mapping[str, Any], resume_step: int | None) -> bool:
    """Whether a row is of a step that the resumed run takes again."""
    if resume_step is None:
        return False
    try:
        return float(row.get("step", "nan")) > resume_step
    except (AttributeError, TypeError, ValueError):
        return False


class HumanOutputFormat(KVWriter, SeqWriter):
    """A table of every row and a line for every message, on a stream or at the end of a file."""

    MAX_WIDTH = 40

    def __init__(self, filename_or_file: str | TextIO) -> None:
        self.file = None
        self.stream = None
        if isinstance(filename_or_file, str):
            self.file = _LogFile(filename_or_file)
            text = self.file.read()
            if text and not text.endswith("\n"):
                self.file.append("\n")  # the last line of a run that was killed
        elif filename_or_file is not sys.stdout:
            self.stream = filename_or_file

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        rows = []
        for key, value in sorted(kvs.items()):
            value = _plain(value)
            text = f"{value:.5g}" if isinstance(value, float) else str(value)
            rows.append((self._shorten(key), self._shorten(text)))
        if not rows:
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
        # Looked up anew: whoever replaces sys.stdout means this too.
        stream = sys.stdout if self.stream is None else self.stream
        stream.write(text)
        stream.flush()

    def _shorten(self, text: str) -> str:
        return text if len(text) <= self.MAX_WIDTH else text[: self.MAX_WIDTH - 3] + "..."


class JSONOutputFormat(KVWriter):
    """One JSON object a line. `resume_step`: as for CSVOutputFormat."""

    def __init__(self, filename: str, resume_step: int | None = None) -> None:
        self.file = _LogFile(filename)
        kept, moved = [], []
        for line in self.file.read().splitlines(keepends=True):
            try:
                stale = not line.endswith("\n") or _is_superseded(json.loads(line), resume_step)
            except ValueError:
                stale = True
            (moved if stale else kept).append(line)
        if moved:
            aside = _LogFile(_superseded(filename))
            aside.append("".join(moved).rstrip("\n") + "\n")
            aside.close()
            self.file.rewrite("".join(kept))

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        row = {key: _plain(value) for key, value in sorted(kvs.items())}
        self.file.append(json.dumps(row) + "\n")
        self.file.push(PUSH_INTERVAL_S)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class CSVOutputFormat(KVWriter):
    """A table with one column a key; a key not seen before adds a column to all rows.

    An existing file is continued. Its last line, where a killed run left it half-written, and the
    rows whose "step" is beyond `resume_step` are moved to NAME_superseded.csv first: the resumed
    run takes these steps again, and NAME.csv reads as if nothing had happened. `resume_step`
    -1 moves all numbered rows, None only the half-written one.
    """

    def __init__(self, filename: str, resume_step: int | None = None) -> None:
        self.file = _LogFile(filename)
        self.keys: list[str] = []
        text = self.file.read()
        end = text.rfind("\n") + 1
        lines = list(csv.reader(io.StringIO(text[:end], newline="")))
        if not lines:  # empty, or only a piece of a header
            if text:
                self.file.rewrite("")
            return
        self.keys, rows = lines[0], lines[1:]
        stale, kept = [], []
        for row in rows:
            beyond = _is_superseded(dict(zip(self.keys, row)), resume_step)
            (stale if beyond else kept).append(row)
        if end < len(text):
            stale += csv.reader(io.StringIO(text[end:], newline=""))
        if stale:
            # In this order: killed in between, a row stands in both files, never in none.
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

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    @staticmethod
    def _lines(rows: Sequence[Sequence[str]]) -> str:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()


class TensorBoardOutputFormat(KVWriter):
    """Scalars for TensorBoard under `dir`, at the row's own "step" or else counted from 1.

    A resumed run writes a new event file; `resume_step` tells TensorBoard to hide what earlier
    files hold beyond it. Without a working tensorboard package the first row warns, no more.
    """

    def __init__(self, dir: str, resume_step: int | None = None) -> None:
        self.dir = dir
        self.step = 0
        self._purge_step = None if resume_step is None else max(resume_step + 1, 0)
        self._writer = None
        self._broken = False

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        if self._writer is None and not self._broken:
            self._open()
        if self._broken:
            return
        step = _plain(kvs.get("step"))
        self.step = int(step) if isinstance(step, int | float) else self.step + 1
        for key, value in kvs.items():
            value = _plain(value)
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, self.step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> None:
        # Imported at the first row: it takes seconds, and most short commands log none.
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.dir, purge_step=self._purge_step)
        except Exception as error:  # a broken installation raises anything
            self._broken = True
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"no TensorBoard files: {reason}", stacklevel=2)


def make_output_format(
    format: str, ev_dir: str, log_suffix: str = "", resume_step: int | None = None
) -> KVWriter:
    """The writer that `format` names: stdout, log, json, csv or tensorboard, under `ev_dir`."""
    if format == "stdout":
        return HumanOutputFormat(sys.stdout)
    if format == "log":
        return HumanOutputFormat(bf.join(ev_dir, f"log{log_suffix}.txt"))
    if format == "json":
        return JSONOutputFormat(bf.join(ev_dir, f"progress{log_suffix}.json"), resume_step)
    if format == "csv":
        return CSVOutputFormat(bf.join(ev_dir, f"progress{log_suffix}.csv"), resume_step)
    if format == "tensorboard":
        return TensorBoardOutputFormat(bf.join(ev_dir, f"tb{log_suffix}"), resume_step)
    raise UserError(
        f"OPENAI_LOG_FORMAT names the unknown format {format!r}; "
        "known are stdout, log, json, csv and tensorboard, separated by commas"
    )


class _Mean:
    """A sum and a count. CUDA tensors are summed on their device, in float64 and in order, so that
    the sum has the same bits as on the CPU, and nothing waits for the GPU before it is read."""

    __slots__ = ("count", "total")

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self.total: float | th.Tensor = total
        self.count = count

    def add(self, value: Any, count: int) -> None:
        if isinstance(value, th.Tensor):
            value = value.detach()
        if isinstance(value, th.Tensor) and value.is_cuda:
            if not isinstance(self.total, th.Tensor):
                self.total = th.full((), self.total, dtype=th.float64, device=value.device)
            self.total += value.reshape(()).double() * count
        else:
            self.total += float(value) * count
        self.count += count


class Logger:
    """Collects named values and writes them as one row a `dumpkvs`; passes on messages.

    `comm`: None, or what knows the ranks (`.rank`, and `.gather(obj)` that gives rank 0 the list of
    all ranks' objects, as an mpi4py communicator does). With it a row holds the means over the
    ranks, weighted by their counts; then all ranks must call `dumpkvs` together.
    """

    CURRENT: "Logger | None" = None  # what the functions of this module use

    def __init__(
        self, dir: str | None, output_formats: Sequence[KVWriter | SeqWriter], comm: Any = None
    ) -> None:
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm
        self.level = INFO
        self._values: dict[str, Any] = {}

    def logkv(self, key: str, val: Any) -> None:
        """Set a value of the next row; the last call counts."""
        self._values[key] = val.detach().clone() if isinstance(val, th.Tensor) else val

    def logkv_mean(self, key: str, val: Any, count: int = 1) -> None:
        """Add to a mean of the next row a value that is the mean of `count` ones. A CUDA tensor of
        one element is not waited for."""
        mean = self._values.get(key)
        if not isinstance(mean, _Mean):
            mean = self._values[key] = _Mean()
        mean.add(val, count)

    def getkvs(self) -> dict[str, Any]:
        """The next row as it stands, in plain numbers."""
        pending = self.get_pending()
        return {name: val / count if count else val for name, (val, count) in pending.items()}

    def get_pending(self) -> dict[str, tuple[Any, int]]:
        """The unfinished row, to be saved with a checkpoint: name -> (sum, count) of a mean, or
        (value, 0) of a plain value. Plain Python values; `set_pending` of them, in another process
        too, continues to the same bits."""
        on_gpu = [
            (name, mean)
            for name, mean in self._values.items()
            if isinstance(mean, _Mean) and isinstance(mean.total, th.Tensor)
        ]
        if on_gpu:
            totals = th.stack([mean.total.to(on_gpu[0][1].total.device) for _, mean in on_gpu])
            for (_, mean), total in zip(on_gpu, totals.tolist()):
                mean.total = total
        return {
            name: (val.total, val.count) if isinstance(val, _Mean) else (_plain(val), 0)
            for name, val in self._values.items()
        }

    def set_pending(self, pending: Mapping[str, tuple[Any, int]]) -> None:
        """Continue the unfinished row that `get_pending` gave."""
        self._values = {
            name: _Mean(val, count) if count else val for name, (val, count) in pending.items()
        }

    def dumpkvs(self) -> dict[str, Any]:
        """Write the row and begin the next. Returns it; {} on other ranks than 0 with a `comm`."""
        if self.comm is None:
            row = self.getkvs()
        else:
            counted = {
                name: (val / count, count) if count else (val, 1)
                for name, (val, count) in self.get_pending().items()
            }
            row = mpi_weighted_mean(self.comm, counted)
        self._values.clear()
        if self.level != DISABLED and (self.comm is None or self.comm.rank == 0):
            for output in self.output_formats:
                if isinstance(output, KVWriter):
                    output.writekvs(row)
        return row

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a message where `level` is not below the logger's own."""
        if self.level <= level:
            for output in self.output_formats:
                if isinstance(output, SeqWriter):
                    output.writeseq([str(arg) for arg in args])

    def set_level(self, level: int) -> None:
        self.level = level

    def set_comm(self, comm: Any) -> None:
        self.comm = comm

    def get_dir(self) -> str | None:
        return self.dir

    def flush(self) -> None:
        """Everything written so far survives a power failure, and stands in the cloud if the folder
        does. To be called before a checkpoint counts as complete, so that no row is lost."""
        for output in self.output_formats:
            if hasattr(output, "flush"):
                output.flush()

    def close(self) -> None:
        for output in self.output_formats:
            if hasattr(output, "close"):
                output.close()


def get_current() -> Logger:
    """The logger that the functions of this module use; without `configure`, one to the screen."""
    if Logger.CURRENT is None:
        Logger.CURRENT = Logger(None, [HumanOutputFormat(sys.stdout)])
    return Logger.CURRENT


def logkv(key: str, val: Any) -> None:
    """Set a value of the next row; the last call counts."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any, count: int = 1) -> None:
    """Add to a mean of the next row a value that is the mean of `count` ones. A CUDA tensor of one
    element is not waited for."""
    get_current().logkv_mean(key, val, count)


def logkvs(d: Mapping[str, Any]) -> None:
    """Set several values of the next row."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Any]:
    """Write the row and begin the next; returns it."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The next row as it stands."""
    return get_current().getkvs()


def get_pending() -> dict[str, tuple[Any, int]]:
    """The unfinished row, to be saved with a checkpoint; see Logger.get_pending."""
    return get_current().get_pending()


def set_pending(pending: Mapping[str, tuple[Any, int]]) -> None:
    """Continue the unfinished row that `get_pending` gave."""
    get_current().set_pending(pending)


def pending_of_rank(
    gathered: Sequence[Mapping[str, tuple[Any, int]]], rank: int, num_ranks: int
) -> Mapping[str, tuple[Any, int]]:
    """What this rank goes on with, given what `get_pending` gave on every rank of the saved run:
    its own, or, if the number of ranks has changed, on rank 0 the sums over all."""
    if len(gathered) == num_ranks:
        return gathered[rank]
    if rank != 0:
        return {}
    merged: dict[str, tuple[Any, int]] = {}
    for of_rank in gathered:
        for name, (val, count) in of_rank.items():
            before = merged.get(name, (0.0, 0))
            if count:
                merged[name] = (before[0] + val, before[1] + count)
            else:
                merged.setdefault(name, (val, 0))
    return merged


def log(*args: Any, level: int = INFO) -> None:
    """Write a message, its pieces separated by blanks, where `level` is high enough."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    log(*args, level=WARN)


def error(*args: Any) -> None:
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Pass on messages from this level on: DEBUG, INFO, WARN, ERROR, or DISABLED for silence."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Average rows over the ranks of `comm`; see Logger."""
    get_current().set_comm(comm)


def get_dir() -> str | None:
    """The folder of the run; None where the log goes to the screen alone."""
    return get_current().get_dir()


def flush() -> None:
    """Everything logged so far survives a power failure; see Logger.flush."""
    get_current().flush()


record_tabular = logkv
dump_tabular = dumpkvs


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds spent inside to the value wait_SCOPENAME of the next row."""
    logger, key, start = get_current(), f"wait_{scopename}", time.perf_counter()
    try:
        yield
    finally:
        before = logger._values.get(key, 0.0)
        logger.logkv(key, before + time.perf_counter() - start)


def profile(n: str) -> Callable[[Callable], Callable]:
    """Decorator: time every call of the function as `profile_kv(n)` does."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate


def get_rank_without_mpi_import() -> int:
    """This process's rank: of torch.distributed where it runs, else what the launcher's environment
    variables say, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def mpi_weighted_mean(
    comm: Any, local_name2valcount: Mapping[str, tuple[Any, float]]
) -> dict[str, Any]:
    """Means over all ranks: {name: (value, count)} of each -> {name: mean} on rank 0, {} elsewhere.

    All ranks call it together. Values that are equal everywhere come back as they are; text that
    differs is rank 0's.
    """
    gathered = comm.gather(dict(local_name2valcount))
    if comm.rank != 0:
        return {}
    names = dict.fromkeys(name for of_rank in gathered for name in of_rank)
    means = {}
    for name in names:
        pairs = [of_rank[name] for of_rank in gathered if name in of_rank]
        first = pairs[0][0]
        if all(val == first for val, _ in pairs) or not isinstance(first, int | float):
            means[name] = first
        else:
            total = sum(count for _, count in pairs)
            means[name] = sum(val * count for val, count in pairs) / total
    return means


def _open_logger(
    dir: str | None,
    format_strs: Sequence[str] | None,
    comm: Any,
    log_suffix: str,
    resume_step: int | None,
) -> Logger:
    if dir is None:
        dir = os.environ.get("OPENAI_LOGDIR")
    if not dir:
        dir = osp.join("runs", datetime.datetime.now().strftime("%Y%m%d-%H%M%S"))
    dir = osp.expanduser(dir)
    bf.makedirs(dir)
    rank = get_rank_without_mpi_import() if comm is None else comm.rank
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
    if format_strs is None and rank == 0:
        format_strs = os.environ.get("OPENAI_LOG_FORMAT", DEFAULT_FORMATS).split(",")
    elif format_strs is None:
        names = os.environ.get("OPENAI_LOG_FORMAT_MPI", DEFAULT_FORMATS_OTHER_RANKS)
        format_strs = names.split(",")
    names = [name.strip() for name in format_strs if name.strip()]
    if "://" in dir and "tensorboard" in names:
        names.remove("tensorboard")
        warnings.warn(f"no TensorBoard files in {dir}: not a local folder", stacklevel=3)
    outputs = [make_output_format(name, dir, log_suffix, resume_step) for name in names]
    return Logger(dir, outputs, comm)


def configure(
    dir: str | None = None,
    format_strs: Sequence[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
    resume_step: int | None = None,
) -> None:
    """Log into the folder `dir` from now on.

    Args:
        dir: the folder; by default $OPENAI_LOGDIR, else runs/DATE-TIME under the current folder
            (where there are several ranks, hand them all rank 0's choice).
        format_strs: of stdout, log, json, csv, tensorboard; by default $OPENAI_LOG_FORMAT, else all
            but json. On other ranks than 0 $OPENAI_LOG_FORMAT_MPI, else a log file of their own.
        comm: average rows over its ranks; see Logger.
        log_suffix: goes into the file names.
        resume_step: the step that the run continues from; see CSVOutputFormat. None: only append.

    Raises:
        UserError: an unknown format.
    """
    previous = Logger.CURRENT
    Logger.CURRENT = _open_logger(dir, format_strs, comm, log_suffix, resume_step)
    if previous is not None:
        previous.close()
    log(f"logging to {Logger.CURRENT.dir}")


def reset() -> None:
    """Close the files and log to the screen alone, as before `configure`."""
    if Logger.CURRENT is not None:
        Logger.CURRENT.close()
        Logger.CURRENT = None


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """Inside, log into `dir`; the logger from before comes back afterwards."""
    previous = Logger.CURRENT
    Logger.CURRENT = _open_logger(dir, format_strs, comm, "", None)
    try:
        yield
    finally:
        Logger.CURRENT.close()
        Logger.CURRENT = previous
