"""The networks of arXiv 2105.05233, and a segmentation network built on the same U-Net.

This file is a drop-in replacement for guided-diffusion's own `unet.py`: beyond torch it needs only
the names imported below, and every class keeps its constructor and its state_dict.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from .fp16_util import convert_module_to_f16, convert_module_to_f32
from .nn import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)

# the value of use_checkpoint that recomputes only normalisation, activation and resampling
NORMS = "norms"


class TimestepBlock(nn.Module):
    """A module whose forward also takes the timestep embedding `[N x E]`."""

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that passes the timestep embedding to the layers that take one."""

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Double the spatial size by nearest-neighbour upsampling, then optionally convolve.

    :param channels: channels of the input.
    :param use_conv: follow with a 3x3 convolution.
    :param dims: number of spatial dimensions; with 3, the first keeps its size.
    :param out_channels: channels after the convolution; defaults to `channels`.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, self.channels, self.out_channels, 3, padding=1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        _expect_channels(x, self.channels)
        if _is_contiguous_on_cpu(x) and self.dims == 2 and not _is_tracing():
            x = _upsample_nearest_2x(x)
        else:
            factors = (1.0, 2.0, 2.0) if self.dims == 3 else (2.0,) * self.dims
            x = F.interpolate(x, scale_factor=factors, mode="nearest")
        return self.conv(x) if self.use_conv else x


def _upsample_nearest_2x(x: th.Tensor) -> th.Tensor:
    """Upsample `[N x C x H x W]` to `[N x C x 2H x 2W]`; on CPU, faster than `F.interpolate`."""
    n, c, h, w = x.shape
    rows = x[..., None].expand(n, c, h, w, 2).reshape(n, c, h, 1, 2 * w)
    return rows.expand(n, c, h, 2, 2 * w).reshape(n, c, 2 * h, 2 * w)


def _is_contiguous_on_cpu(x: th.Tensor) -> bool:
    """Whether torch's own upsampling is slow: it is not with channels last."""
    return x.device.type == "cpu" and x.is_contiguous()


def _is_tracing() -> bool:
    """Whether the network is being compiled or traced, when sizes must stay symbolic."""
    return th.compiler.is_compiling() or th.jit.is_tracing()


