"""Ranks: who they are, which device each uses, and what they tell each other.

A process finds by itself how it was started (launch.py): by `mpiexec -n N`, torchrun, Slurm's srun,
or alone, which needs neither MPI nor a process group. All ranks use NCCL on CUDA or all use Gloo on
the CPU; a second Gloo group carries small messages ("control group").

Environment variables of this module:
    GUIDED_DIFFUSION_DEVICE   cpu or cuda; by default cuda where a GPU is visible
    GUIDED_DIFFUSION_TIMEOUT  seconds a collective call may wait; by default 1800
"""

import atexit
import datetime
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import blobfile as bf
import torch as th
import torch.distributed as dist

from .runtime.errors import EXIT_USER_ERROR, UserError
from .runtime.failure import ECHO_S, Watch, describe, leave
from .runtime.launch import Launch, find_launch
from .runtime.memory import keep_freed_memory
from .runtime.signals import EXIT_STOPPED

DEFAULT_TIMEOUT_S = 1800.0
# Seconds in which all ranks must have come up.
MEET_S = 300.0
# NCCL ends the process when it times out; Gloo, which can still say who is missing, goes first.
NCCL_EXTRA_S = 60.0
# So long the other ranks leave rank 0 to print what all of them found wrong.
FIRST_WORD_S = 2.0
BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _Peer:
    """What a rank tells the others about itself."""

    host: str
    node: str  # tells nodes of equal host name apart
    device: str  # "cuda" or "cpu"
    gpus: tuple[str, ...] = ()  # the identities of its visible GPUs


@dataclass
class _World:
    """The ranks, as this one sees them; one rank: no process group, no watch."""

    rank: int
    local_rank: int
    hosts: tuple[str, ...]
    device: th.device
    timeout_s: float
    control: dist.ProcessGroup | None = None
    watch: Watch | None = None


_world: _World | None = None


def setup_dist(timeout_s: float | None = None) -> None:
    """Find the other ranks and form a group with them. Collective; a second call does nothing.

    Args:
        timeout_s: seconds a collective call may wait for another rank; by default
            $GUIDED_DIFFUSION_TIMEOUT, else 1800.

    Raises:
        UserError: mpi4py does not work under mpiexec; more ranks than visible GPUs on a node; GPUs
            on some nodes only; a rank does not come up. Rank 0 raises it; where all ranks find the
            same error, the others end silently with exit code 2, so that one line is printed.
    """
    global _world
    if _world is not None:
        return
    keep_freed_memory()
    timeout_s = _timeout() if timeout_s is None else timeout_s
    launch = find_launch(os.environ)
    if launch.world_size == 1:
        device = _device_kind()
        host = socket.gethostname()
        _world = _World(0, 0, (host,), th.device(device), timeout_s)
        return
    store, launch = _meet(launch)
    if launch.world_size == 1:
        _world = _World(0, 0, (socket.gethostname(),), th.device(_device_kind()), timeout_s)
        return
    me = _refuse_together(launch.rank, _describe_self)
    peers = _exchange(store, launch, me)
    index = _refuse_together(launch.rank, lambda: choose_devices(peers)[launch.rank])
    device = th.device(me.device, index)
    _world = _join(store, launch, peers, device, timeout_s)
    atexit.register(_at_exit)


def dev() -> th.device:
    """The device of this rank."""
    return th.device(_device_kind()) if _world is None else _world.device


def rank() -> int:
    """This rank's number among all, from 0."""
    return 0 if _world is None else _world.rank


def world_size() -> int:
    """The number of ranks."""
    return 1 if _world is None else len(_world.hosts)


def local_rank() -> int:
    """This rank's number among those of its node, from 0."""
    return 0 if _world is None else _world.local_rank


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier(group=_world.control)


def all_gather_object(obj: Any) -> list[Any]:
    """The objects of all ranks, in their order. They travel pickled. Collective."""
    if world_size() == 1:
        return [obj]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, obj, group=_world.control)
    return gathered


def broadcast_object(obj: Any) -> Any:
    """Rank 0's object, on all ranks. It travels pickled. Collective."""
    if world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0, group=_world.control, device=th.device("cpu"))
    return box[0]


def agree_max(value: int) -> int:
    """The greatest of all ranks' numbers. Collective, waits; see Agreement."""
    agreement = Agreement()
    agreement.post(value)
    return agreement.result()


