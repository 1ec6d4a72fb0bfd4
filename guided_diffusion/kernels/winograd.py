"""3x3 convolutions in float32 with channels last, by Winograd's minimal filtering.

Its transforms need additions and halves alone, so that the result is no less exact than the
definition's (arXiv 1509.09308).
"""

import ctypes
from typing import Any

import torch as th

from guided_diffusion.kernels.library import call, function, is_plain, usable

_LANES = 16  # channels come in multiples of it
_POINTS = 16
_FEWEST_POSITIONS = 128  # in all images: for fewer, transforming the weights does not pay


class _Arguments(ctypes.Structure):
    """The C struct `Winograd` of winograd.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "grad", "weights", "bias", "out")),
        *((name, ctypes.c_long) for name in ("images", "height", "width", "channels", "outputs")),
    )


def _arguments(x: th.Tensor, outputs: int, **tensors: th.Tensor | None) -> _Arguments:
    images, channels, height, width = x.shape
    pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
    sizes = {"images": images, "height": height, "width": width, "channels": channels}
    return _Arguments(x=x.data_ptr(), outputs=outputs, **sizes, **pointers)


def serves(x: th.Tensor, weight: th.Tensor) -> bool:
    """Whether `convolve` takes a float32 map with channels last and 3x3 weights, and is faster."""
    return (
        usable(x)
        and is_plain(weight)
        and x.dtype == weight.dtype == th.float32
        and not th.is_autocast_enabled("cpu")
        and weight.shape[2:] == (3, 3)
        and weight.is_contiguous()
        and not (weight.shape[0] % _LANES or weight.shape[1] % _LANES)
        and len(x) * x.shape[2] * x.shape[3] >= _FEWEST_POSITIONS
    )


def convolve(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    """A 3x3 convolution with stride and padding 1.

    :param x: `[N x C x H x W]` float32 with channels last; C and O multiples of 16.
    :param weight: `[O x C x 3 x 3]` float32.
    :param bias: `[O]` float32 or None.
    :return: `[N x O x H x W]` with channels last.
    """
    if th.is_grad_enabled():
        return _Convolution.apply(x, weight, bias)
    return _convolve(x, weight, bias, turned=False)


def _convolve(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None, turned: bool) -> th.Tensor:
    """`turned`: with the weights turned by half a turn, from outputs to channels."""
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    outputs, channels = weight.shape[:2]
    images, _, height, width = x.shape
    transformed = weight.new_empty(_POINTS * weight.numel() // 9)
    sizes = (ctypes.c_long(outputs), ctypes.c_long(channels), ctypes.c_int(turned))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (weight, transformed))
    function("winograd_weights")(*pointers, *sizes)
    if turned:
        outputs = channels
    out = th.empty((images, outputs, height, width), dtype=x.dtype, memory_format=th.channels_last)
    call("winograd_convolve", _arguments(x, outputs, out=out, weights=transformed, bias=bias))
    return out


class _Convolution(th.autograd.Function):
    """Keeps input and weights; the gradients are computed in the same way."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias, turned=False)

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=th.channels_last)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolve(grad, weight, None, turned=True)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.permute(0, 2, 3, 1).flatten(0, 2).sum(0)
        return grad_x, grad_weight, grad_bias


def _weight_gradient(x: th.Tensor, grad: th.Tensor) -> th.Tensor:
    outputs = grad.shape[1]
    out = x.new_empty(outputs, x.shape[1], 3, 3)
    call("winograd_weight_gradient", _arguments(x, outputs, grad=grad, out=out))
    return out
