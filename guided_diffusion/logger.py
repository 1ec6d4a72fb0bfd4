"""Numbers and messages of a run: progress.csv, log.txt, TensorBoard and a table on the screen.

Names and calls are those of OpenAI Baselines' logger, as in guided-diffusion. More than there:
files are appended to and never erased, a resumed run continues its own progress.csv, numbers keep
all their digits, and means of CUDA tensors are summed on the GPU without waiting for it.

The folder may be any path that blobfile writes (log_formats.py says how).
"""

import datetime
import functools
import os
import os.path as osp
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import blobfile as bf
import torch as th
import torch.distributed as dist

from .runtime.log_formats import (  # noqa: F401 - names of this module in the original too
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    KVWriter,
    SeqWriter,
    TensorBoardOutputFormat,
    WandbOutputFormat,
    make_output_format,
    plain,
)

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50

DEFAULT_FORMATS = "stdout,log,csv,tensorboard"
DEFAULT_FORMATS_OTHER_RANKS = "log"


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
            name: (val.total, val.count) if isinstance(val, _Mean) else (plain(val), 0)
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
    also: Sequence[str] = (),
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
    names += [name for name in also if rank == 0 and name not in names]
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
    also: Sequence[str] = (),
) -> None:
    """Log into the folder `dir` from now on.

    Args:
        dir: the folder; by default $OPENAI_LOGDIR, else runs/DATE-TIME under the current folder
            (where there are several ranks, hand them all rank 0's choice).
        format_strs: any of stdout, tqdm (messages only, printed above a progress bar), log, json,
            csv, tensorboard, wandb; by default $OPENAI_LOG_FORMAT, else stdout, log, csv and
            tensorboard. On other ranks than 0 $OPENAI_LOG_FORMAT_MPI, else a log
            file of their own.
        comm: average rows over its ranks; see Logger.
        log_suffix: goes into the file names.
        resume_step: the step that the run continues from; see CSVOutputFormat. None: only append.
        also: formats besides, on rank 0.

    Raises:
        UserError: an unknown format.
    """
    previous = Logger.CURRENT
    Logger.CURRENT = _open_logger(dir, format_strs, comm, log_suffix, resume_step, also)
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
