"""Plots of a model's calibration."""

from matplotlib.figure import Figure

from guided_diffusion.segmentation.evaluation.calibration import Calibration
from guided_diffusion.segmentation.visuals.render import save_figure


def plot_reliability(calibration: Calibration, png_path: str) -> None:
    """Accuracy against confidence; below, the share of the pixels at each confidence."""
    bins = calibration.bins()
    figure = Figure(figsize=(5, 6), layout="constrained")
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
    figure = Figure(figsize=(6, 4), layout="constrained")
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
