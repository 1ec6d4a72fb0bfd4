"""Inferring the architecture of a diffusion U-Net from the shapes of its weights."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch as th

from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.errors import UserError

# flags that shapes do not depend on: the user must give one of each group
_NOT_IN_SHAPES = (
    ("image_size",),
    ("num_head_channels", "num_heads"),
    ("use_new_attention_order",),
)


def infer_model_config(
    state: Mapping[str, th.Tensor],
    overrides: Overrides,
    source: str,
    also_required: Sequence[str] = (),
) -> ModelConfig:
    """Infer the configuration of a diffusion network from its state_dict.

    :param state: the weights, under the network's own names.
    :param overrides: the flags that the user gave, which supply what shapes cannot.
    :param source: the checkpoint's path, for messages.
    :param also_required: further flags that the caller needs.
    :raises UserError: if it is not a diffusion U-Net, or naming all flags that are missing.
    """
    try:
        inferred, attention_levels = _from_shapes(state)
        outputs = state["out.2.weight"].shape[0]
    except (KeyError, IndexError, StopIteration):
        raise UserError(
            f"{source} does not hold a diffusion U-Net: expected the state_dict of a"
            " guided-diffusion image model (model*.pt or ema_*.pt)"
        ) from None
    inputs = inferred["in_channels"]
    if inputs not in (1, 3) or outputs not in (inputs, 2 * inputs):
        raise UserError(
            f"{source} has {inputs} input and {outputs} output channels: it is conditioned on an"
            " image (guided by masks, mask diffusion or super-resolution). Name an unconditional"
            " checkpoint, or copy its config.json along to use it as what it is"
        )
    required = (*_NOT_IN_SHAPES, *((name,) for name in also_required))
    missing = [
        " or ".join(f"--{name}" for name in names)
        for names in required
        if not any(name in overrides for name in names)
    ]
    if missing:
        raise UserError(
            f"{source} has no config.json beside it, and the shapes of its weights do not determine"
            f" {' nor '.join(missing)}: give the flags that it was trained with"
        )
    size = overrides["image_size"]
    inferred["attention_resolutions"] = ",".join(str(size // 2**lvl) for lvl in attention_levels)
    supplied = (*(name for names in _NOT_IN_SHAPES for name in names), "num_heads_upsample")
    given = {name: overrides[name] for name in supplied if name in overrides}
    return from_flags(ModelConfig, {**inferred, **given})


def _from_shapes(state: Mapping[str, th.Tensor]) -> tuple[dict[str, Any], list[int]]:
    """Fields of the configuration, and the levels with attention; 0 is the finest."""

    def count_blocks(part: str) -> int:
        return 1 + max(int(k.split(".")[1]) for k in state if k.startswith(f"{part}."))

    in_channels = state["input_blocks.0.0.weight"].shape[1]
    model_channels = state["time_embed.0.weight"].shape[1]
    blocks = count_blocks("output_blocks")
    if count_blocks("input_blocks") != blocks:
        raise KeyError("input_blocks")
    # a decoder level ends in upsampling, by a convolution or a second residual block
    last_blocks = [
        i
        for i in range(blocks)
        if any(
            re.match(rf"output_blocks\.{i}\.[1-9]\d*\.(conv\.weight|in_layers\.0\.weight)", key)
            for key in state
        )
    ]
    per_level = last_blocks[0] + 1 if last_blocks else blocks
    levels = blocks // per_level
    first_blocks = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    widths = [state[f"{block}.0.out_layers.3.weight"].shape[0] for block in first_blocks]
    attention = [n for n, block in enumerate(first_blocks) if f"{block}.1.qkv.weight" in state]
    embedded = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    outputs = state["out.2.weight"].shape[0]
    label = state.get("label_emb.weight")
    inferred = {
        "in_channels": int(in_channels),
        "num_channels": int(model_channels),
        "num_res_blocks": per_level - 1,
        "channel_mult": ",".join(f"{width / model_channels:g}" for width in widths),
        "class_cond": label is not None,
        **({} if label is None else {"num_classes": label.shape[0]}),
        "use_scale_shift_norm": embedded == 2 * widths[0],
        "resblock_updown": levels > 1 and f"input_blocks.{per_level}.0.in_layers.0.weight" in state,
        "learn_sigma": outputs == 2 * in_channels,
    }
    return inferred, attention
