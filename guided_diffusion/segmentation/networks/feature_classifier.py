"""A pixel classifier on the features of a frozen diffusion network.

The method of "Label-Efficient Semantic Segmentation with Diffusion Models" (arXiv 2112.03126,
section 3): the image is noised to a few timesteps, the activations of some decoder blocks are
enlarged to the image's size and stacked, and a small network classifies each pixel by them. With a
head shared by all timesteps, each timestep's features are classified by themselves and the
probabilities averaged (arXiv 2311.07421).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.networks.process import network_timestep
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.command_line.flags import from_mapping
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.networks.decoder_features import decoder_features
from guided_diffusion.segmentation.networks.kind import (
    Member,
    MemberOptions,
    architecture,
    single_member,
)
from guided_diffusion.segmentation.networks.padding import crop_to, pad_to_multiple
from guided_diffusion.unet import UNetModel

# arXiv 2112.03126, appendix: fewer hidden units suffice for few classes
_HIDDEN = ((30, (128, 32)), (255, (256, 128)))


class PixelHead(nn.Module):
    """Classifies every pixel by itself: fully connected layers with ReLU and batch norm between.

    The first layer is applied before enlarging, which is the same, since both are linear, and
    needs a fraction of the memory.

    :param widths: channels of each feature map.
    """

    def __init__(self, widths: Sequence[int], classes: int):
        super().__init__()
        hidden = next(sizes for most, sizes in _HIDDEN if classes < most)
        first = [nn.Conv2d(w, hidden[0], 1, bias=False) for w in widths]
        for layer in first:  # as one layer on all channels would be initialised
            nn.init.uniform_(layer.weight, -(sum(widths) ** -0.5), sum(widths) ** -0.5)
        self.first = nn.ModuleList(first)
        self.bias = nn.Parameter(th.zeros(hidden[0], 1, 1))
        self.rest = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm2d(hidden[0]),
            nn.Conv2d(hidden[0], hidden[1], 1),
            nn.ReLU(),
            nn.BatchNorm2d(hidden[1]),
            nn.Conv2d(hidden[1], classes, 1),
        )

    def forward(self, features: Sequence[th.Tensor], size: tuple[int, int]) -> th.Tensor:
        """Maps `[N x width x h x w]` to logits `[N x classes x *size]`."""
        parts = (
            F.interpolate(layer(f), size, mode="bilinear", align_corners=False)
            for layer, f in zip(self.first, features)
        )
        return self.rest(sum(parts) + self.bias)


class FeatureClassifier(nn.Module):
    """A pixel head on a frozen diffusion network's features of noised images.

    :param backbone: network of the diffusion, without classes; it never trains.
    :param blocks: decoder blocks whose outputs are features, 0 being the deepest.
    :param timesteps: to which images are noised, counted in the diffusion's steps.
    :param shared_head: one head for all timesteps instead of one on all their features.
    :param noise_seed: seeds the noise, which is the same for all images and timesteps.
    """

    def __init__(
        self,
        backbone: UNetModel,
        diffusion: DiffusionConfig,
        classes: int,
        blocks: Sequence[int],
        timesteps: Sequence[int],
        shared_head: bool = False,
        noise_seed: int = 0,
    ):
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.blocks, self.timesteps = tuple(blocks), tuple(timesteps)
        self.shared_head = shared_head
        self.noise_seed = noise_seed
        self.network_timesteps = [network_timestep(t, diffusion) for t in self.timesteps]
        process = dataclasses.replace(diffusion, timestep_respacing="").build()
        self.signal = np.sqrt(process.alphas_cumprod[list(self.timesteps)]).tolist()
        self.multiple = 2 ** (len(backbone.channel_mult) - 1)
        widths = [_width(backbone.output_blocks[block]) for block in self.blocks]
        self.head = PixelHead(widths * (1 if shared_head else len(self.timesteps)), classes)
        self._remembered: dict[bytes, list[th.Tensor]] | None = None  # by the images' bytes

    def remember_features(self) -> None:
        """Keep the features of every image seen from now on: for training without augmentation."""
        self._remembered = {}

    def train(self, mode: bool = True) -> "FeatureClassifier":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: th.Tensor) -> th.Tensor:
        """Maps `[N x in_channels x H x W]` in [-1, 1] to logits `[N x classes x H x W]`."""
        padded = pad_to_multiple(images, self.multiple)
        features, size = self.features(padded), padded.shape[2:]
        if not self.shared_head:
            scores = self.head(features, size)
        else:
            count = len(self.blocks)
            together = [th.cat(features[block::count]) for block in range(count)]
            each = self.head(together, size).float().log_softmax(1)
            each = each.unflatten(0, (len(self.timesteps), len(images)))
            scores = each.logsumexp(0) - np.log(len(self.timesteps))
        return crop_to(scores, images)

    @th.no_grad()
    def features(self, images: th.Tensor) -> list[th.Tensor]:
        """Activations `[N x width x h x w]`: all blocks at the first timestep, then the next."""
        if self._remembered is None:
            return self._compute(images)
        keys = [image.cpu().numpy().tobytes() for image in images]
        for key, image in zip(keys, images):
            if key not in self._remembered:
                self._remembered[key] = self._compute(image[None])
        return [th.cat(maps) for maps in zip(*(self._remembered[key] for key in keys))]

    def _compute(self, images: th.Tensor) -> list[th.Tensor]:
        noise = rng.normal(self.noise_seed, "features", [0], images.shape[1:]).to(images)
        found: list[th.Tensor] = []
        for signal, timestep in zip(self.signal, self.network_timesteps):
            noised = signal * images + (1 - signal**2) ** 0.5 * noise
            found += decoder_features(self.backbone, self.blocks, noised, timestep)
        return found


def build(config: SegmentationConfig) -> FeatureClassifier:
    """The network of a model file of kind "features", with random weights."""
    options = config.options
    return FeatureClassifier(
        architecture(config).build(),
        from_mapping(DiffusionConfig, options["diffusion"]),
        len(config.categories),
        options["blocks"],
        options["timesteps"],
        options["shared_head"],
        options["noise_seed"],
    )


def members(model: FeatureClassifier, device: th.device, options: MemberOptions) -> list[Member]:
    """The network alone."""
    options.check("features")
    return single_member(model, device, options)


def existing_blocks(wanted: Sequence[int], count: int) -> list[int]:
    """The wanted blocks that a decoder of `count` blocks has, in ascending order.

    :raises UserError: if it has none of them.
    """
    found = sorted({block for block in wanted if 0 <= block < count})
    if not found:
        raise UserError(
            f"--feature_blocks {','.join(map(str, wanted))}: this decoder has the blocks 0 to"
            f" {count - 1}"
        )
    return found


def blocks_by_scale(scales: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The last block of each wanted scale that a decoder has; its last block if it has none.

    :param scales: of its blocks, see `decoder_features.block_scales`.
    """
    last = {scale: block for block, scale in enumerate(scales)}
    return sorted(last[scale] for scale in wanted if scale in last) or [len(scales) - 1]


def _width(block: nn.Module) -> int:
    """Channels of a decoder block's output."""
    last = list(block.children())[-1]  # an attention block keeps its input's channels
    sizes = vars(last)
    return sizes.get("out_channels", sizes["channels"])
