"""The U-Net of a diffusion model as a segmentation network."""

from functools import partial

import torch as th

from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.networks.kind import (
    Member,
    MemberOptions,
    Network,
    architecture,
    single_member,
)
from guided_diffusion.unet import SegmentationUNetModel, UNetModel


def build(config: SegmentationConfig) -> SegmentationUNetModel:
    """The network of a model file of kind "unet", with random weights."""
    classes = len(config.categories)
    return architecture(config).build_segmentation(classes, config.depth, config.timestep)


def members(
    model: SegmentationUNetModel, device: th.device, options: MemberOptions
) -> list[Member]:
    """The network at each of the timesteps; a single timestep is folded into its weights."""
    options.check("unet", accepted=("timesteps",))
    if len(options.timesteps) < 2:
        return single_member(model.folded(*options.timesteps), device, options)
    (whole,) = single_member(model, device, options)
    return [Member(partial(_at_timestep, whole.network, step)) for step in options.timesteps]


class ExportCore(th.nn.Module):
    """The network without padding, at its own timestep."""

    def __init__(self, model: SegmentationUNetModel):
        super().__init__()
        self.model, self.multiple = model, model.size_multiple

    def forward(self, images: th.Tensor) -> th.Tensor:
        # one timestep for all images is a constant of the graph, one per image is not
        timestep = th.full((1,), float(self.model.timestep))
        return UNetModel.forward(self.model, images, timestep)


def _at_timestep(network: Network, timestep: float, images: th.Tensor) -> th.Tensor:
    return network(images, th.full((len(images),), float(timestep), device=images.device))