class Downsample(nn.Module):
    """Halve the spatial size with a strided 3x3 convolution or average pooling.

    :param channels: channels of the input.
    :param use_conv: convolve instead of average pooling.
    :param dims: number of spatial dimensions; with 3, the first keeps its size.
    :param out_channels: channels after the convolution; defaults to `channels`.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, self.channels, self.out_channels, 3, stride=stride, padding=1)
        elif self.out_channels != self.channels:
            raise ValueError("averaging cannot change the number of channels: set use_conv=True")
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: th.Tensor) -> th.Tensor:
        _expect_channels(x, self.channels)
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block of two normalised convolutions, conditioned on the timestep embedding.

    :param channels: channels of the input.
    :param emb_channels: length E of the timestep embedding.
    :param dropout: dropout probability before the second convolution, in [0, 1].
    :param out_channels: channels of the output; defaults to `channels`.
    :param use_conv: if the number of channels changes, use a 3x3 skip convolution instead of 1x1.
    :param use_scale_shift_norm: the embedding scales and shifts the second norm's output
        (adaptive group normalisation, arXiv 2105.05233 section 3.1) instead of being added.
    :param dims: number of spatial dimensions.
    :param use_checkpoint: recompute activations in the backward pass: True for the whole block,
        "norms" only for the outputs of normalisation, activation and resampling.
    :param up: upsample by 2 inside the block.
    :param down: downsample by 2 inside the block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool | str = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down
        self.folded = False

        self.in_layers = nn.Sequential(
            normalization(channels),
            nn.SiLU(),
            conv_nd(dims, channels, self.out_channels, 3, padding=1),
        )
        self.resample: nn.Module
        if up:
            self.resample = Upsample(channels, False, dims)
        elif down:
            self.resample = Downsample(channels, False, dims)
        else:
            self.resample = nn.Identity()
        embedded = 2 * self.out_channels if use_scale_shift_norm else self.out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, embedded))
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        else:
            kernel = 3 if use_conv else 1
            self.skip_connection = conv_nd(
                dims, channels, self.out_channels, kernel, padding=kernel // 2
            )

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        """`[N x C x ...]` and `[N x E]` to `[N x out_channels x ...]`."""
        return checkpoint(
            self._forward, (x, emb), self.parameters(), _checkpoints_block(self.use_checkpoint)
        )

    def _forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        h = self._conv_recomputing_input(
            self.in_layers[-1], functools.partial(self._in_layers_forward, x)
        )
        norm, activation, dropout, conv = self.out_layers
        steer = ()
        if not self.folded:
            with _without_autocast(emb.device.type):  # few numbers: casting takes longer than that
                embedded = self.emb_layers(emb).to(h.dtype)
            embedded = embedded[(...,) + (None,) * (h.ndim - 2)]
            if self.use_scale_shift_norm:
                steer = embedded.chunk(2, dim=1)
            else:
                h = h + embedded
        h = self._conv_recomputing_input(
            conv, functools.partial(_norm_silu, norm, activation, h, *steer), dropout
        )
        return self.skip_connection(self.resample(x)) + h

    def _in_layers_forward(self, x: th.Tensor) -> th.Tensor:
        norm, activation, _ = self.in_layers
        return self.resample(_norm_silu(norm, activation, x))

    def _conv_recomputing_input(
        self, conv: nn.Module, compute: Callable[[], th.Tensor], dropout: nn.Module | None = None
    ) -> th.Tensor:
        """conv(dropout(compute())); with "norms", recompute the input unless dropout is active."""
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
            return conv(dropout(compute()))
        return _apply_recomputing_input(conv, compute, self.use_checkpoint == NORMS)

    @th.no_grad()
    def fold(self, emb: th.Tensor) -> None:
        """Fold a constant embedding `[1 x E]` into the weights; `emb` is ignored afterwards."""
        steer = self.emb_layers(emb)[0]
        if self.use_scale_shift_norm:
            scale, shift = steer.chunk(2)
            bias = self.out_layers.get_parameter("0.bias")
            bias.copy_(bias * (1 + scale) + shift)
            self.out_layers.get_parameter("0.weight").mul_(1 + scale)
        else:
            self.in_layers.get_parameter("2.bias").add_(steer)
        self.folded = True


def _checkpoints_block(use_checkpoint: bool | str) -> bool:
    """Whether a block saves only its inputs for the backward pass."""
    return bool(use_checkpoint) and use_checkpoint != NORMS


def _apply_recomputing_input(
    layer: nn.Module, compute: Callable[[], th.Tensor], flag: bool
) -> th.Tensor:
    """layer(compute()); with `flag`, recompute the layer's input in the backward pass.

    Meant for inputs that are large but cheap to compute, such as the normalised activations that
    a convolution saves for its weight gradient. torch.compile makes this choice by itself.

    :param compute: deterministic, and a function of tensors that autograd saves anyway.
    """
    h = compute()
    if not flag or not th.is_grad_enabled() or th.compiler.is_compiling():
        return layer(h)
    recomputable = h.data_ptr(), h.numel(), h.dtype

    def pack(saved: th.Tensor) -> th.Tensor | tuple[th.Size, tuple[int, ...]]:
        if (saved.data_ptr(), saved.numel(), saved.dtype) == recomputable:
            return saved.shape, saved.stride()
        return saved

    def unpack(kept: th.Tensor | tuple[th.Size, tuple[int, ...]]) -> th.Tensor:
        if isinstance(kept, th.Tensor):
            return kept
        with th.no_grad():
            return compute().as_strided(*kept)

    with th.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(h)


def _norm_silu(
    norm: nn.Module,
    activation: nn.Module,
    x: th.Tensor,
    scale: th.Tensor | None = None,
    shift: th.Tensor | None = None,
) -> th.Tensor:
    """activation(norm(x) * (1 + scale) + shift), fused if `norm` is a GroupNorm32."""
    fused: Callable[..., th.Tensor] | None = getattr(norm, "silu", None)
    if fused is not None:
        return fused(x, scale, shift)
    h = norm(x)
    if scale is not None and shift is not None:
        h = th.addcmul(shift, h, scale + 1)
    return activation(h)


class AttentionBlock(nn.Module):
    """Residual self-attention over all spatial positions.

    :param channels: channels of input and output.
    :param num_heads: number of heads, used if `num_head_channels` is -1.
    :param num_head_channels: channels per head; overrides `num_heads`.
    :param use_checkpoint: recompute activations in the backward pass: True for the whole block,
        "norms" only for the output of normalisation.
    :param use_new_attention_order: split queries, keys and values before splitting heads.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool | str = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if self.num_heads < 1 or channels % self.num_heads:
            raise ValueError(
                f"{channels} channels cannot be shared out among attention heads "
                f"(num_heads={num_heads}, num_head_channels={num_head_channels})"
            )
        if num_head_channels != -1 and channels % num_head_channels:
            raise ValueError(
                f"{channels} channels are not a multiple of num_head_channels={num_head_channels}"
            )
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        order = QKVAttention if use_new_attention_order else QKVAttentionLegacy
        self.attention = order(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return checkpoint(
            self._forward, (x,), self.parameters(), _checkpoints_block(self.use_checkpoint)
        )

    def _forward(self, x: th.Tensor) -> th.Tensor:
        compute = functools.partial(self._flat_norm, x)
        # with channels last a norm takes hardly any time, compared with attention
        recompute = self.use_checkpoint == NORMS or (x.ndim == 4 and x.stride(1) == 1)
        h = _apply_recomputing_input(self.qkv, compute, recompute)
        return x + self.proj_out(self.attention(h)).view_as(x)

    def _flat_norm(self, x: th.Tensor) -> th.Tensor:
        return self.norm(x).flatten(2)


def count_flops_attn(model: Any, _x: Any, y: Sequence[th.Tensor]) -> None:
    """Add an attention layer's operations to `model.total_ops`, for the `thop` package.

    Counts two matrix products of T x T x C; `y[0]` is the output, `[N x C x ...]`.
    """
    batch, channels, *positions = y[0].shape
    model.total_ops += th.DoubleTensor([4 * batch * math.prod(positions) ** 2 * channels])


def _kernel_attention(qkv: th.Tensor, heads: int, grouped_by_head: bool) -> th.Tensor | None:
    """Attention by a kernel registered with torch; None without one for this input."""
    if _is_tracing() or not hasattr(th.ops.guided_diffusion, "attention"):
        return None
    if not th.ops.guided_diffusion.attention_serves(qkv, heads):
        return None
    return th.ops.guided_diffusion.attention(qkv, heads, grouped_by_head)


def _scaled_dot_product(q: th.Tensor, k: th.Tensor, v: th.Tensor) -> th.Tensor:
    """softmax(q^T k / sqrt(C)) v for `[N x heads x C x T]`, as `[N x heads*C x T]`."""
    # the fused kernels need each position's channels side by side
    q, k, v = (part.transpose(-1, -2) for part in (q, k, v))
    if q.stride(-1) != 1:
        q, k, v = (part.contiguous() for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2).transpose(1, 2)


class QKVAttentionLegacy(nn.Module):
    """Attention over channels grouped by head: q, k, v of head 0, then of head 1, and so on."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: th.Tensor) -> th.Tensor:
        """`[N x (heads * 3 * C) x T]` to `[N x (heads * C) x T]`."""
        out = _kernel_attention(qkv, self.n_heads, grouped_by_head=True)
        if out is None:
            out = _scaled_dot_product(*qkv.unflatten(1, (self.n_heads, 3, -1)).unbind(2))
        return out

    @staticmethod
    def count_flops(model: Any, _x: Any, y: Sequence[th.Tensor]) -> None:
        count_flops_attn(model, _x, y)


class QKVAttention(nn.Module):
    """Attention over channels grouped by role: q of all heads, then k, then v."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: th.Tensor) -> th.Tensor:
        """`[N x (3 * heads * C) x T]` to `[N x (heads * C) x T]`."""
        out = _kernel_attention(qkv, self.n_heads, grouped_by_head=False)
        if out is None:
            out = _scaled_dot_product(*qkv.unflatten(1, (3, self.n_heads, -1)).unbind(1))
        return out

    @staticmethod
    def count_flops(model: Any, _x: Any, y: Sequence[th.Tensor]) -> None:
        count_flops_attn(model, _x, y)


class AttentionPool2d(nn.Module):
    """Attention pooling with the mean as the query (CLIP, arXiv 2103.00020).

    :param spacial_dim: height and width of the feature map.
    :param embed_dim: channels C of the feature map.
    :param num_heads_channels: channels per head.
    :param output_dim: length of the result; defaults to C.
    """

    def __init__(
        self,
        spacial_dim: int,
        embed_dim: int,
        num_heads_channels: int,
        output_dim: int | None = None,
    ):
        super().__init__()
        positions = spacial_dim**2 + 1
        self.positional_embedding = nn.Parameter(th.randn(embed_dim, positions) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """`[N x C x spacial_dim x spacial_dim]` to `[N x output_dim]`."""
        x = x.flatten(2)
        x = th.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)
        x = x + self.positional_embedding.to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]


