"""Attention over projections with channels last: AVX-512 in float32, AMX in bfloat16.

Importing this module registers `torch.ops.guided_diffusion.attention`, by which unet.py finds it,
which also works without this package.
"""

import ctypes
from typing import Any

import torch as th

from guided_diffusion.kernels.library import call, has_amx, usable

_POINTERS = "q k v out log_sums grad grad_q grad_k grad_v"
_SIZES = "images heads positions channels"
_STRIDES = "qkv_image qkv_head qkv_position out_image out_head out_position"
_DEPTH = 32  # channels of a head come in multiples of it
_MOST_CHANNELS = 256  # of a head

_LIBRARY = th.library.Library("guided_diffusion", "DEF")


class _Arguments(ctypes.Structure):
    """The C struct `Attention` of attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_long) for name in f"{_SIZES} {_STRIDES}".split()),
    )


def serves(qkv: th.Tensor, heads: int) -> bool:
    """Whether `attention` takes `qkv` of so many heads."""
    channels = qkv.shape[1] // (3 * heads)
    return (
        usable(qkv)
        and qkv.stride(1) == 1
        and channels % _DEPTH == 0
        and 0 < channels <= _MOST_CHANNELS
        and qkv.numel() > 0
        and _type_of(qkv) in ((th.float32, th.bfloat16) if has_amx() else (th.float32,))
    )


def _type_of(qkv: th.Tensor) -> th.dtype:
    """In what type it is computed."""
    autocast = qkv.dtype == th.float32 and th.is_autocast_enabled("cpu")
    return th.get_autocast_dtype("cpu") if autocast else qkv.dtype


def attention(qkv: th.Tensor, heads: int, grouped_by_head: bool) -> th.Tensor:
    """softmax(q k^T / sqrt(C)) v for `[N x 3*heads*C x T]`, as `[N x heads*C x T]`.

    :param qkv: float32 or bfloat16, channels last (stride 1); C a multiple of 32.
    :param grouped_by_head: channels are q, k, v of head 0, then of head 1, and so on; otherwise q
        of all heads, then k, then v.
    """
    rows = qkv.transpose(1, 2).to(_type_of(qkv)).contiguous()
    out = _Attention.apply(rows, heads, grouped_by_head)
    return out.transpose(1, 2)


def _run(direction: str, rows: th.Tensor, arguments: _Arguments) -> None:
    call(f"attention_{direction}_{'bf16' if rows.dtype == th.bfloat16 else 'fp32'}", arguments)


class _Attention(th.autograd.Function):
    """Rows `[N x T x 3*heads*C]` to `[N x T x heads*C]`.

    Keeps its input, its output and one number per query and head for the backward pass.
    """

    @staticmethod
    def _arguments(
        rows: th.Tensor, heads: int, grouped_by_head: bool, tensors: dict[str, th.Tensor]
    ) -> _Arguments:
        images, positions, width = rows.shape
        channels = width // (3 * heads)
        size = rows.element_size()
        between, of_head = (channels, 3 * channels) if grouped_by_head else (width // 3, channels)
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        for prefix in ("", "grad_"):
            if f"{prefix}rows" in pointers:
                start = pointers.pop(f"{prefix}rows")
                for i, name in enumerate("qkv"):
                    pointers[prefix + name] = start + i * between * size
        return _Arguments(
            images=images,
            heads=heads,
            positions=positions,
            channels=channels,
            qkv_image=positions * width,
            qkv_head=of_head,
            qkv_position=width,
            out_image=positions * width // 3,
            out_head=channels,
            out_position=width // 3,
            **pointers,
        )

    @staticmethod
    def forward(ctx: Any, rows: th.Tensor, heads: int, grouped_by_head: bool) -> th.Tensor:
        images, positions, width = rows.shape
        out = rows.new_empty(images, positions, width // 3)
        log_sums = rows.new_empty(images, heads, positions, dtype=th.float32)
        tensors = {"rows": rows, "out": out, "log_sums": log_sums}
        _run("forward", rows, _Attention._arguments(rows, heads, grouped_by_head, tensors))
        ctx.heads, ctx.grouped_by_head = heads, grouped_by_head
        ctx.save_for_backward(rows, out, log_sums)
        return out

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        rows, out, log_sums = ctx.saved_tensors
        grad = grad.to(rows.dtype).contiguous()
        grad_rows = th.empty_like(rows)
        tensors = {"rows": rows, "out": out, "log_sums": log_sums}
        tensors |= {"grad": grad, "grad_rows": grad_rows}
        arguments = _Attention._arguments(rows, ctx.heads, ctx.grouped_by_head, tensors)
        _run("backward", rows, arguments)
        return grad_rows, None, None


_LIBRARY.define("attention(Tensor qkv, int heads, bool grouped_by_head) -> Tensor")
_LIBRARY.impl("attention", attention, "CompositeImplicitAutograd")
_LIBRARY.define("attention_serves(Tensor qkv, int heads) -> bool")
_LIBRARY.impl("attention_serves", serves, "CompositeImplicitAutograd")
