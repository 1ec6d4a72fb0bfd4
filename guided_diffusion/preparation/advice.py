"""Which settings follow from what a data set is like."""

from collections.abc import Sequence

import numpy as np

from guided_diffusion.preparation.analysis import Analysis, class_counts
from guided_diffusion.segmentation.categories import Category

SIZES = (64, 96, 128, 192, 256, 384, 512)
THIN = 3.0  # pixels that a structure needs across to be drawn
NARROW = 0.5  # share of the type's range below which grey levels are worth stretching
RARE = 30.0  # times fewer pixels than the most frequent class from which weights are worth a try


def recommend(analysis: Analysis, categories: Sequence[Category]) -> list[tuple[str, str, str]]:
    """(flag, value, why)."""
    facts = analysis.facts
    if not facts:
        return []
    advice = [_image_size(analysis, categories), _resize(analysis, categories)]
    grey = sum(f.grey for f in facts)
    if grey == len(facts):
        advice.append(("--in_channels", "1", "every image is grey"))
    else:
        advice.append(("--in_channels", "3", f"{len(facts) - grey} images are coloured"))
    used = np.median([f.high - f.low for f in facts])
    if used < NARROW:
        why = f"half of the images use {100 * used:.0f} % or less of their type's range"
        advice.append(("--intensity", "percentile", why))
    else:
        why = f"images use {100 * used:.0f} % of their type's range (median)"
        advice.append(("--intensity", "full", why))
    if analysis.num_classes():
        advice.append(_class_weighting(analysis, categories))
    return advice


def _image_size(analysis: Analysis, categories: Sequence[Category]) -> tuple[str, str, str]:
    longest = int(np.median([max(f.height, f.width) for f in analysis.facts]))
    thin = {i: float(np.median(v)) for i, v in analysis.thickness.items() if i > 0}
    if thin:
        index = min(thin, key=thin.get)
        needed = THIN / thin[index]
        why = (
            f"{categories[index].name} is the thinnest class, {100 * thin[index]:.1f} % of the "
            f"longer side across; at this size that is {{across:.1f}} pixels, and {THIN:g} are "
            "needed to draw it"
        )
    else:
        thin, needed, index = {0: 0.0}, min(longest, 256), 0
        why = "without masks only the size of the files tells"
    useful = [size for size in SIZES if size <= max(longest, SIZES[0])]
    size = next((size for size in useful if size >= needed), useful[-1])
    if size < needed:
        why += f"; the images themselves have {longest} pixels and more than {size} was not tried"
    return "--image_size", str(size), why.format(across=thin[index] * size)


def _resize(analysis: Analysis, categories: Sequence[Category]) -> tuple[str, str, str]:
    squares = [f for f in analysis.facts if max(f.height, f.width) <= 1.05 * min(f.height, f.width)]
    if len(squares) == len(analysis.facts):
        return "--resize", "crop", "every image is square, or within 5 % of it"
    why = f"{len(analysis.facts) - len(squares)} of {len(analysis.facts)} images are not square"
    lost = np.zeros(max(analysis.num_classes(), 1))
    for index in range(1, len(lost)):
        lost[index] = np.mean([row[index] for row in analysis.lost_by_crop if index < len(row)])
    if lost.any():
        worst = int(lost.argmax())
        why += f"; a central crop would lose {100 * lost[worst]:.0f} % of {categories[worst].name}"
    return "--resize", "pad", why


def _class_weighting(analysis: Analysis, categories: Sequence[Category]) -> tuple[str, str, str]:
    pixels, _ = class_counts(analysis, len(categories))
    present = np.flatnonzero(pixels)
    rare, common = present[pixels[present].argmin()], present[pixels[present].argmax()]
    ratio = pixels[common] / pixels[rare]
    why = f"{categories[common].name} has {ratio:.0f} times the pixels of {categories[rare].name}"
    return "--class_weighting", "sqrt" if ratio > RARE else "none", why
