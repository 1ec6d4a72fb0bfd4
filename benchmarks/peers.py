"""Peers: networks of other packages, built to the same widths."""

import copy
import importlib
import sys
from typing import Any

import torch as th
import torch.nn as nn

from guided_diffusion.networks.config import ModelConfig, attention_factors


class DiffusersUNet(nn.Module):
    """`diffusers.UNet2DModel` with the call signature of UNetModel."""

    def __init__(self, config: ModelConfig, outputs: int):
        super().__init__()
        from diffusers import UNet2DModel

        widths = tuple(int(m * config.num_channels) for m in config.mult())
        factors = attention_factors(config.attention_resolutions, config.image_size, len(widths))
        attends = [2**level in factors for level in range(len(widths))]
        resample = "resnet" if config.resblock_updown else "conv"
        self.network = UNet2DModel(
            sample_size=config.image_size,
            in_channels=config.in_channels,
            out_channels=outputs,
            block_out_channels=widths,
            layers_per_block=config.num_res_blocks,
            down_block_types=[("", "Attn")[a] + "DownBlock2D" for a in attends],
            up_block_types=[("", "Attn")[a] + "UpBlock2D" for a in reversed(attends)],
            attention_head_dim=max(config.num_head_channels, 8),
            resnet_time_scale_shift="scale_shift" if config.use_scale_shift_norm else "default",
            downsample_type=resample,
            upsample_type=resample,
        )

    def forward(self, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        return self.network(x, timesteps).sample


class ChannelsLast(nn.Module):
    """A copy of a network that computes with channels last."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network).to(memory_format=th.channels_last)

    def forward(self, x: th.Tensor, *more: th.Tensor) -> th.Tensor:
        return self.network(x.contiguous(memory_format=th.channels_last), *more)


def in_both_layouts(name: str, network: nn.Module) -> dict[str, nn.Module]:
    """A peer as it is and with channels last, since it depends on the machine which is faster."""
    return {name: network, f"{name}, channels last": ChannelsLast(network)}


def unet_of_checkout(path: str, arguments: dict[str, Any]) -> nn.Module:
    """Build UNetModel from another checkout with guided-diffusion's interface."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    sys.path.insert(0, path)
    try:
        module = importlib.import_module("guided_diffusion.unet")
        return module.UNetModel(**arguments)
    finally:
        sys.path.remove(path)
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(ours)


def _is_ours(name: str) -> bool:
    return name.split(".")[0] == "guided_diffusion"


def build_peer(peer: str, config: ModelConfig, outputs: int) -> nn.Module | None:
    """Build the network to compare with.

    :param peer: "diffusers", the path of a checkout, or "none".
    :param outputs: number of output channels.
    :return: None for "none" and, with a message, where diffusers is not installed.
    """
    if peer == "none":
        return None
    if peer == "diffusers":
        try:
            return DiffusersUNet(config, outputs)
        except ImportError:
            print("peer diffusers skipped: diffusers is not installed")
            return None
    return unet_of_checkout(peer, {**config.network_arguments(), "out_channels": outputs})
