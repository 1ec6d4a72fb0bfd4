"""Ranks: which one this process is, which device it uses, and collective calls among them.

A process detects how it was started (runtime/ranks/launch.py): by `mpiexec -n N`, torchrun, Slurm's
srun, or alone, which needs neither MPI nor a process group. All ranks use NCCL on CUDA or all use
Gloo on the CPU; a second Gloo group carries small messages (the "control group").

Environment variables:
    GUIDED_DIFFUSION_DEVICE   cpu, cuda, cuda:N or mps; by default cuda where a GPU is visible. The
                              flag --device of the commands goes before it
    GUIDED_DIFFUSION_TIMEOUT  seconds a collective call may wait; by default 1800
"""

import atexit
import datetime
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.distributed as dist

from .runtime import messages, session
from .runtime.errors import UserError
from .runtime.memory import keep_freed_memory
from .runtime.ranks.devices import chosen_device, described, share_cores, usable_cores
from .runtime.ranks.failure import Watch, describe, leave
from .runtime.ranks.launch import find_launch
from .runtime.ranks.rendezvous import Meeting, meet
from .runtime.signals import EXIT_STOPPED
from .runtime.storage import checkpoint

DEFAULT_TIMEOUT_S = 1800.0
# NCCL kills the process when it times out; Gloo, which can still report who is missing, goes first.
NCCL_EXTRA_S = 60.0
BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _World:
    """All ranks, as this one sees them."""

    rank: int
    size: int
    device: th.device
    timeout_s: float
    control: dist.ProcessGroup
    watch: Watch
    local_size: int
    cores: int


_world: _World | None = None  # None: one rank


def setup_dist(timeout_s: float | None = None) -> None:
    """Find the other ranks and form a process group. Collective; a second call does nothing.

    Args:
        timeout_s: seconds a collective call may wait for another rank; by default
            $GUIDED_DIFFUSION_TIMEOUT, else 1800.

    Raises:
        UserError: mpi4py does not work under mpiexec; no such device; more ranks than visible GPUs
            on a node; GPUs on some nodes only; a rank does not start. Where all ranks find the same
            error, it is raised on rank 0 and the others exit silently with code 2, so that it is
            printed once.
    """
    global _world
    if _world is not None:
        return
    keep_freed_memory()
    timeout_s = _default_timeout() if timeout_s is None else timeout_s
    meeting = meet(find_launch(os.environ))
    if meeting is not None:
        _world = _form_group(meeting, timeout_s)
        atexit.register(_at_exit)
    open_device()


def dev() -> th.device:
    """The device of this rank."""
    return chosen_device() if _world is None else _world.device


def open_device() -> th.device:
    """The device of this rank; a command says which it is, before anything else.

    Raises:
        UserError: --device or GUIDED_DIFFUSION_DEVICE names one that is not there.
    """
    device = dev()
    if device.index is not None:
        th.cuda.set_device(device)
    if session.current().command and is_main():
        ranks = f"; {world_size()} ranks" if world_size() > 1 else ""
        messages.announce(f"device: {described(device)}{ranks}")
    return device


def rank() -> int:
    """This rank's number among all, from 0."""
    return 0 if _world is None else _world.rank


def world_size() -> int:
    """The number of ranks."""
    return 1 if _world is None else _world.size


def local_size() -> int:
    """The number of ranks on this rank's node."""
    return 1 if _world is None else _world.local_size


def cores() -> int:
    """The number of CPU cores for this rank: its node's, shared out among the ranks there."""
    return len(usable_cores()) if _world is None else _world.cores


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks are here. Collective."""
    if _world is not None:
        dist.barrier(group=_world.control)


def all_gather_object(obj: Any) -> list[Any]:
    """All ranks' objects, in the order of the ranks; pickled on the way. Collective."""
    if _world is None:
        return [obj]
    gathered = [None] * _world.size
    dist.all_gather_object(gathered, obj, group=_world.control)
    return gathered


def broadcast_object(obj: Any) -> Any:
    """Rank 0's object, on all ranks; pickled on the way. Collective."""
    if _world is None:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0, group=_world.control, device=th.device("cpu"))
    return box[0]


def agree_max(value: int) -> int:
    """The maximum of all ranks' numbers. Collective, waits; see Agreement."""
    agreement = Agreement()
    agreement.post(value)
    return agreement.result()


