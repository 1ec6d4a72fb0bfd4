"""What a diffusion network's decoder computes on the way to its output."""

from collections.abc import Sequence

import torch as th

from guided_diffusion.unet import UNetModel


def decoder_features(
    network: UNetModel, blocks: Sequence[int], images: th.Tensor, timestep: float
) -> list[th.Tensor]:
    """Outputs of decoder blocks, `[N x width x h x w]` each, in the order of the blocks.

    :param network: one without classes.
    :param blocks: in ascending order, 0 being the deepest.
    :param images: network input `[N x C x H x W]`.
    :param timestep: in the network's units.
    """
    found: list[th.Tensor] = []
    hooks = [
        network.output_blocks[block].register_forward_hook(
            lambda _module, _inputs, output: found.append(output)
        )
        for block in blocks
    ]
    try:
        network(images, th.full((len(images),), timestep, device=images.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def block_scales(levels: int, per_level: int) -> list[int]:
    """How many times smaller than the image the output of each decoder block is.

    The last block of a level doubles its maps, except on the finest level.
    """
    return [
        2 ** max(level - (block == per_level - 1), 0)
        for level in reversed(range(levels))
        for block in range(per_level)
    ]
