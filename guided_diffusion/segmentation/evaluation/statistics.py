"""How far figures can be trusted: bootstrap intervals over images, paired tests of two models."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from guided_diffusion.segmentation.metrics import dice_iou

LEVEL = 0.95
_TAILS = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)
# up to this many images every way of exchanging the two models is tried: 4096
_EXACT = 12
_CHUNK = 200


def _resamples(images: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is in each draw, float64 [chunk x N]: the bootstrap of Efron (1979)."""
    rng = np.random.default_rng(seed)
    for first in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - first)
        yield rng.multinomial(images, np.full(images, 1 / images), size).astype(np.float64)


def _weighted_mean(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means [B x K] of values [N x K] by weights [B x N]; what is nan does not count."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return (weights @ np.where(known, values, 0)) / (weights @ known)


def _nan_means(values: np.ndarray) -> np.ndarray:
    """Means along the last axis over what is not nan."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(-1) / known.sum(-1)


def _interval(draws: np.ndarray) -> list[float]:
    """[low, high] of the draws that have a value; nan where none has."""
    draws = draws[~np.isnan(draws)]
    return [float(v) for v in np.percentile(draws, _TAILS)] if draws.size else [np.nan, np.nan]


def bootstrap(
    confusions: Sequence[np.ndarray], names: Sequence[str], draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """95 % percentile intervals of Dice and IoU, images drawn with replacement.

    :param confusions: of each image, [C x C].
    :param names: of the C classes.
    :return: [low, high] under the names that the figures have in metrics.json.
    """
    stack = np.stack(confusions).astype(np.float64)
    count = stack.shape[1]
    images = dict(zip(("dice", "iou"), vars(dice_iou(stack)).values()))
    found: dict[str, list[np.ndarray]] = {}
    for weights in _resamples(len(stack), draws, seed):
        joined = (weights @ stack.reshape(len(stack), -1)).reshape(-1, count, count)
        over_set = dict(zip(("dice", "iou"), vars(dice_iou(joined)).values()))
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

    def intervals(prefix: str) -> dict[str, Any]:
        return {
            **{f"mean_{m}": _interval(drawn[f"{prefix}mean_{m}"][:, 0]) for m in images},
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

    first, second, difference (second less first): means over `images`. interval: of the
    difference, by bootstrap. p_permutation: two-sided, of the mean under exchange of the models in
    each image. p_wilcoxon: of the signed ranks.
    """

    images: int
    first: float
    second: float
    difference: float
    interval: list[float]
    p_permutation: float
    p_wilcoxon: float

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


def paired(
    first: np.ndarray, second: np.ndarray, draws: int = 2000, seed: int = 0
) -> Difference | None:
    """Compare scores [N] of two models; None where no image has one.

    An image without score (nan: a class that is in neither mask) is left out if neither model has
    one, and counts as 1 for a model that alone drew nothing: it was right.
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
        p_permutation=_permutation(change, draws, seed),
        p_wilcoxon=_wilcoxon(change),
    )


def _permutation(change: np.ndarray, draws: int, seed: int) -> float:
    """Share of the sign changes whose mean is at least as far from 0 (Fisher, 1935)."""
    if len(change) <= _EXACT:
        signs, extra = np.array(list(product((-1, 1), repeat=len(change)))), 0
    else:
        rng = np.random.default_rng(seed)
        # the observed one belongs to what is drawn from, so p is never 0
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

    :param first: confusion matrices [C x C] of the images; `second`: of the same images.
    """
    scores = [dice_iou(np.stack(confusions)).dice for confusions in (first, second)]
    # a class that one model alone found nothing of counts as in `paired`, in the mean as well
    none = np.isnan(scores[0]) & np.isnan(scores[1])
    scores = [np.where(none, np.nan, np.nan_to_num(s, nan=1.0)) for s in scores]
    found = {"mean": paired(*(_nan_means(s[:, 1:]) for s in scores), draws, seed)}
    for index, name in list(enumerate(names))[1:]:
        found[name] = paired(*(s[:, index] for s in scores), draws, seed)
    return found
