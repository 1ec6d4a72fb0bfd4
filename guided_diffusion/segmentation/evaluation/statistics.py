"""Bootstrap intervals over images, and paired tests of two models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypedDict

import numpy as np

from guided_diffusion.segmentation.metrics import dice_iou

LEVEL = 0.95
SIGNIFICANCE = 0.05
FEWEST_PAIRS = 6
"""Fewer cannot be significant: of the 2^n exchanges, 2 are as extreme as any result."""
_TAILS = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)
# up to this many images, all 2^N ways of exchanging the two models are enumerated
_EXACT = 12
_CHUNK = 200


class FigureIntervals(TypedDict):
    """[low, high] of each figure, under its name in metrics.json; nan where it has no value."""

    mean_dice: list[float]
    mean_iou: list[float]
    per_class: dict[str, dict[str, list[float]]]


class Intervals(FigureIntervals):
    """Over the whole set, and of the means over images; with how they were drawn."""

    mean_over_images: FigureIntervals
    level: float
    draws: int
    seed: int


def _resamples(images: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is in each draw, float64 [chunk x N]: the bootstrap (Efron, 1979)."""
    rng = np.random.default_rng(seed)
    for first in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - first)
        yield rng.multinomial(images, np.full(images, 1 / images), size).astype(np.float64)


def _weighted_mean(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means [B x K] of values [N x K] with weights [B x N]; nan values do not count."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return (weights @ np.where(known, values, 0)) / (weights @ known)


def _nan_means(values: np.ndarray) -> np.ndarray:
    """Means along the last axis of the values that are not nan."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(-1) / known.sum(-1)


def _interval(draws: np.ndarray) -> list[float]:
    """[low, high] of the draws that have a value; nan if none has."""
    draws = draws[~np.isnan(draws)]
    return [float(v) for v in np.percentile(draws, _TAILS)] if draws.size else [np.nan, np.nan]


def bootstrap(
    confusions: Sequence[np.ndarray], names: Sequence[str], draws: int = 2000, seed: int = 0
) -> Intervals:
    """95 % percentile intervals of Dice and IoU, with images drawn with replacement.

    :param confusions: of each image, [C x C].
    :param names: of the C classes.
    """
    stack = np.stack(confusions).astype(np.float64)
    count = stack.shape[1]
    images = vars(dice_iou(stack))
    found: dict[str, list[np.ndarray]] = {}
    for weights in _resamples(len(stack), draws, seed):
        joined = (weights @ stack.reshape(len(stack), -1)).reshape(-1, count, count)
        over_set = vars(dice_iou(joined))
        for measure, values in images.items():
            means = _weighted_mean(weights, values)
            mean = _weighted_mean(weights, _nan_means(values[:, 1:])[:, None])
            for key, part in (
                (measure, over_set[measure]),
                (f"mean_{measure}", _nan_means(over_set[measure][:, 1:])[:, None]),
                (f"image_{measure}", means),
                (f"image_mean_{measure}", mean),
            ):
                found.setdefault(key, []).append(part)
    drawn = {key: np.concatenate(parts) for key, parts in found.items()}

    def intervals(prefix: str) -> FigureIntervals:
        return {
            "mean_dice": _interval(drawn[f"{prefix}mean_dice"][:, 0]),
            "mean_iou": _interval(drawn[f"{prefix}mean_iou"][:, 0]),
            "per_class": {
                name: {m: _interval(drawn[f"{prefix}{m}"][:, index]) for m in images}
                for index, name in enumerate(names)
            },
        }

    return {
        "level": LEVEL,
        "draws": draws,
        "seed": seed,
        **intervals(""),
        "mean_over_images": intervals("image_"),
    }


@dataclass(frozen=True)
class Difference:
    """Scores of two models on the same images.

    first, second, difference (second minus first): means over `images`. interval: of the
    difference, by bootstrap. p_permutation: two-sided, for the mean when the models are exchanged
    at random in each image. p_wilcoxon: Wilcoxon's signed-rank test.
    """

    images: int
    first: float
    second: float
    difference: float
    interval: list[float]
    p_permutation: float
    p_wilcoxon: float


def paired(
    first: np.ndarray, second: np.ndarray, draws: int = 2000, seed: int = 0
) -> Difference | None:
    """Compare scores [N] of two models; None if no image has one.

    An image for which neither model has a score (nan: the class is in neither mask) is left out.
    If only one model has none, its score is 1: it was right to predict nothing.
    """
    some = ~(np.isnan(first) & np.isnan(second))
    one, other = (np.nan_to_num(scores[some], nan=1.0) for scores in (first, second))
    if not len(one):
        return None
    change = other - one
    drawn = [_weighted_mean(w, change[:, None]) for w in _resamples(len(change), draws, seed)]
    return Difference(
        images=len(change),
        first=float(one.mean()),
        second=float(other.mean()),
        difference=float(change.mean()),
        interval=_interval(np.concatenate(drawn)[:, 0]),
        p_permutation=permutation(change, draws, seed),
        p_wilcoxon=_wilcoxon(change),
    )


def permutation(change: np.ndarray, draws: int = 2000, seed: int = 0) -> float:
    """Share of the sign changes whose mean is at least as far from 0 (Fisher, 1935).

    Not by scipy's `permutation_test`, whose random draws for a seed are others.
    """
    if len(change) <= _EXACT:
        signs, extra = np.array(list(product((-1, 1), repeat=len(change)))), 0
    else:
        rng = np.random.default_rng(seed)
        # the observed signs count as one more draw, so p is never 0
        signs, extra = rng.choice((-1, 1), (max(draws, 10_000), len(change))), 1
    far = np.abs(signs @ change) >= abs(change.sum()) * (1 - 1e-9) - 1e-12
    return float((far.sum() + extra) / (len(signs) + extra))


def _wilcoxon(change: np.ndarray) -> float:
    if not np.any(change):
        return 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(change).pvalue)


def compare(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    names: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Difference | None]:
    """Paired differences in Dice of each foreground class and of their mean.

    :param first: one model's confusion matrices [C x C], one per image.
    :param second: the other model's, of the same images.
    :param names: of the C classes.
    """
    one, other = (dice_iou(np.stack(confusions)).dice for confusions in (first, second))
    # as in `paired`, but for the mean over classes too
    neither = np.isnan(one) & np.isnan(other)
    one, other = (np.where(neither, np.nan, np.nan_to_num(s, nan=1.0)) for s in (one, other))
    found = {"mean": paired(_nan_means(one[:, 1:]), _nan_means(other[:, 1:]), draws, seed)}
    for index, name in list(enumerate(names))[1:]:
        found[name] = paired(one[:, index], other[:, index], draws, seed)
    return found
