"""The loss of a segmentation network."""

import numpy as np
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.runtime.errors import UserError

LOSSES = ("ce+dice", "ce", "dice")
WEIGHTINGS = ("none", "sqrt", "inverse")


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

    :param kind: "ce+dice", "ce" or "dice".
    :param weights: class weights of the cross-entropy, `[C]`; None for equal ones.
    :raises UserError: for any other kind.
    """

    weights: th.Tensor | None

    def __init__(self, kind: str = "ce+dice", weights: th.Tensor | None = None):
        super().__init__()
        if kind not in LOSSES:
            raise UserError(f"--loss {kind}: choose one of {', '.join(LOSSES)}")
        self.kind = kind
        self.weights: th.Tensor | None
        self.register_buffer("weights", weights)
        if "dice" in kind:
            from monai.losses import MaskedDiceLoss  # importing monai takes seconds

            # over the batch: a class that one image lacks must not count as missed there
            self.dice = MaskedDiceLoss(include_background=True, batch=True)

    def forward(self, scores: th.Tensor, masks: th.Tensor) -> th.Tensor:
        """Mean loss, a scalar, of logits `[N x C x H x W]` for class indices `[N x H x W]`."""
        scores = scores.float()
        known = masks != IGNORE
        loss = scores.new_zeros(())
        if "ce" in self.kind:
            loss = loss + F.cross_entropy(scores, masks, self.weights, ignore_index=IGNORE)
        if "dice" in self.kind:
            classes = masks.where(known, th.zeros_like(masks))
            truth = F.one_hot(classes, scores.shape[1]).movedim(-1, 1).to(scores.dtype)
            mask = known[:, None].to(scores.dtype)
            loss = loss + self.dice(scores.softmax(1), truth, mask)
        return loss
