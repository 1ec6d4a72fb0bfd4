"""Frozen pretrained encoders of colour images, by name.

From `[N x 3 x H x W]` in [-1, 1] they compute maps `[N x width x H/stride x W/stride]`, of which
`widths` and `strides` tell.
"""

import logging
from typing import Any, TypeAlias

import torch as th

from guided_diffusion.networks.imagenet import REMEDY, ImageNetEncoder
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.text import one_line

# the one whose weights come in a package
OFFLINE = "efficientnet-lite0"


def open_encoder(name: str, side: int) -> "Encoder":
    """An encoder with its weights.

    :param name: "efficientnet-lite0", or one of timm's, whose weights timm downloads.
    :param side: height and width of the images that it must take, pixels.
    :raises UserError: if there is none of that name, if it or its weights are missing, or if it
        takes no such images.
    """
    if name == OFFLINE:
        return ImageNetEncoder(3)
    try:
        import timm  # takes seconds to import
    except ImportError as error:
        raise UserError(f"--align_encoder {name} needs timm: {REMEDY}") from error
    if name not in timm.list_models():
        raise UserError(
            f"--align_encoder {name}: there is no such encoder; choose {OFFLINE}, or one of"
            " timm.list_models()"
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news
    try:
        encoder = TimmEncoder(timm.create_model(name, pretrained=True, features_only=True))
        encoder(th.zeros(1, 3, side, side))
    except OSError as error:
        raise UserError(
            f"--align_encoder {name}: cannot download its weights ({type(error).__name__});"
            f" offline choose {OFFLINE}"
        ) from error
    except (AssertionError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--align_encoder {name}: it has no pretrained feature maps of images of {side} x"
            f" {side} pixels ({one_line(error)}): choose another"
        ) from error
    return encoder


class TimmEncoder(th.nn.Module):
    """timm's feature maps of images in [-1, 1], in eval mode.

    :param network: made with `features_only=True`.
    """

    mean: th.Tensor
    deviation: th.Tensor

    def __init__(self, network: Any):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.widths: tuple[int, ...] = tuple(network.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(network.feature_info.reduction())
        for name, numbers in (("mean", "mean"), ("deviation", "std")):
            value = th.tensor(network.pretrained_cfg[numbers])[:, None, None]
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: th.Tensor) -> list[th.Tensor]:
        """`[N x 3 x H x W]` in [-1, 1] to maps `[N x width x H/stride x W/stride]`."""
        return self.network(((images + 1) / 2 - self.mean) / self.deviation)


Encoder: TypeAlias = ImageNetEncoder | TimmEncoder
