"""silu(norm(x) * (1 + scale) + shift) over feature maps with channels last, in few passes."""

import ctypes
from typing import Any

import torch as th

from guided_diffusion.kernels.library import call, usable

_POINTERS = "x grad out weight bias scale shift statistics"
_GRADIENTS = "grad_weight grad_bias grad_scale grad_shift"
_SIZES = "images positions channels groups steer_stride"


class _Arguments(ctypes.Structure):
    """The C struct `Norm` of norm_silu.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in f"{_POINTERS} {_GRADIENTS}".split()),
        *((name, ctypes.c_long) for name in _SIZES.split()),
        ("eps", ctypes.c_float),
        ("bf16", ctypes.c_int),
        ("silu", ctypes.c_int),
    )


def serves(x: th.Tensor) -> bool:
    """Whether the kernels take `x`: `[N x C x H x W]`, channels last, float32 or bfloat16."""
    return (
        usable(x)
        and x.ndim == 4
        and x.dtype in (th.float32, th.bfloat16)
        and x.is_contiguous(memory_format=th.channels_last)
        and x.numel() > 0
    )


def norm_silu(
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor,
    groups: int,
    eps: float,
    scale: th.Tensor | None = None,
    shift: th.Tensor | None = None,
    silu: bool = True,
) -> th.Tensor:
    """silu(norm(x) * (1 + scale) + shift), in the type of `x`, with float32 arithmetic.

    :param x: see `serves`.
    :param weight: of the group normalisation, like `bias`: `[C]` float32.
    :param groups: of channels.
    :param eps: added to each group's variance.
    :param scale: like `shift`: `[N x C x 1 x 1]`, or None.
    :param silu: False leaves the activation out.
    """
    inputs = (x, weight, bias, scale, shift, (groups, eps, silu))
    return _NormSiLU.apply(*inputs) if th.is_grad_enabled() else _NormSiLU.compute(*inputs)[0]


def _pointer(tensor: th.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _NormSiLU(th.autograd.Function):
    """Keeps its input and the statistics for the backward pass."""

    @staticmethod
    def _arguments(
        x: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor,
        steer: th.Tensor | None,
        statistics: th.Tensor,
        settings: tuple[int, float, bool],
        **pointers: int | None,
    ) -> _Arguments:
        groups, eps, silu = settings
        images, channels, height, width = x.shape
        if steer is not None:
            pointers |= {"scale": steer.data_ptr(), "shift": steer[:, channels:].data_ptr()}
        return _Arguments(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=bias.data_ptr(),
            statistics=statistics.data_ptr(),
            images=images,
            positions=height * width,
            channels=channels,
            groups=groups,
            steer_stride=2 * channels,
            eps=eps,
            bf16=x.dtype == th.bfloat16,
            silu=silu,
            **pointers,
        )

    @staticmethod
    def compute(
        x: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor,
        scale: th.Tensor | None,
        shift: th.Tensor | None,
        settings: tuple[int, float, bool],
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """The result, the statistics, and scale and shift side by side."""
        steer = None
        if scale is not None and shift is not None:
            steer = th.cat([scale.flatten(1), shift.flatten(1)], 1).float()
        y = th.empty_like(x)
        statistics = x.new_empty(len(x), 2, settings[0], dtype=th.float32)
        weight, bias = weight.float(), bias.float()
        arguments = _NormSiLU._arguments(
            x, weight, bias, steer, statistics, settings, out=y.data_ptr()
        )
        call("norm_silu_forward", arguments)
        return y, statistics, steer

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> th.Tensor:
        x, weight, bias, scale, _, ctx.settings = inputs
        y, statistics, steer = _NormSiLU.compute(*inputs)
        ctx.scale = None if scale is None else (scale.shape, scale.dtype)
        ctx.save_for_backward(x, weight, bias, statistics, steer)
        return y

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight, bias, statistics, steer = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=th.channels_last)
        images, channels = x.shape[:2]
        needs_x = ctx.needs_input_grad[0]
        grad_x = th.empty_like(x) if needs_x else None
        of_weight, of_bias = statistics.new_empty(2, images, channels)
        of_scale = of_shift = None
        if steer is not None:
            of_scale, of_shift = statistics.new_empty(2, images, channels)
        weight32, bias32 = weight.float(), bias.float()
        arguments = _NormSiLU._arguments(
            x,
            weight32,
            bias32,
            steer,
            statistics,
            ctx.settings,
            grad=grad.data_ptr(),
            out=_pointer(grad_x),
            grad_weight=of_weight.data_ptr(),
            grad_bias=of_bias.data_ptr(),
            grad_scale=_pointer(of_scale),
            grad_shift=_pointer(of_shift),
        )
        call("norm_silu_backward", arguments)
        if of_scale is not None and of_shift is not None:
            shape, dtype = ctx.scale
            of_scale, of_shift = (g.to(dtype).view(shape) for g in (of_scale, of_shift))
        of_weight, of_bias = of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(bias.dtype)
        return grad_x, of_weight, of_bias, of_scale, of_shift, None
