"""Segmentation by drawing: a diffusion of class maps, conditioned on the radiograph.

Each draw is a complete mask that is plausible for the radiograph; the mean of several is a
segmentation, and where they differ it is uncertain (as in arXiv 2112.03145, "Diffusion Models for
Implicit Image Segmentation Ensembles").
"""

import dataclasses
from functools import partial
from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import MaskDiffusionConfig
from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.runtime.command_line.flags import from_mapping
from guided_diffusion.sampling.images import sample_images
from guided_diffusion.sampling.solvers import SamplerOptions
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.networks.kind import Member, MemberOptions, architecture
from guided_diffusion.segmentation.networks.padding import crop_to, pad_to_multiple
from guided_diffusion.unet import ConditionalUNetModel

# how masks are drawn by default
NUM_SAMPLES = 4
STEPS = 20
SAMPLER = "dpm++2m"
# standard deviation of a drawn value around 1 or -1
_ERROR = 0.4


def encode(masks: th.Tensor, classes: int) -> th.Tensor:
    """Class maps as what is diffused.

    :param masks: integers `[N x H x W]`; IGNORE becomes background.
    :return: float32 `[N x C x H x W]` of 1 and -1, one channel per class; for two classes only the
        second's.
    """
    masks = masks.long()
    masks = masks.where(masks < classes, 0)
    if classes == 2:
        return masks[:, None].float() * 2 - 1
    return F.one_hot(masks, classes).movedim(-1, 1).float() * 2 - 1


def decode(drawn: th.Tensor) -> th.Tensor:
    """Drawn class maps, `[N x C x H x W]` around 1 and -1, as class probabilities.

    By Bayes' rule, with equally likely classes and a normal error of each drawn value: the squared
    distances from two classes' own maps differ by four times the difference of their channels. So
    the highest channel wins even where none comes near 1.

    :return: `[N x classes x H x W]`, above 0 and summing to 1.
    """
    if drawn.shape[1] == 1:
        drawn = th.cat([-drawn, drawn], dim=1) / 2
    return (drawn * (2 / _ERROR**2)).softmax(1)


class MaskDiffusionModel(nn.Module):
    """Radiographs to class scores by drawing masks.

    The same radiograph and seed give the same masks, whatever else is in the batch.

    :param network: predicts the noise in a class map, conditioned on the radiograph.
    :param diffusion: the diffusion process of the class maps.
    :param num_samples: masks to draw per radiograph.
    :param steps: sampler steps per mask.
    :param sampler: a key of `solvers.SAMPLERS`.
    :param seed: seeds the noise; mask s is a function of the seed and of s.
    """

    def __init__(
        self,
        network: ConditionalUNetModel,
        diffusion: Any,
        num_samples: int = NUM_SAMPLES,
        steps: int = STEPS,
        sampler: str = SAMPLER,
        seed: int = 0,
    ):
        super().__init__()
        self.network = network
        self.diffusion = diffusion
        self.num_samples = num_samples
        self.steps = steps
        self.sampler = sampler
        self.seed = seed

    @property
    def size_multiple(self) -> int:
        """Sides are padded to a multiple of this, in pixels."""
        return 2 ** (len(self.network.channel_mult) - 1)

    def forward(self, images: th.Tensor) -> th.Tensor:
        """Logarithm of the mean class probabilities: `[N x C x H x W]` in [-1, 1] to logits."""
        total = self.draw(images, 0)
        for number in range(1, self.num_samples):
            total += self.draw(images, number)
        return (total / self.num_samples).log()

    def draws(self, images: th.Tensor) -> th.Tensor:
        """Class probabilities of each drawn mask: `[S x N x classes x H x W]`."""
        return th.stack([self.draw(images, number) for number in range(self.num_samples)])

    def draw(self, images: th.Tensor, number: int, **options: Any) -> th.Tensor:
        """Class probabilities of the mask of this number, from 0: `[N x classes x H x W]`.

        :param images: `[N x C x H x W]` in [-1, 1], of any size.
        :param options: fields of `SamplerOptions`.
        """
        padded = pad_to_multiple(images, self.size_multiple)
        channels = self.network.in_channels - self.network.cond_channels
        drawn = sample_images(
            self.network,
            self.diffusion,
            (channels, *padded.shape[2:]),
            [number] * len(images),
            sampler=self.sampler,
            steps=min(self.steps, self.diffusion.num_timesteps),
            seed=self.seed,
            device=images.device,
            options=SamplerOptions(model_kwargs={"cond": padded}, **options),
        )
        return decode(crop_to(drawn, images))


def build(config: SegmentationConfig) -> MaskDiffusionModel:
    """The network of a model file of kind "mask_diffusion", with random weights."""
    fields = dataclasses.asdict(architecture(config))
    fields["num_segmentation_classes"] = len(config.categories)
    network = from_mapping(MaskDiffusionConfig, fields).build()
    diffusion = from_mapping(DiffusionConfig, config.options["diffusion"]).build()
    return MaskDiffusionModel(network, diffusion)


def members(model: MaskDiffusionModel, device: th.device, options: MemberOptions) -> list[Member]:
    """One member for each mask drawn."""
    drawing = ("num_samples", "steps", "sampler", "seed")
    options.check("mask_diffusion", accepted=drawing)
    for name in drawing:
        if (value := getattr(options, name)) is not None:
            setattr(model, name, value)
    model.to(device)
    if options.compile:
        model.network.compile()
    return [Member(partial(_draw_scores, model, number)) for number in range(model.num_samples)]


def _draw_scores(model: MaskDiffusionModel, number: int, images: th.Tensor) -> th.Tensor:
    return model.draw(images, number).float().clamp_min(1e-12).log()


def describe(
    model: MaskDiffusionConfig,
    diffusion: DiffusionConfig,
    reading: ReadingConfig,
    categories: ClassTable,
) -> SegmentationConfig:
    """The configuration that the model file of a mask diffusion network stores."""
    return SegmentationConfig(
        model=dataclasses.replace(model, use_fp16=False),
        reading=reading,
        categories=categories,
        kind="mask_diffusion",
        options={"diffusion": dataclasses.asdict(diffusion)},
    )
