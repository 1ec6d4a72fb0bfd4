"""Which device each rank computes on.

GUIDED_DIFFUSION_DEVICE is cpu or cuda; by default cuda where a GPU is visible.
"""

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch as th

from guided_diffusion.runtime.errors import UserError


@dataclass(frozen=True)
class Peer:
    """What a rank reports to the others about itself."""

    host: str
    node: str  # distinguishes nodes with the same host name
    device: str  # "cuda" or "cpu"
    gpus: tuple[str, ...] = ()  # the UUIDs of its visible GPUs
    cores: tuple[int, ...] = (0,)  # the CPU cores that it may use


def device_type() -> str:
    """The kind of device of this process, "cuda" or "cpu".

    :raises UserError: if GUIDED_DIFFUSION_DEVICE is invalid, or cuda without a visible GPU.
    """
    wanted = os.environ.get("GUIDED_DIFFUSION_DEVICE", "").lower()
    if wanted not in ("", "cpu", "cuda"):
        raise UserError(f"GUIDED_DIFFUSION_DEVICE is {wanted!r}; it may be cpu or cuda")
    if wanted == "cpu":
        return "cpu"
    if th.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UserError(
            f"GUIDED_DIFFUSION_DEVICE is cuda, but torch sees no GPU on {socket.gethostname()} "
            f"(CUDA_VISIBLE_DEVICES is {visible!r})"
        )
    return "cpu"


def named_device(text: str) -> th.device | None:
    """The device that --device names: cpu, cuda or cuda:N; None for "", which leaves it open.

    :raises UserError: if there is none of that name here.
    """
    if not text:
        return None
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", text)
    if match is None:
        raise UserError(f"--device {text}: must be cpu, cuda, or cuda:N, such as cuda:1")
    gpus = th.cuda.device_count() if th.cuda.is_available() else 0
    if text != "cpu" and int(match[1] or 0) >= gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UserError(
            f"--device {text}: torch sees {gpus} GPUs on {socket.gethostname()}"
            f" (CUDA_VISIBLE_DEVICES is {visible!r}); use --device cpu"
        )
    return th.device(text)


def describe_self() -> Peer:
    """This process as the other ranks need to know it."""
    host = socket.gethostname()
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            node = f"{host} {file.read().strip()}"
    except OSError:
        node = host
    device, cores = device_type(), usable_cores()
    if device == "cpu":
        return Peer(host, node, device, cores=cores)
    # UUIDs, not indices: Slurm may show every rank a different GPU, each with index 0.
    gpus = [str(th.cuda.get_device_properties(i).uuid) for i in range(th.cuda.device_count())]
    return Peer(host, node, device, tuple(gpus), cores)


def usable_cores() -> tuple[int, ...]:
    """The CPU cores that this process may use."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)


def share_cores(peers: Sequence[Peer], rank: int) -> int:
    """The number of CPU cores for a rank: those that the ranks of its node may use, shared out."""
    local = [peer for peer in peers if peer.node == peers[rank].node]
    return max(1, len({core for peer in local for core in peer.cores}) // len(local))


def choose_devices(peers: Sequence[Peer]) -> list[int | None]:
    """The index of every rank's GPU among those visible to it; None on the CPU.

    Ranks of a node that see the same GPUs take one each, in the order of the ranks. A launcher that
    shows each rank only a GPU of its own works just as well.

    :raises UserError: if only some ranks have GPUs, or a node has more ranks than GPUs.
    """
    for rank, peer in enumerate(peers):
        if peer.device != peers[0].device:
            raise UserError(
                f"rank 0 ({peers[0].host}) would use {peers[0].device}, rank {rank} "
                f"({peer.host}) {peer.device}: leave out the nodes without a GPU, or set "
                "GUIDED_DIFFUSION_DEVICE=cpu for all"
            )
    if peers[0].device == "cpu":
        return [None] * len(peers)
    indices: list[int | None] = []
    taken: set[tuple[str, str]] = set()
    for rank, peer in enumerate(peers):
        index = sum((p.node, p.gpus) == (peer.node, peer.gpus) for p in peers[:rank])
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
