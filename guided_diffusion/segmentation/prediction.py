"""The prediction for one radiograph."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """Class probabilities and uncertainty of one radiograph, at its own size.

    :param probabilities: float32 `[C x H x W]`.
    :param uncertainty: their entropy as a share of log C, float32 `[H x W]` in [0, 1].
    :param disagreement: between the members of an ensemble (see `uncertainty.EnsembleMean`),
        `[H x W]` in [0, 1]; None if there is only one member.
    """

    probabilities: np.ndarray
    uncertainty: np.ndarray
    disagreement: np.ndarray | None = None

    def mask(self, threshold: float | None = None) -> np.ndarray:
        """The most probable class, uint8 `[H x W]`.

        :param threshold: for two classes: the second where its probability is above this.
        """
        if threshold is not None:
            return (self.probabilities[1] > threshold).astype(np.uint8)
        return self.probabilities.argmax(axis=0).astype(np.uint8)
