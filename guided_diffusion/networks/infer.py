"""The architecture of a network from the shapes of its weights, for checkpoints without config."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch as th

from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import from_flags

# what no shape tells; one of each group of flags must be given
_UNSEEN = (("num_head_channels", "num_heads"), ("use_new_attention_order",))


def infer_model_config(
    state: Mapping[str, th.Tensor],
    overrides: Mapping[str, Any],
    source: str,
    also: Sequence[str] = (),
) -> ModelConfig:
    """The configuration of the diffusion network that a state_dict is of.

    :param overrides: the flags that were given; they say what shapes cannot.
    :param source: the checkpoint's name, for messages.
    :param also: further flags that must be given, since no shape tells them either.
    :raises UserError: if it is no such network, or flags are missing (naming them all).
    """
    try:
        seen = _from_shapes(state, overrides.get("image_size", 256))
    except (KeyError, IndexError, StopIteration):
        raise UserError(
            f"{source} holds no diffusion U-Net: expected the state_dict of a guided-diffusion"
            " image model (model*.pt or ema_*.pt)"
        ) from None
    missing = [
        " or ".join(f"--{name}" for name in names)
        for names in (*_UNSEEN, *((name,) for name in also))
        if not any(name in overrides for name in names)
    ]
    if missing:
        raise UserError(
            f"there is no config.json beside {source}, and its weights do not tell"
            f" {' nor '.join(missing)}: give the flags that it was trained with"
        )
    unseen = {name: overrides[name] for names in _UNSEEN for name in names if name in overrides}
    if "num_heads_upsample" in overrides:
        unseen["num_heads_upsample"] = overrides["num_heads_upsample"]
    return from_flags(ModelConfig, {**seen, **unseen})


def _from_shapes(state: Mapping[str, th.Tensor], image_size: int) -> dict[str, Any]:
    def blocks(part: str) -> int:
        return 1 + max(int(k.split(".")[1]) for k in state if k.startswith(f"{part}."))

    in_channels = state["input_blocks.0.0.weight"].shape[1]
    model_channels = state["time_embed.0.weight"].shape[1]
    out_blocks = blocks("output_blocks")
    if blocks("input_blocks") != out_blocks:
        raise KeyError("input_blocks")
    # a decoder level ends with what doubles the size: a convolution or a second residual block
    ends = [
        i
        for i in range(out_blocks)
        if any(
            re.match(rf"output_blocks\.{i}\.[1-9]\d*\.(conv\.weight|in_layers\.0\.weight)", key)
            for key in state
        )
    ]
    a_level = ends[0] + 1 if ends else out_blocks
    levels = out_blocks // a_level

    def has(key: str) -> bool:
        return key in state

    mult, attention = [], set()
    for level in range(levels):
        first = 1 + level * a_level
        widest = state[f"input_blocks.{first}.0.out_layers.3.weight"].shape[0]
        mult.append(widest / model_channels)
        if has(f"input_blocks.{first}.1.qkv.weight"):
            attention.add(image_size // 2**level)
    embedded = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    second = state["input_blocks.1.0.out_layers.3.weight"].shape[0]
    outputs = state["out.2.weight"].shape[0]
    label = state.get("label_emb.weight")
    return {
        "image_size": image_size,
        "in_channels": int(in_channels),
        "num_channels": int(model_channels),
        "num_res_blocks": a_level - 1,
        "channel_mult": ",".join(f"{m:g}" for m in mult),
        "attention_resolutions": ",".join(map(str, sorted(attention, reverse=True))),
        "class_cond": label is not None,
        **({} if label is None else {"num_classes": label.shape[0]}),
        "use_scale_shift_norm": embedded == 2 * second,
        "resblock_updown": levels > 1 and has(f"input_blocks.{a_level}.0.in_layers.0.weight"),
        "learn_sigma": outputs == 2 * in_channels,
    }
