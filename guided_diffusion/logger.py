"""Numbers and messages of a run: progress.csv, log.txt, TensorBoard and a table on the screen.

The interface is that of OpenAI Baselines' logger, as in guided-diffusion. Beyond it, files are
appended to and never erased, a resumed run continues its own progress.csv, numbers keep all their
digits, and means of CUDA tensors are summed on the GPU without waiting for it.

The folder may be any path that blobfile can write; see runtime/log_formats.py.
"""

import datetime
import os
import os.path as osp
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import blobfile as bf
import torch as th
import torch.distributed as dist

from .runtime import messages, session
from .runtime.log_formats import (  # noqa: F401 - names of this module in the original too
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    KVWriter,
    SeqWriter,
    TensorBoardOutputFormat,
    WandbOutputFormat,
    Writer,
    make_output_format,
    plain,
)
from .runtime.storage import run_lock
from .runtime.storage.files import is_local, writing

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50

DEFAULT_FORMATS = "stdout,log,csv,tensorboard"
# results of commands are on standard output
COMMAND_FORMATS = "stderr,log,csv,tensorboard"
DEFAULT_FORMATS_OTHER_RANKS = "log"

# An unfinished row as plain values: name -> (sum, count) of a mean, or (value, 0) of a plain value.
Pending = Mapping[str, tuple[Any, int]]
Function = TypeVar("Function", bound=Callable[..., Any])


class _Mean:
    """A sum and a count. CUDA tensors are summed on their device, in float64 and in order, so that
    the sum has the same bits as on the CPU, without waiting for the GPU until it is read."""

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
    """Collects named values and writes them as one row per `dumpkvs`; writes messages at once.

    `comm`: None, or a communicator of the ranks, with `.rank` and with `.gather(obj)`, which
    returns the list of all ranks' objects on rank 0, as mpi4py's does. With it, a row holds the
    means over the ranks, weighted by their counts, and all ranks must call `dumpkvs` together.
    """

    CURRENT: "Logger | None" = None  # what the functions of this module use

    def __init__(self, dir: str | None, output_formats: Sequence[Writer], comm: Any = None) -> None:
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm
        self.level = INFO
        self._values: dict[str, Any] = {}

    def logkv(self, key: str, val: Any) -> None:
        """Set a value of the next row, replacing an earlier one."""
        self._values[key] = val.detach().clone() if isinstance(val, th.Tensor) else val

    def logkv_mean(self, key: str, val: Any, count: int = 1) -> None:
        """Average a value into the next row. The value is itself the mean of `count` values; a
        number or a tensor of one element, which is not waited for if on the GPU."""
        mean = self._values.get(key)
        if not isinstance(mean, _Mean):
            mean = self._values[key] = _Mean()
        mean.add(val, count)

    def getkvs(self) -> dict[str, Any]:
        """The next row so far, in plain numbers."""
        pending = self.get_pending()
        return {name: val / count if count else val for name, (val, count) in pending.items()}

    def get_pending(self) -> dict[str, tuple[Any, int]]:
        """The unfinished row as plain Python values, to be saved with a checkpoint.

        `set_pending` restores it, also in another process; means then continue bit for bit.
        """
        on_gpu = [
            (mean, mean.total)
            for mean in self._values.values()
            if isinstance(mean, _Mean) and isinstance(mean.total, th.Tensor)
        ]
        if on_gpu:
            device = on_gpu[0][1].device
            totals = th.stack([total.to(device) for _, total in on_gpu]).tolist()
            for (mean, _), total in zip(on_gpu, totals):
                mean.total = total
        return {
            name: (val.total, val.count) if isinstance(val, _Mean) else (plain(val), 0)
            for name, val in self._values.items()
        }

    def set_pending(self, pending: Pending) -> None:
        """Continue an unfinished row returned by `get_pending`."""
        self._values = {
            name: _Mean(val, count) if count else val for name, (val, count) in pending.items()
        }

    def dumpkvs(self) -> dict[str, Any]:
        """Write the row, start the next, and return the row; with a `comm`, {} on ranks other
        than 0."""
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
            run_lock.check_held()
            for output in self.output_formats:
                if isinstance(output, KVWriter):
                    output.writekvs(row)
        return row

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a message unless `level` is below the logger's own."""
        if self.level <= level:
            words = [str(arg) for arg in args]
            hidden = level < WARN and messages.hidden(" ".join(words))
            for output in self.output_formats:
                if isinstance(output, SeqWriter) and not (hidden and output.on_screen):
                    output.writeseq(words)

    def set_level(self, level: int) -> None:
        self.level = level

    def set_comm(self, comm: Any) -> None:
        self.comm = comm

    def get_dir(self) -> str | None:
        return self.dir

    def flush(self) -> None:
        """Make everything written so far survive a power failure, and upload it if the folder is in
        the cloud. Call it before a checkpoint counts as complete, so that no row is lost."""
        for output in self.output_formats:
            output.flush()

    def close(self) -> None:
        """Close the files."""
        for output in self.output_formats:
            output.close()


def get_current() -> Logger:
    """The logger used by the functions of this module; before `configure`, one to the screen."""
    if Logger.CURRENT is None:
        Logger.CURRENT = Logger(None, [HumanOutputFormat(messages.log_stream())])
    return Logger.CURRENT


