"""A tiny network that draws masks."""

from golden_util import fill_parameters
from sampling_util import DIFFUSION, NETWORK

from guided_diffusion.networks.conditional import MaskDiffusionConfig
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.segmentation.networks.mask_diffusion import MaskDiffusionModel


def config_of(classes):
    return from_flags(MaskDiffusionConfig, {"num_segmentation_classes": classes}, NETWORK)


def build(classes=3, **options) -> MaskDiffusionModel:
    network = fill_parameters(config_of(classes).build())
    return MaskDiffusionModel(network, DIFFUSION.build(), steps=4, **options).eval()
