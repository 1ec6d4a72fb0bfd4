"""Which parts of a network are trained, and how fast: freezing, layer-wise learning rates."""

from collections.abc import Collection
from typing import Any

import torch as th

from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.stepper import warmup_cosine
from guided_diffusion.unet import SegmentationUNetModel


def freeze(model: SegmentationUNetModel, encoder: float, decoder: float) -> list[str]:
    """Freeze all of a network but a fraction of its blocks and its output layer.

    :param encoder: fraction of the middle and input blocks to train, 0 to 1, counted from the
        middle.
    :param decoder: fraction of the output blocks to train, 0 to 1, counted from the output.
    :return: the names of the frozen parts.
    """
    parts = blocks_from_output(model)
    decoding = [part for part in parts if part[0].startswith("output_blocks")]
    encoding = [part for part in parts if part[0].startswith(("middle_block", "input_blocks"))]
    frozen = []
    for fraction, blocks in ((encoder, encoding), (decoder, decoding)):
        for name, block in blocks[round(fraction * len(blocks)) :]:
            block.requires_grad_(False)
            frozen.append(name)
    if frozen:  # frozen blocks must get the embedding that they were trained with
        model.time_embed.requires_grad_(False)
        frozen.append("time_embed")
    return frozen


def blocks_from_output(model: SegmentationUNetModel) -> list[tuple[str, th.nn.Module]]:
    """Names and modules of the output layer, decoder, middle and encoder, in backward order."""

    def backwards(name: str) -> list[tuple[str, th.nn.Module]]:
        return [(f"{name}.{i}", block) for i, block in reversed([*enumerate(getattr(model, name))])]

    return [
        ("out", model.out),
        *backwards("output_blocks"),
        ("middle_block", model.middle_block),
        *backwards("input_blocks"),
    ]


def parameter_groups(
    model: th.nn.Module,
    layer_decay: float = 1.0,
    fresh: Collection[str] = (),
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """The parameter groups of an optimiser, each with a factor "lr_scale" on the learning rate.

    :param layer_decay: factor from each block of a U-Net to the next, from output to input (as in
        arXiv 1801.06146, section 3.2, and arXiv 2003.10555). The timestep embedding, which feeds
        every block, learns as slowly as the first. Other networks have no decay.
    :param fresh: names of parameters that were not pretrained.
    :param head_lr_scale: factor for those, in place of the decay.
    """
    scales = {}
    if layer_decay != 1 and isinstance(model, SegmentationUNetModel):
        parts = blocks_from_output(model)
        scales = {name: layer_decay**distance for distance, (name, _) in enumerate(parts)}
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


def learning_rate(settings: LearningConfig, step: int, steps: int) -> float:
    """The learning rate at a step of a run that long."""
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * warmup_cosine(step, steps, round(settings.warmup * steps))
