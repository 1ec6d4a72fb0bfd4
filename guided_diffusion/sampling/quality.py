"""Sample quality metrics on features of generated and real images."""

from dataclasses import dataclass

import numpy as np

# rows of a distance matrix held in memory at once
_CHUNK = 1024


@dataclass(frozen=True)
class Neighbours:
    """The nearest real image of each of M samples: its index `[M]` and its distance `[M]`."""

    index: np.ndarray
    distance: np.ndarray


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances `[N x M]` between the rows of `[N x D]` and `[M x D]`."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)
    return np.sqrt(np.maximum(squares, 0))


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Distance of each point to its k-th nearest neighbour."""
    radii = []
    for first in range(0, len(points), _CHUNK):
        rows = distances(points[first : first + _CHUNK], points)
        # exclude each point itself: exactly 0 despite rounding, it sorts first
        rows[np.arange(len(rows)), first + np.arange(len(rows))] = 0
        radii.append(np.partition(rows, k, axis=1)[:, k])
    return np.concatenate(radii)


def manifold_metrics(real: np.ndarray, samples: np.ndarray, k: int = 5) -> dict[str, float]:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797, section 3).

    Each point has a ball that reaches to its k-th nearest neighbour. Precision: fraction of samples
    inside any real image's ball. Recall: fraction of real images inside any sample's ball. Density:
    mean number of real images' balls that contain a sample, divided by k; may exceed 1. Coverage:
    fraction of real images whose ball contains a sample.

    :param real: features `[N x D]`.
    :param samples: features `[M x D]`.
    :param k: less than N and M.
    """
    real_radii, sample_radii = _radii(real, k), _radii(samples, k)
    in_real_balls = np.zeros(len(samples), np.int64)
    recalled = covered = 0
    for first in range(0, len(real), _CHUNK):
        rows = slice(first, first + _CHUNK)
        apart = distances(real[rows], samples)
        inside = apart <= real_radii[rows, None]
        in_real_balls += inside.sum(axis=0)
        covered += int(inside.any(axis=1).sum())
        recalled += int((apart <= sample_radii).any(axis=1).sum())
    return {
        "precision": float((in_real_balls > 0).mean()),
        "recall": recalled / len(real),
        "density": float(in_real_balls.mean() / k),
        "coverage": covered / len(real),
    }


def frechet_distance(real: np.ndarray, samples: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to the features.

    Equation 6 of arXiv 1706.08500.

    :param real: features `[N x D]`.
    :param samples: features `[M x D]`.
    """
    real, samples = real.astype(np.float64), samples.astype(np.float64)
    apart = real.mean(axis=0) - samples.mean(axis=0)
    covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, samples)]
    root = _symmetric_root(covariances[0])
    # tr (S1 S2)^1/2 from the eigenvalues of S1 S2, shared by the symmetric S1^1/2 S2 S1^1/2
    product = np.linalg.eigvalsh(root @ covariances[1] @ root)
    overlap = np.sqrt(np.maximum(product, 0)).sum()
    spread = np.trace(covariances[0] + covariances[1]) - 2 * overlap
    return float(apart @ apart + max(spread, 0.0))  # rounding may make it negative


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def nearest_real(real: np.ndarray, samples: np.ndarray) -> Neighbours:
    """Each sample's nearest real image, by Euclidean distance of features."""
    index, distance = [], []
    for first in range(0, len(samples), _CHUNK):
        apart = distances(samples[first : first + _CHUNK], real)
        index.append(apart.argmin(axis=1))
        distance.append(apart.min(axis=1))
    return Neighbours(np.concatenate(index), np.concatenate(distance))


def copying(real: np.ndarray, neighbours: Neighbours) -> float:
    """Median distance from samples to their nearest real image, relative to that between real ones.

    Near 1 or above for novel images, near 0 for copies.
    """
    return float(np.median(neighbours.distance) / max(np.median(_radii(real, 1)), 1e-12))
