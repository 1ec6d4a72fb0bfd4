"""Aligning a diffusion network's features with a pretrained encoder's (REPA, arXiv 2410.06940).

Small heads predict, from the network's features of the noised image, the encoder's features of the
clean one. They are trained along with the network and left behind when it is.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from guided_diffusion.networks.config import UNetConfig
from guided_diffusion.networks.encoders import Encoder
from guided_diffusion.unet import UNetModel

# Height and width of the images that the encoder sees, pixels, and the stride of the map that is
# aligned with. Of efficientnet-lite0's maps of radiographs of 64 pixels, enlarged to 64 to 320
# pixels, those of stride 16 at 160 to 224 told organs apart best, in ridge regressions of the masks
# of ten images in five folds.
ENCODER_SIDE, STRIDE = 192, 16
# the decoder block that is aligned is the last one with features of at most this side, pixels
_DECODER_SIDE = 16
# most bytes of maps that are kept on a CPU
_KEPT_BYTES = 2**30


class Targets:
    """The encoder's features of clean images.

    On a CPU each image passes the encoder by itself and once only: its features do not depend on
    the others of its batch, so that a resumed run has the same ones to the bit.

    width: channels of the features.

    :param encoder: which is moved to the device.
    """

    def __init__(self, encoder: Encoder, device: th.device):
        # channels last: faster on processors, by a third in bfloat16
        self.encoder = encoder.to(device).to(memory_format=th.channels_last)
        fine = [index for index, stride in enumerate(encoder.strides) if stride <= STRIDE]
        self._map = fine[-1]
        self.width = encoder.widths[self._map]
        self._kept: dict[bytes, th.Tensor] = {}
        self._kept_bytes = 0

    @th.no_grad()
    def __call__(self, images: th.Tensor) -> th.Tensor:
        """`[N x C x H x W]` in [-1, 1] to `[N x width x h x w]`."""
        if images.device.type != "cpu":
            return self._compute(images)
        return th.cat([self._remembered(image) for image in images.split(1)])

    def _remembered(self, image: th.Tensor) -> th.Tensor:
        key = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
        features = self._kept.get(key)
        if features is None:
            features = self._compute(image)
            if self._kept_bytes < _KEPT_BYTES:
                self._kept[key] = features
                self._kept_bytes += features.nbytes
        return features

    def _compute(self, images: th.Tensor) -> th.Tensor:
        sized = F.interpolate(images, (ENCODER_SIDE, ENCODER_SIDE), mode="bicubic", antialias=True)
        colour = sized.clamp(-1, 1).expand(-1, 3, -1, -1)
        maps = self.encoder(colour.contiguous(memory_format=th.channels_last))
        return maps[self._map].contiguous()


class Site(NamedTuple):
    """A module of the network whose output is aligned, and the channels of that."""

    name: str
    width: int


def alignment_sites(config: UNetConfig) -> list[Site]:
    """The middle block and the last decoder block with features of at most 16 x 16 pixels."""
    found: list[tuple[Site, int]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, th.Tensor], None]:
        return lambda _module, _inputs, output: found.append(
            (Site(name, output.shape[1]), output.shape[-1])
        )

    with th.device("meta"), th.no_grad():
        network = config.build()
        if not isinstance(network, UNetModel):
            raise TypeError(f"{type(network).__name__} is no U-Net")
        network.middle_block.register_forward_hook(watch("middle_block"))
        for number, block in enumerate(network.output_blocks):
            block.register_forward_hook(watch(f"output_blocks.{number}"))
        classes = th.zeros(1, dtype=th.int64) if config.class_cond else None
        network.convert_to_fp32()
        network(th.zeros(1, config.in_channels, *2 * [config.image_size]), th.zeros(1), classes)
    middle, *decoder = found
    coarse = [site for site, side in decoder if side <= max(_DECODER_SIDE, middle[1])]
    return [middle[0], *coarse[-1:]]


class AlignedNetwork(nn.Module):
    """A network with a head on the output of each site.

    In training mode a call computes what the network does, and the heads' predictions beside it.

    :param network: to be trained; its weights and its state_dict stay its own.
    :param width: channels of the encoder's map.
    """

    def __init__(self, network: nn.Module, sites: list[Site], width: int):
        super().__init__()
        self.network = network
        self.heads = nn.ModuleList(_head(site.width, width) for site in sites)
        self._features: list[th.Tensor] = []
        self._predictions: list[th.Tensor] = []
        for site in sites:
            network.get_submodule(site.name).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, _inputs: Any, output: th.Tensor) -> None:
        if module.training:
            self._features.append(output)

    def forward(self, *args: Any, **kwargs: Any) -> th.Tensor:
        """The network's output; `distances` then compares the predictions."""
        self._features.clear()
        output = self.network(*args, **kwargs)
        self._predictions = [head(f) for head, f in zip(self.heads, self._features)]
        self._features.clear()
        return output

    def distances(self, targets: th.Tensor) -> th.Tensor:
        """1 - cosine similarity (arXiv 2410.06940), mean over places and sites `[N]`.

        :param targets: `[N x width x h x w]`, which are resized to the size of each site.
        """
        found = []
        for predicted in self._predictions:
            wanted = F.interpolate(
                targets.float(), predicted.shape[2:], mode="bilinear", antialias=True
            )
            similarity = F.cosine_similarity(predicted.float(), wanted, dim=1)
            found.append(1 - similarity.mean(dim=(1, 2)))
        self._predictions = []
        return th.stack(found).mean(0)


def _head(width: int, target_width: int) -> nn.Module:
    hidden = max(width, target_width)
    return nn.Sequential(nn.Conv2d(width, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, target_width, 1))
