"""Learning from unlabelled radiographs: a teacher's confident predictions label the student's view.

The teacher, a moving average of the student's weights (arXiv 1703.01780), sees a weakly augmented
view. Where its class probability reaches a threshold, that class becomes the label of the same
pixel in a strongly augmented view (arXiv 2001.07685, equation 4). Both views share one geometry,
so labels need no warping.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np
import torch as th
import torch.nn.functional as F

from guided_diffusion.images.files import list_radiographs
from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.image_io import check_images, read_image
from guided_diffusion.images.reading import ReadingConfig, normalize
from guided_diffusion.images.swaps import Swaps
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.contents import digests
from guided_diffusion.segmentation.training.augment import Augmentation, strong_intensity
from guided_diffusion.segmentation.training.dataset import LabelledImages, draw_order

# bytes of images to cache; the least recently used are read from disk again
_CACHE_BYTES = 2**30


class _OnDemand(Sequence[np.ndarray]):
    """A sequence of `length` arrays, each fetched by its index when it is accessed."""

    def __init__(self, length: int, fetch: Callable[[int], np.ndarray]):
        self.length, self.fetch = length, fetch

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self.fetch(i) for i in range(self.length)[index]]
        return self.fetch(range(self.length)[index])


def load_unlabelled(folder: str, reading: ReadingConfig) -> LabelledImages:
    """The radiographs under a folder, read on demand; masks are 0 inside them, IGNORE in padding.

    Their names are their paths, their digests those of the radiographs alone.

    :raises UserError: if there are none.
    """
    paths, note = list_radiographs(folder)
    if note:
        print(f"{folder}: {note}")
    check_images(paths)

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(paths[index], reading.in_channels, reading.intensity_rule())
        mask = reading.geometry().apply_mask(np.zeros(image.shape[:2], np.uint8))
        return reading.prepare(image), mask

    size = sum(array.nbytes for array in read(0))
    cached = functools.lru_cache(maxsize=max(1, _CACHE_BYTES // size))(read)
    images = _OnDemand(len(paths), lambda index: cached(index)[0])
    masks = _OnDemand(len(paths), lambda index: cached(index)[1])
    window = reading.geometry().height_width if reading.resize == "native" else None
    return LabelledImages(tuple(paths), images, masks, window, tuple(digests(paths)))


class Consistency:
    """Batches of unlabelled radiographs in two views, and the loss between them.

    :param data: see `load_unlabelled`.
    :param batch_size: radiographs per step.
    :param confidence: lowest probability, 0 to 1, at which the teacher's class becomes a label.
    :param weight: weight of the loss after the ramp.
    :param ramp: steps over which the weight rises; 0 for none.
    :param seed: seeds the order and the augmentation.
    :param flip: see `Augmentation`.
    :param swaps: see `Augmentation`.
    """

    def __init__(
        self,
        data: LabelledImages,
        batch_size: int,
        confidence: float,
        weight: float,
        ramp: int,
        seed: int,
        flip: str = "none",
        swaps: Swaps = (),
    ):
        self.data = data
        self.batch_size = batch_size
        self.confidence = confidence
        self.full_weight = weight
        self.ramp = ramp
        self.seed = seed
        self.weak = Augmentation("light", flip, swaps)
        self.strong = Augmentation(transforms=strong_intensity())

    def weight(self, step: int) -> float:
        """Weight of the loss, rising as exp(-5 (1 - t)^2) (arXiv 1703.01780, appendix)."""
        progress = min(1.0, step / self.ramp) if self.ramp else 1.0
        return self.full_weight * math.exp(-5 * (1 - progress) ** 2)

    def views(self, step: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """The batch of a step, a function of (seed, step) alone.

        :return: weakly and strongly augmented images `[N x C x H x W]` in [-1, 1], and masks
            `[N x H x W]`: 0 inside the radiograph, IGNORE outside.
        """
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = [draw_order(n, len(self.data), self.seed, "unlabelled") for n in numbers]
        seeds = [rng.derive_seed(self.seed, "weak", n) for n in numbers]
        weak, masks = self.data.batch(chosen, self.weak, seeds)
        pixels = weak.add(1).mul(127.5).round().to(th.uint8).movedim(1, -1).numpy()
        strong = [
            self.strong(image, mask, rng.derive_seed(self.seed, "strong", n))[0]
            for n, image, mask in zip(numbers, pixels, masks.numpy().astype(np.uint8))
        ]
        return weak, normalize(np.stack(strong)), masks

    def labels(self, scores: th.Tensor, masks: th.Tensor) -> th.Tensor:
        """The teacher's classes `[N x H x W]`, IGNORE where it is unsure or the mask is IGNORE.

        :param scores: its logits `[N x C x H x W]`.
        """
        probability, label = scores.float().softmax(1).max(1)
        known = (probability >= self.confidence) & (masks != IGNORE)
        return label.where(known, th.full_like(label, IGNORE))


def consistency_loss(scores: th.Tensor, labels: th.Tensor) -> th.Tensor:
    """Cross-entropy of logits `[N x C x H x W]`, summed over labelled pixels, divided by all."""
    total = F.cross_entropy(scores.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / labels.numel()