def _expect_channels(x: th.Tensor, channels: int) -> None:
    if x.shape[1] != channels:
        raise ValueError(f"expected {channels} channels, got a tensor of shape {tuple(x.shape)}")


class _EncoderTrunk(nn.Module):
    """What all networks here share: timestep embedding, encoder and middle block.

    The arguments are documented at UNetModel. Attributes for subclasses: `_channels`, the middle
    block's width; `_skip_channels`, the width of each input block's output; `_downsampling`, the
    factor between the input and the middle block.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool | str = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = tuple(channel_mult)
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.dtype = th.float16 if use_fp16 else th.float32
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resblock_updown = resblock_updown
        self.use_new_attention_order = use_new_attention_order

        self._emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            linear(model_channels, self._emb_channels),
            nn.SiLU(),
            linear(self._emb_channels, self._emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self._emb_channels)

        width = self._width(0)
        first = conv_nd(dims, in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        self._skip_channels = [width]
        self._downsampling = 1
        for level in range(len(self.channel_mult)):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [self._res_block(width, self._width(level))]
                width = self._width(level)
                layers += self._maybe_attention(width, self.num_heads)
                self._append_input_block(TimestepEmbedSequential(*layers), width)
            if level < len(self.channel_mult) - 1:
                shrink: nn.Module
                if resblock_updown:
                    shrink = self._res_block(width, width, down=True)
                else:
                    shrink = Downsample(width, conv_resample, dims=dims)
                self._append_input_block(TimestepEmbedSequential(shrink), width)
                self._downsampling *= 2

        self.middle_block = TimestepEmbedSequential(
            self._res_block(width, width),
            self._attention_block(width, self.num_heads),
            self._res_block(width, width),
        )
        self._channels = width
        self._build_output_layers()

    def _build_output_layers(self) -> None:
        """Hook: build what follows the middle block."""

    def _width(self, level: int) -> int:
        return int(self.channel_mult[level] * self.model_channels)

    def _append_input_block(self, block: nn.Module, width: int) -> None:
        self.input_blocks.append(block)
        self._skip_channels.append(width)

    def _res_block(self, channels: int, out_channels: int, **updown: bool) -> ResBlock:
        return ResBlock(
            channels,
            self._emb_channels,
            self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            **updown,
        )

    def _attention_block(self, channels: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(
            channels,
            num_heads=num_heads,
            num_head_channels=self.num_head_channels,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    def _maybe_attention(self, channels: int, num_heads: int) -> list[nn.Module]:
        if self._downsampling not in self.attention_resolutions:
            return []
        return [self._attention_block(channels, num_heads)]

    def _fp16_modules(self) -> list[nn.Module]:
        return [self.input_blocks, self.middle_block]

    def convert_to_fp16(self) -> None:
        """Convert the convolutions of all blocks to float16, but not the output layer's."""
        for part in self._fp16_modules():
            part.apply(convert_module_to_f16)
        self.dtype = th.float16

    def convert_to_fp32(self) -> None:
        """Undo `convert_to_fp16`."""
        for part in self._fp16_modules():
            part.apply(convert_module_to_f32)
        self.dtype = th.float32

    def _embed(self, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        with _without_autocast(timesteps.device.type):
            emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        return emb if y is None else emb + self.label_emb(y)

    def _encode(self, x: th.Tensor, emb: th.Tensor) -> tuple[th.Tensor, list[th.Tensor]]:
        """Outputs of the middle block and of each input block, in that order."""
        h, skips = x.to(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return self.middle_block(h, emb), skips


class UNetModel(_EncoderTrunk):
    """The U-Net of arXiv 2105.05233 (section 3): residual blocks, attention, timestep embedding.

    :param image_size: nominal height and width in pixels, kept for reference; any size divisible
        by 2^(levels-1) works.
    :param in_channels: channels of the input.
    :param model_channels: base number of channels, which `channel_mult` multiplies.
    :param out_channels: channels of the output.
    :param num_res_blocks: residual blocks per level.
    :param attention_resolutions: downsampling factors at which attention follows each residual
        block; 4 means feature maps 4 times smaller than the input.
    :param dropout: dropout probability in the residual blocks, in [0, 1].
    :param channel_mult: width of each level as a multiple of `model_channels`, finest first;
        may be fractional.
    :param conv_resample: resample with learned convolutions, unless `resblock_updown`.
    :param dims: number of spatial dimensions, 1 to 3.
    :param num_classes: number of classes if the network is class-conditional, else None.
    :param use_checkpoint: save memory by recomputing activations in the backward pass: True for
        whole blocks; "norms" only for the outputs of normalisation, activation and resampling, so
        that the outputs of convolutions and attention are kept.
    :param use_fp16: run the blocks in float16; call `convert_to_fp16` to convert their weights.
    :param num_heads: number of attention heads, used if `num_head_channels` is -1.
    :param num_head_channels: channels per attention head.
    :param num_heads_upsample: number of heads in the decoder; defaults to `num_heads`.
    :param use_scale_shift_norm: see ResBlock.
    :param resblock_updown: resample inside residual blocks, as BigGAN does.
    :param use_new_attention_order: see AttentionBlock.
    """

    def _build_output_layers(self) -> None:
        width, skip_channels = self._channels, list(self._skip_channels)
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [
                    self._res_block(width + skip_channels.pop(), self._width(level))
                ]
                width = self._width(level)
                layers += self._maybe_attention(width, self.num_heads_upsample)
                if level and i == self.num_res_blocks:
                    if self.resblock_updown:
                        layers.append(self._res_block(width, width, up=True))
                    else:
                        layers.append(Upsample(width, self.conv_resample, dims=self.dims))
                    self._downsampling //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            normalization(width),
            nn.SiLU(),
            zero_module(conv_nd(self.dims, width, self.out_channels, 3, padding=1)),
        )

    def _fp16_modules(self) -> list[nn.Module]:
        return [*super()._fp16_modules(), self.output_blocks]

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """Apply the network.

        :param x: `[N x in_channels x ...]`.
        :param timesteps: `[N]`, may be fractional.
        :param y: `[N]` class indices, if and only if the network is class-conditional.
        :return: `[N x out_channels x ...]`, in the precision of `x`.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                "a class-conditional network needs the classes y, another one takes none"
                f" (num_classes={self.num_classes}, y={'missing' if y is None else 'given'})"
            )
        emb = self._embed(timesteps, y)
        h, skips = self._encode(x, emb)
        for block in self.output_blocks:
            h = block(th.cat([h, skips.pop()], dim=1), emb)
        with _without_autocast(x.device.type):
            return self._output(h.to(x.dtype))

    def _output(self, h: th.Tensor) -> th.Tensor:
        norm, activation, *rest = self.out
        if not isinstance(activation, nn.SiLU):  # a layer was inserted
            return self.out(h)
        h = _norm_silu(norm, activation, h)
        for layer in rest:
            h = layer(h)
        return h


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Compute in the precision of the input: embeddings and output layer, as in the original."""
    if device_type == "meta":  # does not support autocast
        return contextlib.nullcontext()
    return th.autocast(device_type, enabled=False)


class ConditionalUNetModel(UNetModel):
    """A U-Net conditioned on an image that is concatenated to the noisy input.

    Takes UNetModel's arguments; `in_channels` counts the channels of the noisy input only.

    :param cond_channels: channels of the condition, which follow those of the noisy input.
    """

    def __init__(
        self, image_size: int, in_channels: int, *args: Any, cond_channels: int, **kwargs: Any
    ):
        super().__init__(image_size, in_channels + cond_channels, *args, **kwargs)
        self.cond_channels = cond_channels

    def forward(
        self, x: th.Tensor, timesteps: th.Tensor, cond: th.Tensor | None = None, **kwargs: Any
    ) -> th.Tensor:
        """As UNetModel's; `cond` is `[N x cond_channels x ...]`, sized as `x`, zeros if None."""
        if cond is None:
            cond = x.new_zeros(len(x), self.cond_channels, *x.shape[2:])
        return super().forward(th.cat([x, cond.to(x.dtype)], dim=1), timesteps, **kwargs)

    @th.no_grad()
    def load_widened(self, state_dict: Mapping[str, th.Tensor], at: int = 0) -> "LoadReport":
        """Load the matching weights of a pretrained unconditional network.

        The input convolution is padded with zero weights, so the network initially computes what
        the pretrained one did and learns to use the other channels. An output layer with another
        number of channels stays as initialised.

        :param at: the input channel here that corresponds to the pretrained network's first: 0 if
            it was trained on what is the noisy input here, `in_channels` if on the condition.
        :return: which tensors were loaded, left as initialised, and dropped.
        :raises ValueError: if nothing matches, saying what differs.
        """
        own, weights = self.state_dict(), dict(state_dict)
        first = "input_blocks.0.0.weight"
        if first in weights:
            weight, channels = weights[first], own[first].shape[1]
            last = at + weight.shape[1]
            if last <= channels:
                weights[first] = weight.new_zeros(len(weight), channels, *weight.shape[2:])
                weights[first][:, at:last] = weight
        return _copy_matching(own, weights, {name: name for name in weights})


class SuperResModel(ConditionalUNetModel):
    """A super-resolution U-Net, conditioned on the bilinearly upsampled low-resolution image.

    Takes UNetModel's arguments; `in_channels` counts the channels of one of the two images.
    """

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any):
        super().__init__(image_size, in_channels, *args, cond_channels=in_channels, **kwargs)

    def forward(
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        low_res: th.Tensor | None = None,
        **kwargs: Any,
    ) -> th.Tensor:
        """As UNetModel's; `low_res` is `[N x in_channels x h x w]` of any size.

        :raises ValueError: if `low_res` is missing.
        """
        if low_res is None:
            raise ValueError("a super-resolution network needs the image to sharpen, low_res")
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(x, timesteps, enlarged, **kwargs)


