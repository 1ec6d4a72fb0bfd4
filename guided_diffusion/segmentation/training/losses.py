"""The loss of a segmentation network."""

import numpy as np
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.training.learning import LOSSES, WEIGHTINGS

# added to both sides of Dice's fraction, so that a class that is nowhere has Dice 1
_SMOOTH = 1e-5
# least weight of all pixels, so that a batch without known pixels has loss 0
_TINY = 1e-12


def class_weights(pixels: np.ndarray, weighting: str) -> th.Tensor | None:
    """Class weights of the cross-entropy, float32 `[C]`, averaging 1 over the classes present.

    Classes without pixels get 1.

    :param pixels: number of pixels of each class in the training masks, `[C]`.
    :param weighting: "inverse" class frequency, its square root "sqrt", or "none".
    :return: None for "none".
    :raises UserError: for any other weighting.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"--class_weighting {weighting}: choose one of {', '.join(WEIGHTINGS)}")
    if weighting == "none":
        return None
    frequency = pixels / max(1, pixels.sum())
    power = 0.5 if weighting == "sqrt" else 1.0
    present = frequency > 0
    weights = np.ones(len(frequency))
    weights[present] = frequency[present] ** -power
    weights[present] /= weights[present].mean()
    return th.from_numpy(weights.astype(np.float32))


class SegmentationLoss(nn.Module):
    """Cross-entropy, soft Dice (arXiv 1606.04797) or their sum, without IGNORE pixels.

    Cross-entropy is a mean over pixels; Dice is computed over all images of a batch together, so
    that a class which one of them lacks does not count as missed there. Both are functions of sums
    over pixels, so a batch may be evaluated in parts.

    :param kind: "ce+dice", "ce" or "dice".
    :param weights: class weights of the cross-entropy, `[C]`; None for equal ones.
    :param unknown: bool `[C]`, the classes that may be there though a mask does not show them.
        Where it does not, they and the background count as one in that image (the marginal loss of
        arXiv 2007.03868, section 3.1); None for none.
    :raises UserError: for any other kind.
    """

    weights: th.Tensor | None
    unknown: th.Tensor | None

    def __init__(
        self,
        kind: str = "ce+dice",
        weights: th.Tensor | None = None,
        unknown: th.Tensor | None = None,
    ):
        super().__init__()
        if kind not in LOSSES:
            raise UserError(f"--loss {kind}: choose one of {', '.join(LOSSES)}")
        self.parts = kind.split("+")  # "ce" is in "dice" too
        self.weights: th.Tensor | None
        self.register_buffer("weights", weights)
        self.unknown: th.Tensor | None
        self.register_buffer("unknown", unknown)

    def forward(self, scores: th.Tensor, masks: th.Tensor) -> th.Tensor:
        """Loss, a scalar, of logits `[N x C x H x W]` for class indices `[N x H x W]`."""
        return self.of(self.sums(scores, masks))

    def sums(self, scores: th.Tensor, masks: th.Tensor) -> th.Tensor:
        """What the loss is a function of, `[2 + 2 C]`; the sums of a batch are those of its parts.

        Cross-entropy and weight of all pixels; of each class, the overlap of probabilities and
        truth, and the sum of both.
        """
        scores = scores.float()
        known = masks != IGNORE
        classes = masks.where(known, 0)
        truth = F.one_hot(classes, scores.shape[1]).movedim(-1, 1) * known[:, None]
        if self.unknown is not None:
            scores = _with_background(scores, truth, self.unknown)
        entropy = F.cross_entropy(scores, masks, self.weights, ignore_index=IGNORE, reduction="sum")
        counted = known.float() if self.weights is None else self.weights[classes] * known
        probabilities = scores.softmax(1) * known[:, None]
        overlap = (probabilities * truth).sum((0, 2, 3))
        sizes = (probabilities + truth).sum((0, 2, 3))
        return th.cat([entropy[None], counted.sum()[None], overlap, sizes])

    def of(self, sums: th.Tensor) -> th.Tensor:
        """Loss, a scalar, of `sums`; where no pixel is known, it is 0."""
        loss = sums.new_zeros(())
        if "ce" in self.parts:
            loss = loss + sums[0] / sums[1].clamp_min(_TINY)
        if "dice" in self.parts:
            overlap, sizes = sums[2:].chunk(2)
            loss = loss + 1 - ((2 * overlap + _SMOOTH) / (sizes + _SMOOTH)).mean()
        return loss


def _with_background(scores: th.Tensor, truth: th.Tensor, unknown: th.Tensor) -> th.Tensor:
    """Logits `[N x C x H x W]` in which unknown classes have joined the background.

    In each image, of the unknown classes those that its one-hot mask, of the same shape, lacks.
    """
    shown = truth.flatten(2).any(2)  # [N x C]
    joining = (unknown & ~shown)[:, :, None, None]
    joining[:, 0] = True
    background = scores.masked_fill(~joining, -th.inf).logsumexp(1, keepdim=True)
    return th.cat([background, scores.masked_fill(joining, -th.inf)[:, 1:]], 1)
