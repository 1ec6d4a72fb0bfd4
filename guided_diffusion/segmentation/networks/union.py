"""Several networks of different kinds as one: a mean of their class probabilities."""

import dataclasses
from collections.abc import Sequence

import torch as th

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.certainty import certainty, entropy
from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.networks.kind import Member, MemberOptions


class Union(th.nn.Module):
    """Networks for the same classes, which take the same images.

    :param configs: of each network; never unions themselves.
    :param by_certainty: each counts by its `certainty` of the radiograph, else all count alike.
    """

    def __init__(self, configs: Sequence[SegmentationConfig], by_certainty: bool):
        super().__init__()
        self.configs = tuple(configs)
        self.by_certainty = by_certainty
        self.networks = th.nn.ModuleList(config.build() for config in configs)

    def forward(self, images: th.Tensor) -> th.Tensor:
        """`[N x in_channels x H x W]` in [-1, 1] to logarithms of probabilities, like logits."""
        scores = th.stack([network(images).float().log_softmax(1) for network in self.networks])
        weights = scores.new_ones(scores.shape[:2])
        if self.by_certainty:
            weights = th.stack([certainty(entropy(one.exp(), 1)) for one in scores])
        shares = weights / weights.sum(0)
        return (scores + shares.log()[..., None, None, None]).logsumexp(0)


def join(
    networks: Sequence[tuple[SegmentationConfig, dict[str, th.Tensor]]],
) -> tuple[SegmentationConfig, dict[str, th.Tensor]]:
    """Configuration and weights of the union of networks.

    :param networks: configuration and weights of each.
    :raises UserError: if they do not all read radiographs alike, or not for the same classes.
    """
    first = networks[0][0]
    for other, _ in networks:
        ours, its = (
            {**config.reading.to_dict(), "classes": len(config.categories)}
            for config in (first, other)
        )
        if found := [
            f"{name} {ours[name]} and {its[name]}" for name in ours if ours[name] != its[name]
        ]:
            raise UserError(
                f"only networks that read radiographs alike can be joined: {', '.join(found)}"
            )
    config = SegmentationConfig(
        model=None,
        reading=first.reading,
        categories=first.categories,
        kind="union",
        options={
            "networks": [config.to_plain() for config, _ in networks],
            "by_certainty": True,
        },
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
    configs = [SegmentationConfig.from_plain(values, "a network in it") for values in plain]
    return Union(configs, bool(config.options.get("by_certainty")))  # older files have none


def members(model: Union, device: th.device, options: MemberOptions) -> list[Member]:
    """The members of all networks; timesteps are for those that have them."""
    without = dataclasses.replace(options, timesteps=())
    found: list[Member] = []
    for config, network in zip(model.configs, model.networks):
        suitable = options if config.kind == "unet" else without
        its = config.kind_module().members(network, device, suitable)
        found += [Member(one.network, 1 / len(its), model.by_certainty) for one in its]
    return found