class EncoderUNetModel(_EncoderTrunk):
    """The encoder of the U-Net with a classification head (arXiv 2105.05233, section 4).

    Takes UNetModel's arguments; `out_channels` is the number of classes.

    :param pool: "adaptive" averages the last feature map; "attention" applies attention pooling to
        it; "spatial" and "spatial_v2" feed the mean of every block's output to an MLP with one
        hidden layer.
    :raises ValueError: if `pool` is none of these.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool | str = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        super().__init__(
            image_size=image_size,
            in_channels=in_channels,
            model_channels=model_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            channel_mult=channel_mult,
            conv_resample=conv_resample,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_fp16=use_fp16,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        self.pool = pool
        width, features = self._channels, sum(self._skip_channels) + self._channels
        if pool == "adaptive":
            self.out = nn.Sequential(
                normalization(width),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                zero_module(conv_nd(dims, width, out_channels, 1)),
                nn.Flatten(),
            )
        elif pool == "attention":
            if num_head_channels == -1:
                raise ValueError('pool="attention" needs num_head_channels')
            side = image_size // self._downsampling
            self.out = nn.Sequential(
                normalization(width),
                nn.SiLU(),
                AttentionPool2d(side, width, num_head_channels, out_channels),
            )
        elif pool == "spatial":
            self.out = nn.Sequential(
                nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels)
            )
        elif pool == "spatial_v2":
            self.out = nn.Sequential(
                nn.Linear(features, 2048),
                normalization(2048),
                nn.SiLU(),
                nn.Linear(2048, out_channels),
            )
        else:
            raise ValueError(
                f'pool is one of "adaptive", "attention", "spatial" and "spatial_v2", not "{pool}"'
            )

    def forward(self, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """Map `[N x in_channels x ...]` and timesteps `[N]` to logits `[N x out_channels]`."""
        h, skips = self._encode(x, self._embed(timesteps))
        if self.pool.startswith("spatial"):
            maps = [*skips, h]
            h = th.cat([m.to(x.dtype).mean(dim=(2, 3)) for m in maps], dim=1)
        return self.out(h.to(x.dtype))


class LoadReport(NamedTuple):
    """The result of loading a pretrained checkpoint, as lists of tensor names.

    loaded: the network's tensors that were copied. fresh: the network's tensors that were left as
    initialised. dropped: the checkpoint's tensors that were not used.
    """

    loaded: list[str]
    fresh: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        def listing(names: list[str]) -> str:
            blocks = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
            return f"{len(names)} ({', '.join(blocks)})" if names else "0"

        return (
            f"{len(self.loaded)} tensors loaded; fresh: {listing(self.fresh)}; "
            f"dropped: {listing(self.dropped)}"
        )


class SegmentationUNetModel(UNetModel):
    """The diffusion U-Net as a segmentation network: radiographs in, logits out.

    Radiographs are fed in at a small fixed timestep, as nearly noise-free images
    (arXiv 2307.14066, section 2). Takes UNetModel's arguments; `out_channels` is the number of
    classes. Images of any size are padded to a multiple of `size_multiple` and the logits cropped.

    :param depth: how many of the finest levels of `channel_mult` to keep, in encoder and decoder;
        None keeps all.
    :param timestep: the fixed timestep, in the network's own units.
    :raises ValueError: if `depth` is not between 1 and the number of levels.
    """

    def __init__(self, *args: Any, depth: int | None = None, timestep: float = 1, **kwargs: Any):
        names = ["image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks"]
        names += ["attention_resolutions", "dropout", "channel_mult"]
        if len(args) > len(names):
            raise TypeError("give the arguments after channel_mult by name")
        kwargs.update(zip(names, args))
        levels = tuple(kwargs.pop("channel_mult", (1, 2, 4, 8)))
        if depth is not None and not 1 <= depth <= len(levels):
            raise ValueError(f"depth={depth} of a network of {len(levels)} levels")
        super().__init__(channel_mult=levels[:depth], **kwargs)
        self.pretrained_channel_mult = levels
        self.timestep = timestep
        self.is_folded = False

    @property
    def depth(self) -> int:
        """Number of resolution levels."""
        return len(self.channel_mult)

    @property
    def size_multiple(self) -> int:
        """Height and width are padded to a multiple of this, in pixels."""
        return 2 ** (self.depth - 1)

    def forward(
        self,
        x: th.Tensor,
        timesteps: th.Tensor | None = None,
        y: th.Tensor | None = None,
    ) -> th.Tensor:
        """Logits for radiographs.

        :param x: `[N x in_channels x H x W]` in [-1, 1], of any size.
        :param timesteps: `[N]`, overrides the fixed timestep.
        :param y: `[N]` class indices of a class-conditional network.
        :return: `[N x classes x H x W]`.
        """
        if self.is_folded and timesteps is not None:
            raise ValueError(
                "the timestep is folded into the weights: it cannot be chosen any more"
            )
        if timesteps is None:  # ignored once it is folded
            timesteps = th.full((len(x),), float(self.timestep), device=x.device)
        sides = x.shape[2:]
        missing = [-side % self.size_multiple for side in sides]
        if any(missing):
            x = F.pad(x, [n for m in reversed(missing) for n in (0, m)], mode="replicate")
        scores = super().forward(x, timesteps, y)
        for dim, side in enumerate(sides, 2):
            scores = scores.narrow(dim, 0, side)
        return scores

    def folded(self, timestep: float | None = None) -> "SegmentationUNetModel":
        """A copy for inference with the timestep embedding folded into the weights.

        Its forward takes images only. Its weights cannot be used as a checkpoint.

        :param timestep: in the network's own units; defaults to `self.timestep`.
        :raises ValueError: if the network is class-conditional or already folded.
        """
        if self.num_classes is not None or self.is_folded:
            reason = "folded already" if self.is_folded else "class-conditional"
            raise ValueError(f"a network that is {reason} cannot be folded")
        twin = copy.deepcopy(self).requires_grad_(False).eval()
        weight = next(self.parameters())
        steps = weight.new_full((1,), float(self.timestep if timestep is None else timestep))
        emb = twin._embed(steps)
        for module in twin.modules():
            if isinstance(module, ResBlock):
                module.fold(emb)
        twin.is_folded = True
        return twin

    def store_blocks_as(self, dtype: th.dtype) -> None:
        """Keep the weights of the blocks' convolutions in `dtype`, for evaluation under autocast.

        For folded networks only, since the rounding cannot be undone.
        """
        for part in self._fp16_modules():
            for layer in part.modules():
                weight = getattr(layer, "weight", None)
                if isinstance(weight, nn.Parameter) and weight.ndim > 2:
                    layout = th.channels_last if weight.ndim == 4 else th.contiguous_format
                    weight.data = weight.data.to(dtype, memory_format=layout)

    def _embed(self, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        return timesteps if self.is_folded else super()._embed(timesteps, y)

    @th.no_grad()
    def load_pretrained(self, state_dict: Mapping[str, th.Tensor]) -> LoadReport:
        """Load the matching weights of a pretrained diffusion network, of equal or greater depth.

        From a deeper network, only the finest levels are taken and the middle block stays as
        initialised. So does the output layer in any case: it predicts noise there, classes here.

        :return: which tensors were loaded, left as initialised, and dropped.
        :raises ValueError: if nothing matches, saying what differs.
        """
        blocks = {k.split(".")[1] for k in state_dict if k.startswith("output_blocks.")}
        surplus = len(blocks) - len(self.output_blocks)
        names = {name: self._target_name(name, surplus) for name in state_dict}
        return _copy_matching(self.state_dict(), state_dict, names)

    def _target_name(self, name: str, surplus: int) -> str | None:
        """This network's name for a pretrained tensor; `surplus`: extra output blocks there."""
        part, _, rest = name.partition(".")
        if part == "out" and rest.startswith("2."):
            return None
        if surplus <= 0 or part not in ("middle_block", "output_blocks"):
            return name
        if part == "middle_block":
            return None
        index, _, rest = rest.partition(".")
        return f"output_blocks.{int(index) - surplus}.{rest}"


