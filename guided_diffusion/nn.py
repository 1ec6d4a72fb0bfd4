"""Layers shared by the networks: normalisation, embeddings, averaging of weights, checkpointing."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import guided_diffusion.kernels.attention  # noqa: F401 - registers itself with torch
from guided_diffusion.kernels import convolution, norms, winograd
from guided_diffusion.kernels.library import usable

# oneDNN computes a 3x3 convolution's output, and its input's gradient, at the rate of a matrix
# multiplication, but on CPUs without AVX-512 the weights' gradient at two thirds of it
_SLOW_WEIGHT_GRADIENT = th.backends.cpu.get_cpu_capability() == "AVX2"


def _products_pay(channels: int, positions: int) -> bool:
    """Whether matrix products are faster: not if they are too small for what copying costs."""
    return channels >= 192 or (channels >= 64 and positions >= 256)


class SiLU(nn.Module):
    """x * sigmoid(x), elementwise (arXiv 1606.08415)."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation in the precision of its input, with float32 statistics.

    torch's kernels accumulate mean and variance of half-precision input in float32, so neither
    the input nor the output needs a float32 copy. Autocast would make one; it is switched off.
    """

    def forward(self, x: th.Tensor) -> th.Tensor:
        if norms.serves(x):
            return norms.norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=False)
        if not x.is_floating_point() or x.dtype == th.float32:
            return super().forward(x)
        with th.autocast(x.device.type, enabled=False):
            weight, bias = (p if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)

    def silu(
        self, x: th.Tensor, scale: th.Tensor | None = None, shift: th.Tensor | None = None
    ) -> th.Tensor:
        """silu(norm(x) * (1 + scale) + shift) with fewer passes over the memory, and less of it.

        :param x: `[N x C x ...]`; `scale`, `shift`: `[N x C x 1 ...]` of the same type, or None.
        """
        if norms.serves(x):
            return norms.norm_silu(
                x, self.weight, self.bias, self.num_groups, self.eps, scale, shift
            )
        if x.device.type == "cpu" and not th.compiler.is_compiling():
            call = _NormSiLU.apply if th.is_grad_enabled() else _NormSiLU.forward
            return call(x, self.weight, self.bias, scale, shift, (self.num_groups, self.eps))
        y = self(x)
        if not th.is_grad_enabled():
            if scale is not None and shift is not None:
                th.addcmul(shift, y, scale + 1, out=y)
            return F.silu(y, inplace=True)
        if scale is not None and shift is not None:
            y = th.addcmul(shift, y, scale + 1)
        return F.silu(y)


class _NormSiLU(th.autograd.Function):
    """`GroupNorm32.silu`, keeping nothing but its input for the backward pass."""

    @staticmethod
    def _norm(
        x: th.Tensor, weight: th.Tensor, bias: th.Tensor, groups: int, eps: float
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        images, channels = x.shape[:2]
        positions = x.numel() // max(1, images * channels)
        with th.autocast("cpu", enabled=False):
            return th.native_group_norm(
                x.contiguous(), weight, bias, images, channels, positions, groups, eps
            )

    @staticmethod
    def forward(
        x: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor,
        scale: th.Tensor | None,
        shift: th.Tensor | None,
        settings: tuple[int, float],
    ) -> th.Tensor:
        y = _NormSiLU._norm(x, weight, bias, *settings)[0]
        if scale is not None and shift is not None:
            th.addcmul(shift, y, scale + 1, out=y)
        return F.silu(y, inplace=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: th.Tensor) -> None:
        *tensors, ctx.settings = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight, bias, scale, shift = ctx.saved_tensors
        normed, mean, rstd = _NormSiLU._norm(x, weight, bias, *ctx.settings)
        argument = normed if scale is None else th.addcmul(shift, normed, scale + 1)
        grad = th.ops.aten.silu_backward.grad_input(grad, argument, grad_input=argument)
        grad_scale = grad_shift = None
        if scale is not None:
            grad_scale = th.linalg.vecdot(grad.flatten(2), normed.flatten(2)).view_as(scale)
            grad_shift = grad.flatten(2).sum(2).view_as(shift)
            grad.mul_(scale + 1)
        needed = ctx.needs_input_grad
        grads = th.ops.aten.native_group_norm_backward(
            grad,
            x.contiguous(),
            mean,
            rstd,
            weight,
            *x.shape[:2],
            x.numel() // max(1, x.shape[0] * x.shape[1]),
            ctx.settings[0],
            needed[:3],
        )
        return *grads, grad_scale, grad_shift, None


def _channels_last_pays(x: th.Tensor) -> bool:
    """Whether 2D feature maps are kept with channels last: all kernels then are fast in it."""
    return x.dtype in (th.float32, th.bfloat16) and usable(x)


class Conv1d(nn.Conv1d):
    """A 1D convolution; one position wide, it is a matrix product that keeps its input's layout."""

    def _conv_forward(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        if x.ndim == 3 and x.stride(1) == 1 and self.kernel_size == (1,) and _channels_last_pays(x):
            return F.linear(x.transpose(1, 2), weight[:, :, 0], bias).transpose(1, 2)
        return super()._conv_forward(x, weight, bias)


class Conv2d(nn.Conv2d):
    """A 2D convolution; the weights' gradient of 3x3 ones is fast on CPUs without AVX-512 too."""

    @property
    def _is_pointwise(self) -> bool:
        """Whether it is a matrix product."""
        plain = self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        return plain and self.kernel_size == (1, 1)

    @property
    def _keeps_size(self) -> bool:
        """Whether a 3x3 kernel gives an output as large as the input."""
        plain = self.stride == (1, 1) and self.dilation == (1, 1) and self.groups == 1
        return plain and self.padding == (1, 1) and self.padding_mode == "zeros"

    def _conv_forward(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        if x.ndim == 4 and _channels_last_pays(x):
            x = x.contiguous(memory_format=th.channels_last)
            if self._is_pointwise:
                product = F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias)
                return product.permute(0, 3, 1, 2)
            padding = self.padding if self.padding_mode == "zeros" else "other"
            if convolution.serves(x, weight, self.groups) and not isinstance(padding, str):
                return convolution.convolve(x, weight, bias, self.stride, padding, self.dilation)
            if self._keeps_size and winograd.serves(x, weight):
                return winograd.convolve(x, weight, bias)
        elif (
            _SLOW_WEIGHT_GRADIENT
            and th.is_grad_enabled()
            and weight.requires_grad
            and x.device.type == "cpu"
            and x.dtype == weight.dtype == th.float32
            and x.ndim == 4
            and weight.shape[2:] == (3, 3)
            and _products_pay(min(weight.shape[:2]), x.shape[2] * x.shape[3])
            and self._keeps_size
            and not th.compiler.is_compiling()
            and not th.is_autocast_enabled("cpu")
        ):
            return _Convolution3x3.apply(x, weight, bias)
        return super()._conv_forward(x, weight, bias)


class _Convolution3x3(th.autograd.Function):
    """A 3x3 convolution with stride and padding 1."""

    @staticmethod
    def forward(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: th.Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            one, none = [1, 1], [0, 0]
            settings = (None, one, one, one, False, none, 1, (True, False, False))
            grad_x = th.ops.aten.convolution_backward(grad, x, weight, *settings)[0]
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient_3x3(x, grad)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def weight_gradient_3x3(x: th.Tensor, grad: th.Tensor) -> th.Tensor:
    """Gradient of a 3x3 convolution's weights (stride 1, padding 1) by matrix products.

    Three copies of an image, shifted by a column each, hold all that the three rows of the kernel
    see: a row further down is the same memory further on. So an image takes three products and
    three copies instead of nine (im2col).

    :param x: input `[N x C x H x W]`.
    :param grad: gradient of the output, `[N x O x H x W]`, contiguous.
    :return: `[O x C x 3 x 3]`.
    """
    images, channels, height, width = x.shape
    outputs = grad.shape[1]
    shifted = x.new_zeros(3, channels, height + 2, width)
    rows = shifted.view(3 * channels, -1)
    total = x.new_zeros(3, outputs, 3 * channels)
    for image, part in zip(x, grad.view(images, outputs, -1)):
        shifted[0, :, 1:-1, 1:] = image[..., :-1]
        shifted[1, :, 1:-1] = image
        shifted[2, :, 1:-1, :-1] = image[..., 1:]
        for row in range(3):
            seen = rows[:, row * width : (row + height) * width]
            total[row].addmm_(part, seen.t())
    return total.view(3, outputs, 3, channels).permute(1, 3, 0, 2).contiguous()


_CONVOLUTIONS = {1: Conv1d, 2: Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over `dims` spatial dimensions (1, 2 or 3)."""
    if dims not in _CONVOLUTIONS:
        raise ValueError(f"convolutions exist for 1, 2 and 3 dimensions, not for {dims}")
    return _CONVOLUTIONS[dims](*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A fully connected layer."""
    return nn.Linear(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pooling over `dims` spatial dimensions (1, 2 or 3)."""
    if dims not in _AVERAGE_POOLS:
        raise ValueError(f"average pooling exists for 1, 2 and 3 dimensions, not for {dims}")
    return _AVERAGE_POOLS[dims](*args, **kwargs)


@th.no_grad()
def update_ema(
    target_params: Iterable[th.Tensor], source_params: Iterable[th.Tensor], rate: float = 0.99
) -> None:
    """Move the averaged weights towards the current ones: target = rate target + (1-rate) source.

    :param target_params: tensors updated in place.
    :param source_params: tensors of the same shapes, in the same order.
    :param rate: in [0, 1]; the nearer to 1 the slower.
    """
    targets, sources = list(target_params), list(source_params)
    if targets:
        th._foreach_lerp_(targets, sources, 1 - rate)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it."""
    return scale_module(module, 0)


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter of `module` by `scale` and return it."""
    with th.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


def mean_flat(tensor: th.Tensor) -> th.Tensor:
    """Mean over all dimensions but the first: `[N x ...]` to `[N]`."""
    return tensor.flatten(1).mean(1) if tensor.ndim > 1 else tensor


def normalization(channels: int) -> nn.Module:
    """Group normalisation with 32 groups, or as many of them as divide `channels` evenly."""
    return GroupNorm32(math.gcd(32, channels), channels)


def timestep_embedding(timesteps: th.Tensor, dim: int, max_period: float = 10000) -> th.Tensor:
    """Sinusoids of geometrically falling frequency (arXiv 1706.03762, section 3.5).

    :param timesteps: `[N]`, may be fractional.
    :param dim: number of channels of the result; an odd one is filled up with a zero.
    :param max_period: period, in timesteps, that the lowest frequency approaches.
    :return: `[N x dim]` float32, cosines first.
    """
    half = dim // 2
    exponents = th.arange(half, dtype=th.float32, device=timesteps.device) / max(half, 1)
    angles = timesteps.float()[:, None] * th.exp(-math.log(max_period) * exponents)
    return F.pad(th.cat([angles.cos(), angles.sin()], dim=1), (0, dim - 2 * half))


def checkpoint(
    func: Callable, inputs: Sequence[th.Tensor], params: Iterable[th.Tensor], flag: bool
) -> th.Tensor:
    """Call `func(*inputs)`; with `flag`, keep only the inputs and recompute in the backward pass.

    Frozen parameters, autocast and dropout behave as without checkpointing. `params` is part of
    the signature for callers of the original package; autograd finds them by itself.
    """
    if not (flag and th.is_grad_enabled()):
        return func(*inputs)
    return recompute_in_backward(func, *inputs, use_reentrant=False)


class CheckpointFunction:
    """The original package's other name for `checkpoint`: `apply(func, n, *inputs, *params)`."""

    @staticmethod
    def apply(func: Callable, length: int, *args: th.Tensor) -> th.Tensor:
        return checkpoint(func, args[:length], args[length:], True)