class Agreement:
    """The greatest of all ranks' numbers, without waiting: posted at one step, read at the next.

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
        """Hand in this rank's number; reads the previous round's first, if nobody did."""
        self.result()
        self._value.fill_(value)
        if world_size() > 1:
            self._work = dist.all_reduce(
                self._value, op=dist.ReduceOp.MAX, group=_world.control, async_op=True
            )

    def result(self) -> int:
        """The greatest number of the latest round, 0 before the first."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._value)


class Comm:
    """All ranks, as `logger.configure(comm=...)` wants them."""

    @property
    def rank(self) -> int:
        return rank()

    @property
    def size(self) -> int:
        return world_size()

    def gather(self, obj: Any) -> list[Any] | None:
        """All ranks' objects on rank 0, None elsewhere. Collective."""
        if world_size() == 1:
            return [obj]
        gathered = [None] * world_size() if is_main() else None
        dist.gather_object(obj, gathered, dst=0, group=_world.control)
        return gathered


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """Read a checkpoint file of plain tensors and plain Python values, local or blobfile's.

    Every rank reads for itself, so this is no collective call and may be made on one rank alone.

    Args:
        path: the file.
        kwargs: for torch.load; by default map_location="cpu" and weights_only=True.

    Raises:
        UserError: no such file, or not such a file.
    """
    kwargs = {"map_location": "cpu", "weights_only": True, **kwargs}
    if not bf.exists(path):
        raise UserError(f"{path} does not exist: give the path of a checkpoint file")
    try:
        # torch.load jumps about in the file: a remote one is fetched whole first.
        with bf.BlobFile(path, "rb", streaming="://" not in path) as file:
            return th.load(file, **kwargs)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is damaged, or holds more than tensors and plain values ({reason})"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from error


