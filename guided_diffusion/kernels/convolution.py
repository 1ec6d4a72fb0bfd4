"""Convolutions in bfloat16 with channels last, of weights stored in float32."""

import ctypes
from typing import Any

import torch as th
import torch.nn.functional as F

from guided_diffusion.kernels.library import function, is_plain, usable

# stride, padding and dilation
Settings = tuple[list[int], list[int], list[int]]

_MOST_POSITIONS = 25  # of a kernel whose weights weights.c reorders
# With so few positions in all images together, the weights' gradient is faster as one product
_FEW_POSITIONS = 1024


def serves(x: th.Tensor, weight: th.Tensor, groups: int) -> bool:
    """Whether `convolve` takes them: maps with channels last to be computed in bfloat16."""
    dtype = th.get_autocast_dtype("cpu") if th.is_autocast_enabled("cpu") else x.dtype
    return (
        usable(x)
        and dtype == th.bfloat16
        and is_plain(weight)
        and groups == 1
        and weight.dtype == th.float32
        and weight.ndim == 4
        and weight[0, 0].numel() <= _MOST_POSITIONS
        and weight.is_contiguous()
        and x.numel() > 0
    )


def convolve(
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> th.Tensor:
    """A 2D convolution; the weights' gradient is accumulated in float32.

    :param x: `[N x C x H x W]`.
    :param weight: `[O x C x h x w]` float32.
    :return: bfloat16 with channels last.
    """
    x = x.to(th.bfloat16).contiguous(memory_format=th.channels_last)
    settings = (list(stride), list(padding), list(dilation))
    with th.autocast("cpu", enabled=False):
        if not th.is_grad_enabled():
            return _forward(x, _to_bf16(weight), bias, settings)
        return _Convolution.apply(x, weight, bias, settings)


def _to_bf16(weight: th.Tensor) -> th.Tensor:
    """As bfloat16 with channels last."""
    out = th.empty_like(weight, dtype=th.bfloat16, memory_format=th.channels_last)
    _reorder("weights_to_bf16", weight, out)
    return out


def _to_fp32(weight: th.Tensor) -> th.Tensor:
    """The inverse of `_to_bf16`."""
    weight = weight.contiguous(memory_format=th.channels_last)
    out = th.empty(weight.shape, dtype=th.float32)
    _reorder("weights_to_fp32", weight, out)
    return out


def _reorder(name: str, source: th.Tensor, out: th.Tensor) -> None:
    outputs, channels, height, width = source.shape
    pointers = (ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    sizes = (ctypes.c_long(n) for n in (outputs, channels, height * width))
    function(name)(*pointers, *sizes)


def _forward(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None, settings: Settings
) -> th.Tensor:
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), *settings)


class _Convolution(th.autograd.Function):
    """Keeps the input alone; the weights are cast again, which takes a hundredth of the time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor | None,
        settings: Settings,
    ) -> th.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.bias = settings, None if bias is None else bias.dtype
        return _forward(x, _to_bf16(weight), bias, settings)

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight = _to_bf16(weight)
        grad = grad.contiguous(memory_format=th.channels_last)
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        few = len(x) * x.shape[2] * x.shape[3] <= _FEW_POSITIONS
        as_product = of_weight and few and _keeps_size(weight, ctx.settings)
        # torch computes the bias's gradient together with the weights'
        wanted = (of_x, of_weight and not as_product, of_bias and not as_product)
        stride, padding, dilation = ctx.settings
        one = (False, [0, 0], 1)  # neither transposed nor grouped
        grad_x, grad_weight, grad_bias = th.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)], stride, padding, dilation, *one, wanted
        )
        if as_product:
            grad_weight = _weight_gradient_3x3(x, grad)
            grad_bias = grad.sum((0, 2, 3)) if of_bias else None
        if grad_weight is not None:
            grad_weight = _to_fp32(grad_weight)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias)
        return grad_x, grad_weight, grad_bias, None


def _keeps_size(weight: th.Tensor, settings: Settings) -> bool:
    """Whether it is a 3x3 convolution whose output is as large as its input."""
    return weight.shape[2:] == (3, 3) and settings == ([1, 1], [1, 1], [1, 1])


def _weight_gradient_3x3(x: th.Tensor, grad: th.Tensor) -> th.Tensor:
    """One product of the output's gradient and the nine neighbours of each position (im2col)."""
    images, channels, height, width = x.shape
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    image, row, column, _ = rows.stride()
    # a row of the kernel's 3 columns lies side by side
    shape, strides = (images, height, width, 3, 3 * channels), (image, row, column, row, 1)
    columns = rows.as_strided(shape, strides).reshape(-1, 9 * channels)
    product = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1]).t() @ columns
    return product.view(-1, 3, 3, channels).permute(0, 3, 1, 2)
