"""Vectors of features to points in few dimensions, in which distances mean something."""

from collections.abc import Sequence

import numpy as np

from guided_diffusion.images.files import evenly_spaced

# components that hold this share of the variance, and at most so many
VARIANCE = 0.9
MOST_COMPONENTS = 128
# vectors that the components are computed from
SAMPLE = 2048
# a deviation smaller than this share of the mean one is rounding
_CONSTANT = 1e-4


def to_points(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Standardise each feature and keep the principal components: float32 [N x P].

    Means, deviations and components are those of an evenly spaced sample of the vectors, all of
    them up to `SAMPLE`; no more than a part of the others is in memory at once.

    :param parts: vectors [n x D], together N.
    """
    places = [(part, row) for part, vectors in enumerate(parts) for row in range(len(vectors))]
    rows = [parts[part][row] for part, row in evenly_spaced(places, SAMPLE)]
    sample = np.stack(rows).astype(np.float32)
    mean, deviation = sample.mean(0), sample.std(0)
    varies = deviation > _CONSTANT * deviation.mean()
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0).astype(np.float32)
    basis = _components((sample - mean) * scale)
    return np.concatenate([((part - mean) * scale) @ basis for part in parts]).astype(np.float32)


def _components(vectors: np.ndarray) -> np.ndarray:
    """Orthonormal directions of most variance [D x P], of centred vectors [n x D]."""
    n, width = vectors.shape
    products = vectors @ vectors.T if n < width else vectors.T @ vectors
    values, directions = np.linalg.eigh(products.astype(np.float64))
    values, directions = values[::-1].clip(0), directions[:, ::-1]
    shares = np.cumsum(values) / max(values.sum(), np.finfo(float).tiny)
    count = min(int(np.searchsorted(shares, VARIANCE)) + 1, MOST_COMPONENTS, len(values))
    kept = directions[:, :count]
    if n < width:
        kept = vectors.T @ (kept / np.sqrt(values[:count]).clip(np.finfo(float).tiny))
    return kept.astype(np.float32)
