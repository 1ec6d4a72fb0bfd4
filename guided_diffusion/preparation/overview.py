"""An analysis as JSON, as text and as plots, with the settings it suggests."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.preparation.analysis import BINS, Analysis, class_counts
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.visuals.render import new_figure, save_figure

SIZES = (64, 96, 128, 192, 256, 384, 512)
THIN = 3.0  # pixels across that a structure needs to be drawn
NARROW = 0.5  # share of the type's range below which stretching the grey levels is worth it
RARE = 30.0  # pixels of the commonest class per pixel of the rarest that make weights worth it


def summarize(analysis: Analysis, categories: Sequence[Category]) -> dict[str, Any]:
    """The content of analysis.json."""
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
    summary["recommended"] = [one._asdict() for one in recommend(analysis, categories)]
    return summary


def table(analysis: Analysis, summary: dict[str, Any]) -> str:
    """A summary as text."""
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
    """Plot sizes, grey levels, the share of each class and the images that show it, as a PNG."""
    facts = analysis.facts
    figure = new_figure(11, 8)
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
        images.set(title="Images that show each class", xlabel=f"of {len(facts)}")
        for axes in (shares, images):
            axes.invert_yaxis()
            axes.margins(x=0.12)
    else:
        shares.set_axis_off()
        images.set_axis_off()
    save_figure(figure, path)


class Advice(NamedTuple):
    """A flag, the value it should have, and the reason."""

    flag: str
    value: str
    why: str


def recommend(analysis: Analysis, categories: Sequence[Category]) -> list[Advice]:
    """Training flags that suit the data set."""
    facts = analysis.facts
    if not facts:
        return []
    advice = [_image_size(analysis, categories), _resize(analysis, categories)]
    coloured = sum(not f.grey for f in facts)
    if coloured:
        advice.append(Advice("--in_channels", "3", f"{coloured} images are coloured"))
    else:
        advice.append(Advice("--in_channels", "1", "every image is grey"))
    used = np.median([f.high - f.low for f in facts])
    if used < NARROW:
        why = f"half of the images use {100 * used:.0f} % or less of their type's range"
        advice.append(Advice("--intensity", "percentile", why))
    else:
        why = f"images use {100 * used:.0f} % of their type's range (median)"
        advice.append(Advice("--intensity", "full", why))
    if analysis.binary:
        advice.append(Advice("--binary", "True", "the masks are drawn in black and white"))
    if analysis.num_classes():
        advice.append(_class_weighting(analysis, categories))
    return advice


def _image_size(analysis: Analysis, categories: Sequence[Category]) -> Advice:
    longest = int(np.median([max(f.height, f.width) for f in analysis.facts]))
    across = {i: float(np.median(v)) for i, v in analysis.thickness.items() if i > 0}
    thinnest = min(across, key=lambda index: across[index]) if across else None
    needed = min(longest, 256) if thinnest is None else THIN / across[thinnest]
    candidates = [size for size in SIZES if size <= max(longest, SIZES[0])]
    size = next((size for size in candidates if size >= needed), candidates[-1])
    if thinnest is None:
        why = "there are no masks, so only the size of the files counts"
    else:
        why = (
            f"{categories[thinnest].name} is the thinnest class, {100 * across[thinnest]:.1f} % of "
            f"the longer side across: {across[thinnest] * size:.1f} pixels at this size, and "
            f"{THIN:g} are needed to draw it"
        )
    if size < needed:
        why += f"; it is the largest size considered for images of {longest} pixels"
    return Advice("--image_size", str(size), why)


def _resize(analysis: Analysis, categories: Sequence[Category]) -> Advice:
    facts = analysis.facts
    oblong = sum(max(f.height, f.width) > 1.05 * min(f.height, f.width) for f in facts)
    if not oblong:
        return Advice("--resize", "crop", "every image is square, or within 5 % of it")
    why = f"{oblong} of {len(facts)} images are not square"
    lost = np.zeros(max(analysis.num_classes(), 1))
    for index in range(1, len(lost)):
        lost[index] = np.mean([row[index] for row in analysis.lost_by_crop if index < len(row)])
    if lost.any():
        worst = int(lost.argmax())
        why += f"; a central crop would lose {100 * lost[worst]:.0f} % of {categories[worst].name}"
    return Advice("--resize", "pad", why)


def _class_weighting(analysis: Analysis, categories: Sequence[Category]) -> Advice:
    pixels, _ = class_counts(analysis, len(categories))
    present = np.flatnonzero(pixels)
    rare, common = present[pixels[present].argmin()], present[pixels[present].argmax()]
    ratio = pixels[common] / pixels[rare]
    why = f"{categories[common].name} has {ratio:.0f} times the pixels of {categories[rare].name}"
    return Advice("--class_weighting", "sqrt" if ratio > RARE else "none", why)


def _five(values: Sequence[float]) -> list[float]:
    """Minimum, quartiles, maximum."""
    if not values:
        return []
    return [float(v) for v in np.percentile(values, [0, 25, 50, 75, 100])]