@th.no_grad()
def sync_params(params: Iterable[th.Tensor]) -> None:
    """Give all ranks rank 0's values of these tensors, in place and in few messages. Collective."""
    if world_size() == 1:
        return
    bucket: list[th.Tensor] = []
    for param in params:
        tensor = param.detach()
        if bucket and (
            tensor.dtype != bucket[0].dtype
            or tensor.device != bucket[0].device
            or _num_bytes([*bucket, tensor]) > BUCKET_BYTES
        ):
            _broadcast(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _broadcast(bucket)


@contextmanager
def failure_guard() -> Iterator[None]:
    """Around all that a script does: when one rank fails, all end, and one line says which.

    A UserError ends all ranks with exit code 2, an interrupt with 130, any other error with 1 after
    its traceback. A rank that was killed is named by rank 0. Left without an error, or by
    SystemExit with code 0 or EXIT_STOPPED, it closes the process group. With one rank, errors pass
    through.
    """
    try:
        yield
    except BaseException as error:
        if _world is None or _world.watch is None:
            raise
        if isinstance(error, SystemExit) and error.code in (None, 0, EXIT_STOPPED):
            cleanup()
            raise
        leave(_report(error))
    else:
        cleanup()


def cleanup() -> None:
    """Leave the group, once everything is done. Rank 0 waits for the others."""
    global _world
    if _world is not None and _world.watch is not None:
        _world.watch.bye(_world.timeout_s)
        dist.destroy_process_group()
    _world = None


def choose_devices(peers: list[_Peer]) -> list[int | None]:
    """The GPU of every rank, counted among those visible to it; None on the CPU.

    Ranks of a node that see the same GPUs share them out in the order of the ranks. A launcher that
    shows each rank a GPU of its own works just as well.

    Raises:
        UserError: GPUs on some ranks only; more ranks than GPUs on a node.
    """
    for number, peer in enumerate(peers):
        if peer.device != peers[0].device:
            raise UserError(
                f"rank 0 ({peers[0].host}) would use {peers[0].device}, rank {number} "
                f"({peer.host}) {peer.device}: leave out the nodes without a GPU, or set "
                "GUIDED_DIFFUSION_DEVICE=cpu for all"
            )
    if peers[0].device == "cpu":
        return [None] * len(peers)
    indices: list[int | None] = []
    taken: set[tuple[str, str]] = set()
    for number, peer in enumerate(peers):
        before = [p for p in peers[:number] if (p.node, p.gpus) == (peer.node, peer.gpus)]
        index = len(before)
        gpu = peer.gpus[index] if index < len(peer.gpus) else None
        if gpu is None or (peer.node, gpu) in taken:
            ranks = sum(p.node == peer.node for p in peers)
            gpus = len({gpu for p in peers if p.node == peer.node for gpu in p.gpus})
            raise UserError(
                f"{ranks} ranks on {peer.host}, but {gpus} visible GPU(s): start one "
                "rank per GPU, make more GPUs visible (CUDA_VISIBLE_DEVICES), or set "
                "GUIDED_DIFFUSION_DEVICE=cpu"
            )
        taken.add((peer.node, gpu))
        indices.append(index)
    return indices


def _device_kind() -> str:
    asked = os.environ.get("GUIDED_DIFFUSION_DEVICE", "").lower()
    if asked not in ("", "cpu", "cuda"):
        raise UserError(f"GUIDED_DIFFUSION_DEVICE is {asked!r}; it may be cpu or cuda")
    if asked == "cpu":
        return "cpu"
    if th.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UserError(
            f"GUIDED_DIFFUSION_DEVICE is cuda, but torch sees no GPU on {socket.gethostname()} "
            f"(CUDA_VISIBLE_DEVICES is {visible!r})"
        )
    return "cpu"


def _timeout() -> float:
    text = os.environ.get("GUIDED_DIFFUSION_TIMEOUT", "")
    try:
        seconds = float(text or DEFAULT_TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"GUIDED_DIFFUSION_TIMEOUT is {text!r}; it must be a number of seconds")
    return seconds


def _describe_self() -> _Peer:
    host = socket.gethostname()
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            node = f"{host} {file.read().strip()}"
    except OSError:
        node = host
    device = _device_kind()
    if device == "cpu":
        return _Peer(host, node, device)
    # The identity and not the number: Slurm may show every rank another GPU, each as number 0.
    gpus = [str(th.cuda.get_device_properties(i).uuid) for i in range(th.cuda.device_count())]
    return _Peer(host, node, device, tuple(gpus))


def _refuse_together(rank: int, check: Any) -> Any:
    """Run a check that fails on all ranks alike, and let rank 0 alone speak."""
    try:
        return check()
    except UserError:
        if rank == 0:
            raise
        time.sleep(FIRST_WORD_S)  # a launcher may end rank 0 with the first rank that leaves
        sys.exit(EXIT_USER_ERROR)


def _meet(launch: Launch) -> tuple[dist.Store | None, Launch]:
    """Reach the store that all ranks share; the launch with its number of ranks and address."""
    if launch.kind == "mpi":
        return _meet_by_mpi(launch)
    host, port = launch.address
    wait = datetime.timedelta(seconds=MEET_S)
    try:
        if launch.rank != 0:
            _knock(host, port)
        if launch.kind == "torchrun":  # torchrun may run the store itself
            store, _, _ = next(dist.rendezvous("env://", timeout=wait))
        else:
            store = dist.TCPStore(
                host, port, launch.world_size, launch.rank == 0, wait, wait_for_workers=False
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(_unreachable(launch, host, port, error)) from error
    return store, launch


def _knock(host: str, port: int) -> None:
    """Wait until rank 0 listens. The store would wait too, but with pages of warnings."""
    last = time.monotonic() + MEET_S
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError:
            if time.monotonic() > last:
                raise
            time.sleep(0.2)


def _unreachable(launch: Launch, host: str, port: int, error: Exception) -> str:
    reason = str(error).splitlines()[0][:200]
    if launch.rank == 0:
        return f"rank 0 cannot listen at {host}:{port} ({reason}): set MASTER_PORT to a free port"
    return (
        f"rank {launch.rank} ({socket.gethostname()}) does not reach rank 0 at {host}:{port} "
        f"({reason}): check MASTER_ADDR, MASTER_PORT and firewalls"
    )


def _meet_by_mpi(launch: Launch) -> tuple[dist.Store | None, Launch]:
    """Agree over MPI on an address of rank 0; from then on MPI is not used."""

    def start_mpi() -> Any:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"mpiexec started several ranks, but mpi4py does not work ({reason}): install an "
                "MPI library (pip install .[mpi]), or start with torchrun, or start one process"
            ) from error
        world = MPI.COMM_WORLD
        if launch.world_size is not None and world.size != launch.world_size:
            library = MPI.Get_library_version().split("\n")[0].strip("\x00 ,")
            raise UserError(
                f"mpiexec started {launch.world_size} ranks, but the MPI library of mpi4py "
                f"({library}) sees {world.size}: use the mpiexec of that library"
            )
        return world

    world = _refuse_together(launch.rank, start_mpi)
    if world.size == 1:
        return None, Launch("mpi")
    hosts = world.allgather(socket.gethostname())
    wait = datetime.timedelta(seconds=MEET_S)
    port, trouble, store = int(os.environ.get("MASTER_PORT") or 0), None, None
    if world.rank == 0:
        try:
            store = dist.TCPStore("127.0.0.1", port, world.size, True, wait, wait_for_workers=False)
            port = store.port
        except RuntimeError as error:  # told to the others, who wait for the address
            trouble = _unreachable(launch, hosts[0], port, error)
    host = "127.0.0.1" if len(set(hosts)) == 1 else _own_address()
    host, port, trouble = world.bcast((host, port, trouble))
    launch = Launch("mpi", world.rank, world.size, (host, port))

    def connect() -> dist.Store:
        if trouble:
            raise UserError(trouble)
        if store is not None:
            return store
        _knock(host, port)
        return dist.TCPStore(host, port, world.size, False, wait)

    try:
        return _refuse_together(world.rank, connect), launch
    except (RuntimeError, OSError) as error:
        raise UserError(_unreachable(launch, host, port, error)) from error


def _own_address() -> str:
    """An address of this machine that others reach: MASTER_ADDR, else what its name stands for,
    else the address of the interface that leads out."""
    if os.environ.get("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"]
    try:
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    except OSError:
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, only asks for the route
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def _exchange(store: dist.Store, launch: Launch, me: _Peer) -> list[_Peer]:
    """All ranks' descriptions, in their order."""

    def wait_for(what: str) -> list[str]:
        keys = [f"{what}/{number}" for number in range(launch.world_size)]
        try:
            store.wait(keys, datetime.timedelta(seconds=MEET_S))
        except RuntimeError as error:
            missing = [number for number, key in enumerate(keys) if not store.check([key])]
            raise UserError(
                f"rank {launch.rank} ({me.host}) waited {MEET_S:.0f} s in vain for ranks "
                f"{missing}: did they start, and do they reach rank 0?"
            ) from error
        return keys

    store.set(f"peer/{launch.rank}", pickle.dumps(me))
    peers = [pickle.loads(store.get(key)) for key in wait_for("peer")]
    store.set(f"read/{launch.rank}", b"")
    if launch.rank == 0:
        wait_for("read")  # rank 0 may refuse what it has read and leave, and the store with it
    return peers


def _join(
    store: dist.Store, launch: Launch, peers: list[_Peer], device: th.device, timeout_s: float
) -> _World:
    """Form the process group, the control group and the watch."""
    me = peers[launch.rank]
    hosts = tuple(peer.host for peer in peers)
    one_node = len({peer.node for peer in peers}) == 1
    control_timeout = datetime.timedelta(seconds=timeout_s)
    if device.type == "cuda":
        th.cuda.set_device(device)
        dist.init_process_group(
            "nccl",
            store=dist.PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(seconds=timeout_s + NCCL_EXTRA_S),
            device_id=device,
        )
    else:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=control_timeout,
        )
    return _World(
        rank=launch.rank,
        local_rank=sum(peer.node == me.node for peer in peers[: launch.rank]),
        hosts=hosts,
        device=device,
        timeout_s=timeout_s,
        control=dist.new_group(backend="gloo", timeout=control_timeout),
        watch=Watch(store, launch.rank, hosts, launch.address[0], one_node),
    )


