"""How the ranks of a run find each other, before there is a process group.

They share a key-value store (torch.distributed.Store) on rank 0. The launcher sets its address, or
rank 0 announces it over MPI, which is not used after that.
"""

import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch as th
import torch.distributed as dist

from guided_diffusion.runtime.errors import EXIT_USER_ERROR, UserError
from guided_diffusion.runtime.ranks import devices
from guided_diffusion.runtime.ranks.devices import Peer
from guided_diffusion.runtime.ranks.launch import Launch

# Seconds within which all ranks must have started.
START_TIMEOUT_S = 300.0
# Seconds that other ranks wait before they exit, so that rank 0 can print the error they share.
PRINT_FIRST_S = 2.0


@dataclass(frozen=True)
class Meeting:
    """What a rank knows once all have met."""

    rank: int
    store: dist.Store
    address: str  # where other nodes reach rank 0
    peers: Sequence[Peer]  # all ranks
    device: th.device  # of this rank


def meet(launch: Launch) -> Meeting | None:
    """Find the other ranks and share out the GPUs; None if there are no others. Collective.

    :raises UserError: mpi4py does not work under mpiexec; a rank does not start in time or cannot
        reach rank 0; no GPU for each rank. Where all ranks find the same error, it is raised on
        rank 0 and the others exit silently with code 2, so that it is printed once.
    """
    if launch.world_size == 1:
        return None
    if launch.address is None or launch.world_size is None:
        with _raised_once(launch.rank):
            world = _start_mpi(launch.world_size)
        if world.size == 1:
            return None
        rank, world_size = world.rank, world.size
        store, host = _open_store_over_mpi(world)
    else:
        rank, world_size, (host, port) = launch.rank, launch.world_size, launch.address
        store = _open_store(launch.kind, rank, world_size, host, port)
    with _raised_once(rank):
        me = devices.describe_self()
    peers = _exchange(store, rank, world_size, me)
    with _raised_once(rank):
        index = devices.choose_devices(peers)[rank]
    return Meeting(rank, store, host, peers, th.device(me.device, index))


@contextmanager
def _raised_once(rank: int) -> Iterator[None]:
    """Around a check that fails on all ranks alike: only rank 0 raises the error."""
    try:
        yield
    except UserError:
        if rank == 0:
            raise
        time.sleep(PRINT_FIRST_S)  # a launcher may kill rank 0 as soon as any rank exits
        sys.exit(EXIT_USER_ERROR)


def _open_store(kind: str, rank: int, world_size: int, host: str, port: int) -> dist.Store:
    """The store at an address that the launcher has set."""
    timeout = datetime.timedelta(seconds=START_TIMEOUT_S)
    try:
        if rank != 0:
            _wait_for_listener(host, port)
        if kind == "torchrun":  # torchrun may run the store itself
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            return store
        return dist.TCPStore(host, port, world_size, rank == 0, timeout, wait_for_workers=False)
    except (RuntimeError, ValueError, OSError) as error:
        raise _unreachable(rank, host, port, error) from error


def _start_mpi(world_size: int | None) -> Any:
    """MPI's communicator of all ranks.

    :param world_size: the number of ranks according to the launcher.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"mpiexec started several ranks, but mpi4py does not work ({reason}): install an "
            "MPI library (pip install .[mpi]), or start with torchrun, or start one process"
        ) from error
    world = MPI.COMM_WORLD
    if world_size is not None and world.size != world_size:
        library = MPI.Get_library_version().split("\n")[0].strip("\x00 ,")
        raise UserError(
            f"mpiexec started {world_size} ranks, but the MPI library of mpi4py "
            f"({library}) sees {world.size}: use the mpiexec of that library"
        )
    return world


def _open_store_over_mpi(world: Any) -> tuple[dist.Store, str]:
    """The store, and the address of rank 0, which announces it over MPI."""
    timeout = datetime.timedelta(seconds=START_TIMEOUT_S)
    hosts = world.allgather(socket.gethostname())
    host = "127.0.0.1" if len(set(hosts)) == 1 else _own_address()
    port, failure, store = int(os.environ.get("MASTER_PORT") or 0), None, None
    if world.rank == 0:
        try:
            store = dist.TCPStore(
                "127.0.0.1", port, world.size, True, timeout, wait_for_workers=False
            )
            port = store.port
        except RuntimeError as error:  # sent to the others, who wait for the address
            failure = _unreachable(0, hosts[0], port, error)
    host, port, failure = world.bcast((host, port, failure))
    if failure is not None:
        with _raised_once(world.rank):
            raise failure
    if store is None:
        try:
            _wait_for_listener(host, port)
            store = dist.TCPStore(host, port, world.size, False, timeout)
        except (RuntimeError, OSError) as error:
            raise _unreachable(world.rank, host, port, error) from error
    return store, host


def _wait_for_listener(host: str, port: int) -> None:
    """Wait until rank 0 listens. The store would wait too, but with pages of warnings."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _unreachable(rank: int, host: str, port: int, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:200]
    if rank == 0:
        return UserError(
            f"rank 0 cannot listen at {host}:{port} ({reason}): set MASTER_PORT to a free port"
        )
    return UserError(
        f"rank {rank} ({socket.gethostname()}) cannot reach rank 0 at {host}:{port} "
        f"({reason}): check MASTER_ADDR, MASTER_PORT and firewalls"
    )


def _own_address() -> str:
    """An address of this machine that others can reach: MASTER_ADDR, else what its name resolves
    to, else that of the interface with the default route."""
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
            probe.connect(("192.0.2.1", 9))  # sends nothing, only looks up the route
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def _exchange(store: dist.Store, rank: int, world_size: int, me: Peer) -> list[Peer]:
    """All ranks' descriptions of themselves, in the order of the ranks."""

    def wait_for_all(prefix: str) -> list[str]:
        keys = [f"{prefix}/{number}" for number in range(world_size)]
        try:
            store.wait(keys, datetime.timedelta(seconds=START_TIMEOUT_S))
        except RuntimeError as error:
            missing = [number for number, key in enumerate(keys) if not store.check([key])]
            raise UserError(
                f"rank {rank} ({me.host}) gave up waiting for ranks {missing} after "
                f"{START_TIMEOUT_S:.0f} s: did they start, and can they reach rank 0?"
            ) from error
        return keys

    store.set(f"peer/{rank}", json.dumps(astuple(me)))
    peers = []
    for key in wait_for_all("peer"):
        host, node, device, gpus, cores = json.loads(store.get(key))
        peers.append(Peer(host, node, device, tuple(gpus), tuple(cores)))
    store.set(f"read/{rank}", "")
    if rank == 0:
        wait_for_all("read")  # rank 0 may reject what it has read and exit, and the store with it
    return peers