def logkv(key: str, val: Any) -> None:
    """Set a value of the next row, replacing an earlier one."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any, count: int = 1) -> None:
    """Average a value into the next row; see Logger.logkv_mean."""
    get_current().logkv_mean(key, val, count)


def logkvs(d: Mapping[str, Any]) -> None:
    """Set several values of the next row."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Any]:
    """Write the row, start the next, and return the row; see Logger.dumpkvs."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The next row so far."""
    return get_current().getkvs()


def get_pending() -> dict[str, tuple[Any, int]]:
    """The unfinished row, to be saved with a checkpoint; see Logger.get_pending."""
    return get_current().get_pending()


def set_pending(pending: Pending) -> None:
    """Continue an unfinished row returned by `get_pending`."""
    get_current().set_pending(pending)


def pending_of_rank(gathered: Sequence[Pending], rank: int, num_ranks: int) -> Pending:
    """The unfinished row that this rank continues.

    :param gathered: the results of `get_pending` on all ranks of the saved run.
    :return: this rank's own; if the number of ranks has changed, the sums over all on rank 0.
    """
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
    """Write a message, its words separated by spaces, unless `level` is below the logger's own."""
    get_current().log(*args, level=level)


def result(text: str) -> None:
    """Write a message that is a command's result: to standard output, and to the log's files."""
    if not session.current().command:
        log(text)
        return
    with session.changed(silent=True):
        log(text)
    if get_rank_without_mpi_import() == 0:
        print(text, flush=True)


def debug(*args: Any) -> None:
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    log(*args, level=WARN)


def error(*args: Any) -> None:
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Drop messages below this level: DEBUG, INFO, WARN, ERROR; DISABLED drops all, and rows."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Average rows over the ranks of `comm`; see Logger."""
    get_current().set_comm(comm)


def get_dir() -> str | None:
    """The folder of the run; None if the log goes to the screen only."""
    return get_current().get_dir()


def flush() -> None:
    """Make everything logged so far survive a power failure; see Logger.flush."""
    get_current().flush()


record_tabular = logkv
dump_tabular = dumpkvs


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds spent in the context to the value wait_SCOPENAME of the next row."""
    logger, key, start = get_current(), f"wait_{scopename}", time.perf_counter()
    try:
        yield
    finally:
        before = logger._values.get(key, 0.0)
        logger.logkv(key, before + time.perf_counter() - start)


def profile(n: str) -> Callable[[Function], Function]:
    """Decorate a function to time every call with `profile_kv(n)`."""
    return profile_kv(n)


def get_rank_without_mpi_import() -> int:
    """This process's rank: that of torch.distributed if it is initialised, else from the launcher's
    environment variables, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def mpi_weighted_mean(
    comm: Any, local_name2valcount: Mapping[str, tuple[Any, float]]
) -> dict[str, Any]:
    """Average over all ranks. Collective.

    Values that are equal on all ranks are returned unchanged; of differing text, rank 0's.

    :param local_name2valcount: this rank's {name: (value, count)}.
    :return: {name: mean} on rank 0, {} elsewhere.
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
    comm: Any = None,
    log_suffix: str = "",
    resume_step: int | None = None,
    also: Sequence[str] = (),
) -> Logger:
    if dir is None:
        dir = os.environ.get("OPENAI_LOGDIR")
    if not dir:
        dir = osp.join("runs", datetime.datetime.now().strftime("%Y%m%d-%H%M%S"))
    dir = osp.expanduser(dir)
    with writing(dir):
        bf.makedirs(dir)
    rank = get_rank_without_mpi_import() if comm is None else comm.rank
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
    if format_strs is None:
        main = COMMAND_FORMATS if session.current().command else DEFAULT_FORMATS
        variable, default = (
            ("OPENAI_LOG_FORMAT", main)
            if rank == 0
            else ("OPENAI_LOG_FORMAT_MPI", DEFAULT_FORMATS_OTHER_RANKS)
        )
        format_strs = os.environ.get(variable, default).split(",")
    names = [name.strip() for name in format_strs if name.strip()]
    names += [name for name in also if rank == 0 and name not in names]
    if not is_local(dir) and "tensorboard" in names:
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
        dir: the folder; by default $OPENAI_LOGDIR, else runs/DATE-TIME in the current folder (with
            several ranks, pass rank 0's choice to all).
        format_strs: any of stdout, stderr, tqdm (messages only, on stderr), log, json, csv,
            tensorboard, wandb; by default $OPENAI_LOG_FORMAT, else stdout (in the commands stderr),
            log, csv and tensorboard. On ranks other than 0, $OPENAI_LOG_FORMAT_MPI, else a log file
            per rank.
        comm: average rows over its ranks; see Logger.
        log_suffix: part of the file names.
        resume_step: the step from which the run continues; see CSVOutputFormat. None: only append.
        also: additional formats on rank 0.

    Raises:
        UserError: an unknown format.
    """
    previous = Logger.CURRENT
    Logger.CURRENT = _open_logger(dir, format_strs, comm, log_suffix, resume_step, also)
    if previous is not None:
        previous.close()
    log(f"logging to {Logger.CURRENT.dir}")


def reset() -> None:
    """Close the files and log to the screen only, as before `configure`."""
    if Logger.CURRENT is not None:
        Logger.CURRENT.close()
        Logger.CURRENT = None


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """Log into `dir` in the context, then restore the previous logger."""
    previous = Logger.CURRENT
    Logger.CURRENT = _open_logger(dir, format_strs, comm)
    try:
        yield
    finally:
        Logger.CURRENT.close()
        Logger.CURRENT = previous
