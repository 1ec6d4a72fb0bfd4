"""A linear probe: how well a linear classifier of pixels does on a frozen network's features.

Images enter at the timestep of fine-tuning, without noise; outputs of decoder blocks are enlarged
to their size and stacked, as in "Label-Efficient Semantic Segmentation with Diffusion Models"
(arXiv 2112.03126, section 3), whose classifier is not linear.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch as th
import torch.nn.functional as F

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.process import network_timestep
from guided_diffusion.networks.trained import Trained
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.ranks.devices import of_float64
from guided_diffusion.segmentation.metrics import confusion_matrix, nan_mean, present_scores
from guided_diffusion.segmentation.networks.decoder_features import block_scales, decoder_features
from guided_diffusion.segmentation.training.dataset import LabelledImages
from guided_diffusion.unet import UNetModel

TIMESTEP = 1  # of fine-tuning, in steps of the diffusion
# Chosen in folds of ten labelled chest X-rays at 64x64, over four checkpoints of two pretrainings:
# the penalty among 1e-4 to 1, the blocks among those from 1/8, from 1/4 and all of them.
RIDGE = 1e-2
COARSEST = 8  # the coarsest features have 1/8 of the image's sides, the finest half of them,
SMALLEST = 16  # and none fewer pixels along a side
_PIXELS = 2**17  # that the classifier is fitted to at most
_IMAGES = 4  # per forward pass


@dataclasses.dataclass(frozen=True)
class ProbeScores:
    """Dice on each of the N images to evaluate on, [N x C], class 0 being the background.

    A class that an image's mask does not show is nan there.
    """

    dice: np.ndarray

    @property
    def per_image(self) -> list[float]:
        """Mean Dice of the foreground of each image."""
        return [nan_mean(row[1:]) for row in self.dice]

    @property
    def per_class(self) -> list[float]:
        """Mean Dice of each class over the images."""
        return [nan_mean(column) for column in self.dice.T]


@th.no_grad()
def linear_probe(
    trained: Trained[ModelConfig],
    train: LabelledImages,
    val: LabelledImages,
    classes: int,
    device: th.device | str,
) -> ProbeScores:
    """Fit a linear classifier to `train` and evaluate it on `val`, at the network's size.

    A function of weights and images alone, which leaves no trace: it computes in a network of its
    own, in float32 whatever the precision around it, and keeps the state of torch's generator.

    :param classes: number of classes including the background.
    """
    weights, _ = trained.without_classes()
    config = dataclasses.replace(
        trained.model, class_cond=False, cond_drop_prob=0.0, use_fp16=False, use_checkpoint=False
    )
    alone = dataclasses.replace(trained, model=config, weights=weights)
    with th.autocast(th.device(device).type, enabled=False), th.random.fork_rng(devices=[]):
        features = _Features(alone, device)
        regression = RidgeRegression(classes)
        for samples, labels in _samples(features, train):
            regression.add(samples, labels)
        weight, bias = (one.to(device) for one in regression.solve())
        return ProbeScores(np.stack(_evaluate(features, val, weight, bias, classes)))


def probe_blocks(network: UNetModel, image_size: int) -> list[int]:
    """The decoder blocks whose outputs are the features; all if none are of a suitable size."""
    scales = block_scales(len(network.channel_mult), network.num_res_blocks + 1)
    found = [
        number
        for number, scale in enumerate(scales)
        if 2 <= scale <= COARSEST and image_size // scale >= SMALLEST
    ]
    return found or list(range(len(scales)))


class _Features:
    """The feature maps of images."""

    def __init__(self, trained: Trained[ModelConfig], device: th.device | str):
        self.network = cast(UNetModel, trained.network(device))
        self.device = device
        self.blocks = probe_blocks(self.network, trained.model.image_size)
        self.timestep = network_timestep(TIMESTEP, trained.diffusion)

    def __call__(self, images: th.Tensor) -> list[th.Tensor]:
        """Maps images `[N x C x H x W]` in [-1, 1] to activations `[N x width x h x w]`."""
        images = images.to(self.device)
        found = decoder_features(self.network, self.blocks, images, self.timestep)
        return [maps.float() for maps in found]


def _samples(features: _Features, data: LabelledImages) -> Iterator[tuple[th.Tensor, th.Tensor]]:
    """Of each image, features `[P x width]` and classes `[P]` of as many pixels, or of all."""
    most = max(1, _PIXELS // len(data))
    for number in range(len(data)):
        image, masks = data.batch([number])
        mask = masks[0].numpy()
        known = np.argwhere(mask != IGNORE)
        if len(known) > most:
            drawn = np.random.default_rng(rng.derive_seed(0, "probe", number))
            known = known[np.sort(drawn.permutation(len(known))[:most])]
        labels = th.from_numpy(mask[tuple(known.T)])
        yield _at(features(image), known, mask.shape), labels.to(features.device)


def _at(maps: Sequence[th.Tensor], places: np.ndarray, size: Sequence[int]) -> th.Tensor:
    """Values `[P x width]` of maps `[1 x width x h x w]`, bilinear as by `interpolate`.

    :param places: row and column of each pixel in an image of this size, `[P x 2]`.
    """
    scaled = (2 * places + 1) / np.array(size) - 1
    grid = th.from_numpy(scaled[None, None, :, ::-1].astype(np.float32)).to(maps[0].device)
    values = [
        F.grid_sample(one, grid, padding_mode="border", align_corners=False)[0, :, 0]
        for one in maps
    ]
    return th.cat(values).T


class RidgeRegression:
    """Least squares from standardised features to one-hot classes, with a penalty of the weights.

    In closed form, from sums over the samples: these may be added in parts.
    """

    def __init__(self, classes: int):
        self.classes = classes
        self._sums: th.Tensor | float = 0.0

    def add(self, samples: th.Tensor, labels: th.Tensor) -> None:
        """:param samples: `[P x width]`; :param labels: `[P]`."""
        place = of_float64(samples.device)
        samples, labels = samples.to(place), labels.to(place)
        targets = F.one_hot(labels, self.classes).double()
        one = th.ones(len(samples), 1, dtype=th.float64, device=samples.device)
        rows = th.cat([one, samples.double(), targets], 1)
        self._sums = self._sums + rows.T @ rows

    def solve(self) -> tuple[th.Tensor, th.Tensor]:
        """Weight `[classes x width]` and bias `[classes]` for features as they are."""
        sums = th.as_tensor(self._sums)
        means = sums[0, 1:] / sums[0, 0]
        covariance = sums[1:, 1:] / sums[0, 0] - means.outer(means)
        width = len(means) - self.classes
        deviation = covariance.diagonal()[:width].clamp(min=0).sqrt() + 1e-6
        matrix = covariance[:width, :width] / deviation.outer(deviation)
        matrix.diagonal().add_(RIDGE)
        solved = th.linalg.solve(matrix, covariance[:width, width:] / deviation[:, None])
        weight = (solved / deviation[:, None]).T
        return weight.float(), (means[width:] - weight @ means[:width]).float()


def _evaluate(
    features: _Features, data: LabelledImages, weight: th.Tensor, bias: th.Tensor, classes: int
) -> list[np.ndarray]:
    """Dice [classes] of each image."""
    scores = []
    for first in range(0, len(data), _IMAGES):
        images, masks = data.batch(range(first, min(first + _IMAGES, len(data))))
        maps = features(images)
        parts = weight[..., None, None].split([one.shape[1] for one in maps], dim=1)
        # linear, so it may come before enlarging
        small = (F.conv2d(one, part) for one, part in zip(maps, parts))
        large = [F.interpolate(one, masks.shape[1:], mode="bilinear") for one in small]
        predicted = (th.stack(large).sum(0) + bias[:, None, None]).argmax(1).cpu().numpy()
        for mine, true in zip(predicted, masks.numpy().astype(np.uint8)):
            scores.append(present_scores(confusion_matrix(mine, true, classes)).dice)
    return scores
