"""What a segmentation network says of one radiograph."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """What is known of one radiograph, at its own size.

    probabilities: of the classes, float32 `[C x H x W]`. uncertainty: entropy of these as a share
    of log C, float32 `[H x W]` in [0, 1]. disagreement: between the members of an ensemble (see
    `uncertainty.EnsembleMean`), `[H x W]` in [0, 1]; None where there is one member.
    """

    probabilities: np.ndarray
    uncertainty: np.ndarray
    disagreement: np.ndarray | None = None

    def mask(self, threshold: float | None = None) -> np.ndarray:
        """The likeliest class, uint8 `[H x W]`.

        :param threshold: of two classes take the second where it is likelier than this.
        """
        if threshold is not None:
            return (self.probabilities[1] > threshold).astype(np.uint8)
        return self.probabilities.argmax(axis=0).astype(np.uint8)