def _copy_matching(
    own: Mapping[str, th.Tensor],
    weights: Mapping[str, th.Tensor],
    names: Mapping[str, str | None],
) -> LoadReport:
    """Copy pretrained tensors into a network where names and shapes match.

    :param own: the network's state_dict.
    :param weights: the pretrained tensors by name.
    :param names: the network's name for each pretrained tensor, None to drop it.
    :raises ValueError: if nothing matches, saying what differs.
    """
    fitting, misfits = {}, []
    for theirs, tensor in weights.items():
        ours = names[theirs]
        if ours is None or ours not in own:
            continue
        if own[ours].shape == tensor.shape:
            fitting[theirs] = ours
        else:
            misfits.append(f"{theirs} is {_shape(tensor)} there, {ours} {_shape(own[ours])} here")
    if not any(theirs.startswith(("input_blocks", "output_blocks")) for theirs in fitting):
        reason = "; ".join(misfits[:3]) or "no tensor has a name of this network"
        raise ValueError(f"nothing of the checkpoint fits the network: {reason}")
    for theirs, ours in fitting.items():
        own[ours].copy_(weights[theirs])
    loaded = list(fitting.values())
    return LoadReport(
        loaded=loaded,
        fresh=[name for name in own if name not in set(loaded)],
        dropped=[name for name in weights if name not in fitting],
    )


def _shape(tensor: th.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
