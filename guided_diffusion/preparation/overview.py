"""An analysis as plain values, as a table and as one page of plots."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from guided_diffusion.preparation.advice import recommend
from guided_diffusion.preparation.analysis import BINS, Analysis, class_counts
from guided_diffusion.runtime.files import write_atomically
from guided_diffusion.segmentation.categories import Category


def summarize(analysis: Analysis, categories: Sequence[Category]) -> dict[str, Any]:
    """Plain values for analysis.json."""
    facts = analysis.facts
    summary: dict[str, Any] = {
        "images": len(facts),
        "unreadable": analysis.unreadable,
        "splits": dict(Counter(f.split or "(one set)" for f in facts)),
        "sizes": {
            f"{h}x{w}": n for (h, w), n in Counter((f.height, f.width) for f in facts).most_common()
        },
        "bits": {str(bits): n for bits, n in sorted(Counter(f.bits for f in facts).items())},
        "grey_images": sum(f.grey for f in facts),
        "grey_levels": {
            key: _five([getattr(f, key) for f in facts])
            for key in ("mean", "spread", "low", "median", "high")
        },
    }
    if analysis.num_classes():
        pixels, images = class_counts(analysis, len(categories))
        summary["classes"] = {
            c.name: {
                "index": c.index,
                "share": float(pixels[c.index] / pixels.sum()),
                "images": int(images[c.index]),
                "thickness_share_of_side": float(np.median(analysis.thickness[c.index]))
                if c.index in analysis.thickness
                else None,
            }
            for c in categories
        }
    summary["recommended"] = [
        {"flag": flag, "value": value, "why": why}
        for flag, value, why in recommend(analysis, categories)
    ]
    return summary


def table(analysis: Analysis, summary: dict[str, Any]) -> str:
    """For the screen."""
    lines = [f"{summary['images']} images, {len(summary['unreadable'])} unreadable"]
    lines += [f"  {error}" for error in summary["unreadable"][:5]]
    lines.append("splits: " + ", ".join(f"{k} {n}" for k, n in summary["splits"].items()))
    sizes = list(summary["sizes"].items())
    more = f", and {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
    lines.append("sizes (height x width): " + ", ".join(f"{k}: {n}" for k, n in sizes[:5]) + more)
    lines.append("bits: " + ", ".join(f"{k}: {n} images" for k, n in summary["bits"].items()))
    lines.append(f"grey: {summary['grey_images']} of {summary['images']}")
    lines.append("grey levels, share of the range   min   25 %    50 %    75 %   max")
    for key, values in summary["grey_levels"].items():
        lines.append(f"  {key:<28}" + "".join(f"{v:8.3f}" for v in values))
    if "classes" in summary:
        lines.append(f"{'class':<24}{'pixels':>10}{'images':>8}")
        for name, c in summary["classes"].items():
            lines.append(f"  {name:<22}{100 * c['share']:>8.2f} %{c['images']:>8}")
    lines.append("recommended:")
    for advice in summary["recommended"]:
        lines.append(f"  {advice['flag']} {advice['value']}: {advice['why']}")
    return "\n".join(lines)


def plot(analysis: Analysis, categories: Sequence[Category], path: str) -> None:
    """One page: sizes, grey levels, shares of the classes, images that hold them."""
    facts = analysis.facts
    figure = Figure(figsize=(11, 8), layout="constrained")
    sizes, levels, shares, images = figure.subplots(2, 2).flat
    sizes.scatter([f.width for f in facts], [f.height for f in facts], s=12, alpha=0.5)
    sizes.set(title="Sizes", xlabel="width, pixels", ylabel="height, pixels")
    sizes.set_xlim(0, 1.05 * max(f.width for f in facts))
    sizes.set_ylim(0, 1.05 * max(f.height for f in facts))
    histograms = np.stack([f.histogram for f in facts])
    centers = (np.arange(BINS) + 0.5) / BINS
    low, middle, high = np.percentile(histograms, [10, 50, 90], axis=0)
    levels.fill_between(centers, 100 * low, 100 * high, alpha=0.3, label="80 % of the images")
    levels.plot(centers, 100 * middle, label="median")
    levels.set(title="Grey levels", xlabel="share of the range", ylabel="% of the pixels")
    levels.legend()
    if analysis.num_classes():
        pixels, counts = class_counts(analysis, len(categories))
        names = [c.name for c in categories]
        colors = [tuple(v / 255 * 0.85 for v in c.color) for c in categories]
        percent = 100 * pixels / pixels.sum()
        bars = shares.barh(names, percent, color=colors)
        shares.bar_label(bars, [f"{value:.3g}" for value in percent], padding=3)
        shares.set(title="Pixels of each class", xlabel="%")
        images.bar_label(images.barh(names, counts, color=colors), padding=3)
        images.set(title="Images that hold it", xlabel=f"of {len(facts)}")
        for axes in (shares, images):
            axes.invert_yaxis()
            axes.margins(x=0.12)
    else:
        shares.set_axis_off()
        images.set_axis_off()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def _five(values: Sequence[float]) -> list[float]:
    """Minimum, quartiles, maximum."""
    if not values:
        return []
    return [float(v) for v in np.percentile(values, [0, 25, 50, 75, 100])]
