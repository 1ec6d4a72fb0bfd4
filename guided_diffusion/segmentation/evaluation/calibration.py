"""Calibration of a model: confidence against accuracy, uncertainty against error; and plots."""

import numpy as np

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.segmentation.inference.uncertainty import entropy_map
from guided_diffusion.segmentation.metrics import nan_mean
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.segmentation.visuals.render import new_figure, save_figure

BINS = 15
DECILES = 10
# uncertainties from 0 to 1 by their bits in float16, which sort as the numbers do
_LEVELS = int(np.float16(1).view(np.uint16)) + 1


class Calibration:
    """Counts over the pixels of a set, image by image."""

    def __init__(self) -> None:
        self._reliability = np.zeros((BINS, 3))  # pixels, correct pixels, sum of confidences
        self._uncertainty = np.zeros((_LEVELS, 2), np.int64)  # pixels, wrong pixels
        self._images: list[tuple[float, float]] = []

    def add(self, prediction: Prediction, true: np.ndarray, dice: float) -> None:
        """Count one radiograph.

        :param true: class indices `[H x W]`; IGNORE pixels are not counted.
        :param dice: the radiograph's mean foreground Dice, or nan.
        """
        known = true != IGNORE
        right = (prediction.probabilities.argmax(0) == true)[known]
        confidence = prediction.probabilities.max(0)[known].astype(np.float64)
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        for column, weights in enumerate((None, right, confidence)):
            self._reliability[:, column] += np.bincount(bins, weights, minlength=BINS)
        level = prediction.uncertainty.clip(0, 1).astype(np.float16).view(np.uint16)[known]
        self._uncertainty[:, 0] += np.bincount(level, minlength=_LEVELS)
        self._uncertainty[:, 1] += np.bincount(level[~right], minlength=_LEVELS)
        self._images.append((float(prediction.uncertainty.mean()), dice))

    @property
    def images(self) -> int:
        """Number of radiographs counted."""
        return len(self._images)

    def expected_error(self) -> float:
        """Expected calibration error: mean distance of confidence from accuracy over the pixels.

        Confidence is the highest class probability, in 15 bins of equal width (arXiv 1706.04599,
        eq. 3).
        """
        pixels, right, confidence = self._reliability.T
        return float(np.abs(right - confidence).sum() / pixels.sum())

    def bins(self) -> list[dict[str, float]]:
        """Share of the pixels, mean confidence and accuracy of each bin that is not empty."""
        total = self._reliability[:, 0].sum()
        return [
            {
                "share": float(pixels / total),
                "confidence": float(confidence / pixels),
                "accuracy": float(right / pixels),
            }
            for pixels, right, confidence in self._reliability
            if pixels
        ]

    def deciles(self) -> list[dict[str, float]]:
        """Mean uncertainty and error rate of each tenth of the pixels, by ascending uncertainty.

        Pixels of equal uncertainty at an edge are shared between its two sides.
        """
        pixels, wrong = self._uncertainty.astype(np.float64).T
        levels = np.arange(_LEVELS, dtype=np.uint16).view(np.float16).astype(np.float64)
        edges = np.linspace(0, pixels.sum(), DECILES + 1)
        cumulative = np.concatenate([[0], np.cumsum(pixels)])
        sums = [
            np.diff(np.interp(edges, cumulative, np.concatenate([[0], np.cumsum(values)])))
            for values in (pixels, wrong, pixels * levels)
        ]
        return [
            {"uncertainty": float(u / count), "error_rate": float(w / count)}
            for count, w, u in zip(*sums)
        ]

    def rank_correlation(self) -> float:
        """Spearman's rank correlation of the images' mean uncertainty with their Dice.

        nan for fewer than 3 images, or where either is constant.
        """
        pairs = np.array([pair for pair in self._images if not np.isnan(pair[1])]).reshape(-1, 2)
        if len(pairs) < 3 or np.ptp(pairs, axis=0).min() == 0:
            return float("nan")
        from scipy.stats import spearmanr

        return float(spearmanr(*pairs.T).statistic)

    def summary(self) -> dict[str, float | list[dict[str, float]]]:
        """The section "calibration" of metrics.json."""
        return {
            "expected_calibration_error": self.expected_error(),
            "mean_uncertainty": nan_mean([uncertainty for uncertainty, _ in self._images]),
            "rank_correlation_of_uncertainty_and_dice": self.rank_correlation(),
            "reliability": self.bins(),
            "uncertainty_deciles": self.deciles(),
        }

    def text(self) -> str:
        """Two lines for the screen."""
        rates = " ".join(f"{100 * decile['error_rate']:.1f}" for decile in self.deciles())
        correlation = self.rank_correlation()
        ranks = "" if np.isnan(correlation) else f"; with Dice by image: {correlation:.2f} (rank)"
        return (
            f"expected calibration error {self.expected_error():.4f}\n"
            f"% of wrong pixels by decile of uncertainty: {rates}{ranks}"
        )


def binary_prediction(prediction: Prediction) -> Prediction:
    """The prediction with all foreground classes joined into one."""
    background = prediction.probabilities[0]
    joined = np.stack([background, 1 - background])
    return Prediction(joined, entropy_map(joined))


def plot_reliability(calibration: Calibration, png_path: str) -> None:
    """Accuracy against confidence; below, the share of the pixels at each confidence."""
    bins = calibration.bins()
    figure = new_figure(5, 6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot((0, 1), (0, 1), color="grey", linestyle=":", label="perfect calibration")
    confidence = [b["confidence"] for b in bins]
    above.plot(confidence, [b["accuracy"] for b in bins], marker="o", color="tab:blue")
    above.set(
        xlim=(0, 1),
        ylim=(0, 1),
        ylabel="accuracy",
        title=f"expected calibration error {calibration.expected_error():.4f}",
    )
    above.legend(loc="upper left", frameon=False)
    below.bar(confidence, [100 * b["share"] for b in bins], width=0.05, color="tab:blue")
    below.set(xlabel="confidence: probability of the predicted class", ylabel="% of pixels")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    save_figure(figure, png_path)


def plot_deciles(calibration: Calibration, png_path: str) -> None:
    """Error rate of the pixels in each decile of uncertainty."""
    deciles = calibration.deciles()
    figure = new_figure(6, 4)
    axes = figure.subplots()
    rates = [100 * decile["error_rate"] for decile in deciles]
    bars = axes.bar(range(1, len(rates) + 1), rates, color="tab:orange")
    axes.bar_label(bars, [f"{rate:.1f}" for rate in rates], fontsize="small", padding=2)
    labels = [f"{n}\n{d['uncertainty']:.2f}" for n, d in enumerate(deciles, 1)]
    axes.set_xticks(range(1, len(rates) + 1), labels)
    axes.set(
        xlabel="decile of uncertainty, and its mean",
        ylabel="% of wrong pixels",
        title="Errors by uncertainty",
    )
    axes.margins(y=0.1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    save_figure(figure, png_path)