class Agreement:
    """The maximum of all ranks' numbers, without waiting: posted at one step, read at the next.

        stop = Agreement()
        for step in steps:
            if stop.result():  # the same on every rank
                break
            stop.post(int(asked_to_stop))
            train(step)

    All ranks post and read in the same order. It runs on the CPU, whatever the GPU does meanwhile.
    """

    def __init__(self) -> None:
        self._value = th.zeros((), dtype=th.int64)
        self._work: dist.Work | None = None

    def post(self, value: int) -> None:
        """Contribute this rank's number to a new round, after finishing the previous one."""
        self.result()
        self._value.fill_(value)
        if _world is not None:
            self._work = dist.all_reduce(
                self._value, op=dist.ReduceOp.MAX, group=_world.control, async_op=True
            )

    def result(self) -> int:
        """The maximum of the latest round; 0 before the first."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._value)


class Comm:
    """All ranks, as `logger.configure(comm=...)` expects them."""

    @property
    def rank(self) -> int:
        return rank()

    def gather(self, obj: Any) -> list[Any] | None:
        """All ranks' objects on rank 0, None on the others. Collective."""
        if _world is None:
            return [obj]
        gathered = [None] * _world.size if is_main() else None
        dist.gather_object(obj, gathered, dst=0, group=_world.control)
        return gathered


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """Read a checkpoint file of plain tensors and plain Python values, local or in the cloud.

    Not collective: every rank reads the file itself, so it may be called on one rank alone.

    Args:
        path: the file.
        kwargs: for torch.load; by default map_location="cpu" and weights_only=True.

    Raises:
        UserError: there is no such file, or it is not a readable checkpoint.
    """
    return checkpoint.load(path, **kwargs)


@th.no_grad()
def sync_params(params: Iterable[th.Tensor]) -> None:
    """Copy rank 0's values of these tensors to all ranks, in place and in few messages. Collective.

    Tensors of equal type and device are sent together, up to BUCKET_BYTES at a time.
    """
    if _world is None:
        return
    bucket: list[th.Tensor] = []
    for param in params:
        tensor = param.detach()
        if bucket and (
            tensor.dtype != bucket[0].dtype
            or tensor.device != bucket[0].device
            or sum(t.nbytes for t in [*bucket, tensor]) > BUCKET_BYTES
        ):
            _broadcast(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _broadcast(bucket)


def _broadcast(tensors: Sequence[th.Tensor]) -> None:
    """Copy rank 0's values of tensors of one type, on one device, to all ranks."""
    flat = th.cat([tensor.reshape(-1) for tensor in tensors])
    dist.broadcast(flat, src=0)
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(values.view(tensor.shape))


@contextmanager
def failure_guard() -> Iterator[None]:
    """Wrap a whole script: when one rank fails, all end, and one line names it.

    A UserError ends all ranks with exit code 2, an interrupt with 130, any other error with 1 after
    its traceback. Rank 0 names a rank that was killed. Without an error, or after SystemExit with
    code 0 or EXIT_STOPPED, the process group is closed. With one rank, errors pass through.
    """
    try:
        yield
    except BaseException as error:
        if _world is None:
            raise
        if isinstance(error, SystemExit) and error.code in (None, 0, EXIT_STOPPED):
            cleanup()
            raise
        leave(_world.watch.report(error, _world.timeout_s))
    else:
        cleanup()


def cleanup() -> None:
    """Leave the process group at the end of the work. Rank 0 waits for the others."""
    global _world
    if _world is not None:
        _world.watch.bye(_world.timeout_s)
        dist.destroy_process_group()
    _world = None


def _default_timeout() -> float:
    text = os.environ.get("GUIDED_DIFFUSION_TIMEOUT", "")
    try:
        seconds = float(text or DEFAULT_TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"GUIDED_DIFFUSION_TIMEOUT is {text!r}; it must be a number of seconds")
    return seconds


def _form_group(meeting: Meeting, timeout_s: float) -> _World:
    """Form the process group, the control group and the failure watch. Collective."""
    rank, peers, device = meeting.rank, meeting.peers, meeting.device
    control_timeout = datetime.timedelta(seconds=timeout_s)
    on_gpu = device.type == "cuda"
    if on_gpu:
        th.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", meeting.store),
        rank=rank,
        world_size=len(peers),
        timeout=control_timeout + datetime.timedelta(seconds=NCCL_EXTRA_S if on_gpu else 0),
        device_id=device if on_gpu else None,
    )
    control: Any = dist.new_group(backend="gloo", timeout=control_timeout)  # of all ranks
    one_node = len({peer.node for peer in peers}) == 1
    return _World(
        rank=rank,
        size=len(peers),
        device=device,
        timeout_s=timeout_s,
        control=control,
        watch=Watch(meeting.store, rank, [peer.host for peer in peers], meeting.address, one_node),
        local_size=sum(peer.node == peers[rank].node for peer in peers),
        cores=share_cores(peers, rank),
    )


def _at_exit() -> None:
    """For scripts without a failure_guard: report whether this rank ended well."""
    if _world is None:
        return
    error = getattr(sys, "last_value", None)
    if error is None:
        cleanup()
    else:
        leave(_world.watch.failed(describe(error)))
