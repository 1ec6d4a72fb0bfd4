"""Which parts of a network train, and how fast: freezing and learning rates by layer."""

from collections.abc import Collection
from typing import Any

import torch as th

from guided_diffusion.unet import SegmentationUNetModel


def freeze(model: SegmentationUNetModel, encoder: float, decoder: float) -> list[str]:
    """Let only a share of the network train, and its output layer always.

    :param encoder: share of the middle and input blocks, from the middle outwards.
    :param decoder: share of the output blocks, from the output inwards.
    :return: names of the parts that stay as they are.
    """
    parts = from_the_output_on(model)
    decoding = [part for part in parts if part[0].startswith("output_blocks")]
    encoding = [part for part in parts if part[0].startswith(("middle_block", "input_blocks"))]
    frozen = []
    for share, blocks in ((encoder, encoding), (decoder, decoding)):
        for name, block in blocks[round(share * len(blocks)) :]:
            block.requires_grad_(False)
            frozen.append(name)
    if encoder < 1:  # every block hears of the timestep; frozen ones must hear the same as before
        model.time_embed.requires_grad_(False)
        frozen.append("time_embed")
    return frozen


def from_the_output_on(model: SegmentationUNetModel) -> list[tuple[str, th.nn.Module]]:
    """Output layer, decoder, middle and encoder, by name, in the order of the gradient."""

    def inwards(name: str) -> list[tuple[str, th.nn.Module]]:
        return [(f"{name}.{i}", block) for i, block in reversed([*enumerate(getattr(model, name))])]

    return [
        ("out", model.out),
        *inwards("output_blocks"),
        ("middle_block", model.middle_block),
        *inwards("input_blocks"),
    ]


def parameter_groups(
    model: th.nn.Module,
    layer_decay: float = 1.0,
    fresh: Collection[str] = (),
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of parameters with a factor "lr_scale" on the learning rate of each.

    :param layer_decay: factor from each block of a U-Net to the next, from the output on (as in
        arXiv 1801.06146, section 3.2, and arXiv 2003.10555); the timestep embedding, which speaks
        to all of them, learns as slowly as the first block. Other networks know no decay.
    :param fresh: names of parameters that were not pretrained: no decay, but `head_lr_scale`.
    """
    scales = {}
    if layer_decay != 1 and isinstance(model, SegmentationUNetModel):
        parts = from_the_output_on(model)
        scales = {name: layer_decay**place for place, (name, _) in enumerate(parts)}
        scales["time_embed"] = scales[parts[-1][0]]
    groups: dict[float, list[th.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in fresh:
            scale = head_lr_scale
        else:
            part, index = name.split(".")[:2] if "." in name else (name, "")
            scale = scales.get(part, scales.get(f"{part}.{index}", 1.0))
        groups.setdefault(scale, []).append(parameter)
    return [{"params": params, "lr_scale": scale} for scale, params in groups.items()]
