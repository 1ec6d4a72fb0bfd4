"""The uncertainty of predictions in every pixel, and which radiograph to label next."""

import math
from collections.abc import Mapping

import numpy as np
import torch as th

from guided_diffusion.segmentation.prediction import Prediction

# least expected foreground, in pixels: radiographs that show less are the least certain of all
_LEAST_FOREGROUND = 1e-3


def entropy(probabilities: th.Tensor, dim: int) -> th.Tensor:
    """Shannon entropy over the classes as a share of its maximum, log C: 0 to 1.

    0 where one class is certain, 1 where all are equally likely.

    :param probabilities: C of them along `dim`, which the result lacks.
    """
    # rounding in float32 can push the sum slightly outside 0 to 1
    terms = th.special.entr(probabilities.clamp(0, 1)).sum(dim)
    return (terms / math.log(max(2, probabilities.shape[dim]))).clamp(0, 1)


def entropy_map(probabilities: np.ndarray) -> np.ndarray:
    """`entropy` of class probabilities `[C x H x W]`: float32 `[H x W]` in [0, 1]."""
    return entropy(th.from_numpy(probabilities), 0).numpy()


class EnsembleMean:
    """The mean of several predictions, and how far they disagree, without keeping them all.

    The disagreement is the mutual information between a pixel's class and the choice of member: the
    entropy of the mean minus the mean of the members' entropies (arXiv 1112.5745, eq. 2), as a
    share of log C.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._entropies = th.zeros(())

    def add(self, probabilities: th.Tensor) -> None:
        """Add a member's probabilities `[N x C x H x W]`."""
        self.count += 1
        self._sum = self._sum + probabilities
        self._entropies = self._entropies + entropy(probabilities, 1)

    def mean(self) -> th.Tensor:
        """`[N x C x H x W]`."""
        return self._sum / self.count

    def disagreement(self) -> th.Tensor:
        """`[N x H x W]` in [0, 1]; 0 where all members agree."""
        return (entropy(self.mean(), 1) - self._entropies / self.count).clamp(0, 1)


def uncertainty_of(prediction: Prediction) -> float:
    """The entropy summed over all pixels, in pixels of expected foreground.

    So large empty borders do not make a radiograph certain, and one in which nothing is found is
    the least certain of all.
    """
    foreground = float(np.sum(1 - prediction.probabilities[0], dtype=np.float64))
    total = float(np.sum(prediction.uncertainty, dtype=np.float64))
    return total / foreground if foreground > _LEAST_FOREGROUND else float("inf")


def next_to_label(scores: Mapping[str, float]) -> str:
    """The name with the highest score: the radiograph that the model is least certain of."""
    return max(scores, key=lambda name: scores[name])
