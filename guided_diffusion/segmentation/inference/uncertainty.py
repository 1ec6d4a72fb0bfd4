"""The uncertainty of predictions in every pixel, and which radiograph to label next."""

from collections.abc import Mapping

import numpy as np
import torch as th

from guided_diffusion.segmentation.certainty import certainty, entropy
from guided_diffusion.segmentation.prediction import Prediction

# least expected foreground, in pixels: radiographs that show less are the least certain of all
_LEAST_FOREGROUND = 1e-3


def entropy_map(probabilities: np.ndarray) -> np.ndarray:
    """`entropy` of class probabilities `[C x H x W]`: float32 `[H x W]` in [0, 1]."""
    return entropy(th.from_numpy(probabilities), 0).numpy()


class EnsembleMean:
    """The mean of several predictions, and how far they disagree, without keeping them all.

    The disagreement is the mutual information between a pixel's class and the choice of member: the
    entropy of the mean minus the mean of the members' entropies (arXiv 1112.5745, eq. 2), as a
    share of log C. Both means are weighted.
    """

    def __init__(self) -> None:
        self.count = 0
        self._weight = self._sum = self._entropies = th.zeros(())

    def add(
        self, probabilities: th.Tensor, weight: float = 1.0, by_certainty: bool = False
    ) -> None:
        """Add a member's probabilities `[N x C x H x W]`.

        :param weight: how much they count beside other members'.
        :param by_certainty: they count, for each of the N, by their `certainty` as well.
        """
        self.count += 1
        entropies = entropy(probabilities, 1)
        factor = certainty(entropies) if by_certainty else entropies.new_ones(1)
        weights = (weight * factor)[:, None, None]
        self._weight = self._weight + weights
        self._sum = self._sum + weights[:, None] * probabilities
        self._entropies = self._entropies + weights * entropies

    def mean(self) -> th.Tensor:
        """`[N x C x H x W]`."""
        return self._sum / self._weight[:, None]

    def disagreement(self) -> th.Tensor:
        """`[N x H x W]` in [0, 1]; 0 where all members agree."""
        return (entropy(self.mean(), 1) - self._entropies / self._weight).clamp(0, 1)


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
