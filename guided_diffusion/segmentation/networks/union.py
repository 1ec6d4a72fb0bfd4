"""Several networks of different kinds as one, whose class probabilities are averaged."""

import dataclasses
from collections.abc import Sequence

import torch as th

from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.networks.kind import Member, MemberOptions


class Union(th.nn.Module):
    """Networks for the same classes, which take the same images.

    :param configs: of each network; never unions themselves.
    """

    def __init__(self, configs: Sequence[SegmentationConfig]):
        super().__init__()
        self.configs = tuple(configs)
        self.networks = th.nn.ModuleList(config.build() for config in configs)

    def forward(self, images: th.Tensor) -> th.Tensor:
        """`[N x in_channels x H x W]` in [-1, 1] to logarithms of probabilities, like logits."""
        scores = [network(images).float().log_softmax(1) for network in self.networks]
        return th.stack(scores).logsumexp(0) - th.tensor(float(len(scores))).log()


def join(
    networks: Sequence[tuple[SegmentationConfig, dict[str, th.Tensor]]],
) -> tuple[SegmentationConfig, dict[str, th.Tensor]]:
    """Configuration and weights of the union of networks.

    :param networks: configuration and weights of each. The union reads radiographs as the first.
    """
    first = networks[0][0]
    config = SegmentationConfig(
        model=None,
        reading=first.reading,
        categories=first.categories,
        kind="union",
        options={"networks": [config.to_plain() for config, _ in networks]},
        flip_swaps=first.flip_swaps,
        diffusion=first.diffusion,
    )
    weights = {
        f"networks.{number}.{name}": tensor
        for number, (_, state) in enumerate(networks)
        for name, tensor in state.items()
    }
    return config, weights


def build(config: SegmentationConfig) -> Union:
    """The network of a model file of kind "union", with random weights."""
    plain = config.options["networks"]
    return Union([SegmentationConfig.from_plain(values, "a network in it") for values in plain])


def members(model: Union, device: th.device, options: MemberOptions) -> list[Member]:
    """The members of all networks; timesteps are for those that have them."""
    without = dataclasses.replace(options, timesteps=())
    found: list[Member] = []
    for config, network in zip(model.configs, model.networks):
        suitable = options if config.kind == "unet" else without
        found += config.kind_module().members(network, device, suitable)
    return found
