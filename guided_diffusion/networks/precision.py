"""The precision in which networks compute: its default on each device, and autocast.

It is that of convolutions, attention and linear layers alone (autocast). Weights, losses, the
diffusion's arithmetic, probabilities, metrics, averages and the optimizer stay float32.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th

from guided_diffusion import dist_util
from guided_diffusion.runtime.command_line.precision_flag import AUTO
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.unet import SegmentationUNetModel

PRECISIONS = {"fp32": th.float32, "fp16": th.float16, "bf16": th.bfloat16}
_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def computes_bf16_faster() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones, in torch.

    Those with AMX do, at several times the rate. Others emulate bfloat16, or gain too little from
    AVX-512's instructions to make up for the conversions. Nothing is measured: on one machine the
    answer is always the same.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return (
        th.backends.mkldnn.is_available()
        # else torch's attention packs bfloat16 for AMX, then refuses to for want of AVX-512
        and th.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
        and (allowed in ("", "ALL", "DEFAULT") or "AMX" in allowed)
        and _cpu_has("_is_amx_tile_supported")
        and _cpu_has("_init_amx")  # the operating system grants the use of the tiles
    )


def _cpu_has(question: str) -> bool:
    """torch's answer to one of its private questions, False where it does not know it."""
    return bool(getattr(th.cpu, question, lambda: False)())


def default_on(device: th.device | str) -> str:
    """The precision of a network on a device where neither a flag nor an earlier run says it."""
    return "bf16" if th.device(device).type == "cpu" and computes_bf16_faster() else "fp32"


def default_of_all_ranks() -> str:
    """`default_on` the ranks' devices; fp32 if that is any rank's. Collective."""
    slower = int(default_on(dist_util.dev()) != "bf16")
    return "fp32" if dist_util.agree_max(slower) else "bf16"


class Choice(NamedTuple):
    """A precision, and what to tell the user about it, "" for nothing."""

    precision: str
    note: str = ""


def choose(
    precision: str, use_fp16: bool = False, began: str = "", use_fp16_changed: bool = False
) -> Choice:
    """The precision of a training. Collective.

    It may be "fp16" on a CPU, in a run that began on a GPU: `Stepper` then computes in float32.

    :param precision, use_fp16: the flags.
    :param began: the precision of the run that is resumed, "" for a new one.
    :param use_fp16_changed: whether that run began with the other value of use_fp16.
    """
    on_gpu = dist_util.dev().type == "cuda"
    given = precision not in AUTO
    if given:
        chosen = precision
    elif began and not use_fp16_changed:
        chosen = began
    elif use_fp16 and on_gpu:
        chosen = "fp16"
    elif began:
        chosen = "fp32" if began == "fp16" else began
    else:
        chosen = default_of_all_ranks()
    if not on_gpu and (chosen == "fp16" or (use_fp16 and not given)):
        name, there = _NAMES.get(chosen, "float32"), dist_util.dev().type
        there = "the CPU" if there == "cpu" else there
        return Choice(chosen, f"float16 needs CUDA: training in {name} on {there}")
    return Choice(chosen, _note(chosen, dist_util.dev(), given, bool(began)))


def choose_for(
    device: th.device | str, precision: str, began: str = "", default: str = ""
) -> Choice:
    """The precision in which a trained network predicts, or samples, on a device.

    :param precision: the flag.
    :param began: the precision of what the same command has done before, "" for nothing.
    :param default: by default that of `default_on`.
    :raises UserError: for fp16 on a CPU.
    """
    device, given = th.device(device), precision not in AUTO
    chosen = precision if given else began or default or default_on(device)
    check_precision(chosen, device)
    return Choice(chosen, _note(chosen, device, given, bool(began)))


def check_precision(precision: str, device: th.device) -> None:
    """:raises UserError: if there is no such precision, or not on this device."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs a GPU of CUDA: use bf16 or fp32")


def _note(precision: str, device: th.device, given: bool = False, began: bool = False) -> str:
    if precision != "bf16" or device.type != "cpu":
        return ""
    why = ", in which this began" if began and not given else ""
    if default_on(device) != "bf16":
        return f"precision bf16{why}: this processor gains little or nothing from it"
    if given:
        return ""
    if began:
        return f"precision bf16{why}"
    return "precision bf16: this processor computes it faster than fp32; --precision fp32 to change"


def autocast(precision: str, device: th.device | str) -> contextlib.AbstractContextManager:
    """The context in which a float32 network computes in a precision."""
    kind = th.device(device).type
    return th.autocast(kind, PRECISIONS[precision], enabled=precision != "fp32")


def in_precision(
    network: Callable[..., th.Tensor], precision: str, device: th.device | str
) -> Callable[..., th.Tensor]:
    """A network that computes in a precision: `network` itself for fp32."""
    if precision == "fp32":
        return network

    def call(*args: Any, **kwargs: Any) -> th.Tensor:
        with autocast(precision, device):
            return network(*args, **kwargs)

    return call


def store_weights(network: Any, precision: str, device: th.device | str) -> None:
    """Keep the weights of a folded network in the precision in which a CPU computes.

    Frozen weights would otherwise be cast at every call, which takes a tenth of the time of
    predicting a single image. Other networks, whose weights others may need, stay as they are.
    """
    if precision != "bf16" or th.device(device).type != "cpu":
        return
    if isinstance(network, SegmentationUNetModel) and network.is_folded:
        network.store_blocks_as(PRECISIONS[precision])