def _report(error: BaseException) -> int:
    """Tell all ranks of this rank's error, unless it is the echo of another's; the exit code."""
    text, code = describe(error)
    if isinstance(error, RuntimeError) and not isinstance(error, th.OutOfMemoryError):
        # A collective call breaks when another rank dies, and that one is to be named.
        verdict = _world.watch.verdict(ECHO_S)
        if verdict is not None:
            return verdict
    timeout = isinstance(error, RuntimeError) and "timed out" in text.lower()
    if timeout:
        text = f"no answer within {_world.timeout_s:g} s{_place(error)}"
    elif not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
        traceback.print_exception(error)
    return _world.watch.failed(text, code, timeout)


def _place(error: BaseException) -> str:
    """Where outside torch an error came up."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(os.path.dirname(th.__file__))
    ]
    return f" ({frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _at_exit() -> None:
    """For scripts without a failure_guard: say whether this rank ended well."""
    if _world is None or _world.watch is None:
        return
    error = getattr(sys, "last_value", None)
    if error is None:
        cleanup()
    else:
        leave(_world.watch.failed(*describe(error)))


def _num_bytes(tensors: list[th.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _broadcast(tensors: list[th.Tensor]) -> None:
    flat = th.cat([tensor.reshape(-1) for tensor in tensors])
    dist.broadcast(flat, src=0)
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(values.view(tensor.shape))
