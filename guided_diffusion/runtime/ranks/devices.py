"""Which device each rank computes on.

The flag --device says it, or else GUIDED_DIFFUSION_DEVICE; by default it is cuda where a GPU is
visible, else cpu. mps, of Apple's processors, is used where asked for.
"""

import os
import platform
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch as th

from guided_diffusion.runtime import session
from guided_diffusion.runtime.errors import UserError


@dataclass(frozen=True)
class Peer:
    """What a rank reports to the others about itself."""

    host: str
    node: str  # distinguishes nodes with the same host name
    device: str  # "cuda" or "cpu"; see `describe_self`
    gpus: tuple[str, ...] = ()  # the UUIDs of its visible GPUs
    cores: tuple[int, ...] = (0,)  # the CPU cores that it may use


def device_type() -> str:
    """The kind of device of this process: "cuda", "mps" or "cpu".

    :raises UserError: if the flag or the variable names no device, or one that is not there.
    """
    return chosen_device().type


def chosen_device() -> th.device:
    """The device of this process, if it is the only one; with a number if the user gave one.

    :raises UserError: as `device_type`.
    """
    for source, text in (
        ("--device", session.current().device),
        ("GUIDED_DIFFUSION_DEVICE", os.environ.get("GUIDED_DIFFUSION_DEVICE", "").lower()),
    ):
        if text:
            return _checked(text, source)
    return th.device("cuda" if th.cuda.is_available() else "cpu")


def _checked(text: str, source: str) -> th.device:
    """The device that a flag or a variable names."""
    match = re.fullmatch(r"cpu|mps|cuda(?::(\d{1,4}))?", text)
    if match is None:
        raise UserError(f"{source} is {text!r}; it may be cpu, cuda, cuda:N (cuda:1) or mps")
    missing = ""
    enough = th.cuda.is_available() if match[1] is None else int(match[1]) < _gpus()
    if text.startswith("cuda") and not enough:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        missing = f"{_counted_gpus()} (CUDA_VISIBLE_DEVICES is {visible!r})"
    if text == "mps" and not th.backends.mps.is_available():
        missing = "no Apple GPU"
    if missing:
        there = " or ".join(_available())
        raise UserError(
            f"{source} is {text}, but torch sees {missing} on {socket.gethostname()}: use {there}"
        )
    return th.device(text)


def _gpus() -> int:
    """The number of GPUs that CUDA sees."""
    return th.cuda.device_count() if th.cuda.is_available() else 0


def _counted_gpus() -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(_gpus(), f"{_gpus()} GPUs")


def _available() -> list[str]:
    """The names of the devices that are here."""
    found = [f"cuda:{index}" for index in range(_gpus())] if _gpus() > 1 else ["cuda"] * _gpus()
    return [*found, *(["mps"] if th.backends.mps.is_available() else []), "cpu"]


def of_float64(device: th.device) -> th.device:
    """Where sums in float64 of a device's numbers are kept: mps has no float64."""
    return th.device("cpu") if device.type == "mps" else device


def described(device: th.device) -> str:
    """A device in words, such as "cuda:0 (NVIDIA H200)"."""
    if device.type == "cuda":
        index = th.cuda.current_device() if device.index is None else device.index
        return f"cuda:{index} ({th.cuda.get_device_name(index)})"
    if device.type == "mps":
        return f"mps ({platform.processor() or platform.machine()})"
    return f"cpu ({th.get_num_threads()} threads)"


def describe_self() -> Peer:
    """This process as the other ranks need to know it."""
    host = socket.gethostname()
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            node = f"{host} {file.read().strip()}"
    except OSError:
        node = host
    chosen, cores = chosen_device(), usable_cores()
    device = chosen.type
    if chosen.index is not None or device == "mps":
        raise UserError(
            f"the device {chosen} is for one process: with several, each takes a GPU of its own;"
            " use cuda or cpu, and CUDA_VISIBLE_DEVICES to choose among GPUs"
        )
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
