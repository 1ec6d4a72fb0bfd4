"""What was converted, and what was left out and why."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guided_diffusion.preparation.importing.items import ImageItem
from guided_diffusion.segmentation.annotations.reading.source import LeftOut
from guided_diffusion.segmentation.categories import ClassTable

_SHOWN = 5


@dataclass
class Report:
    """Of an import.

    images  name, file, annotators, number of annotations, and pixels by class
    """

    format: str
    source: str
    table: ClassTable
    images: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, item: ImageItem, mask: np.ndarray) -> None:
        """Count an image and its mask [H x W]."""
        counts = np.bincount(mask.ravel(), minlength=256)
        pixels = {c.name: int(counts[c.index]) for c in self.table.entries if counts[c.index]}
        self.images.append(
            {
                "name": item.name,
                "image": item.origin,
                "annotators": [d.annotator for d in item.drawings if d.annotator],
                "annotations": sum(len(d.regions) for d in item.drawings),
                "pixels": pixels,
            }
        )

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "format": self.format,
            "source": self.source,
            "images": self.images,
            "left_out": [{"what": one.what, "why": one.why} for one in self.left_out],
        }


def say(report: Report, output: str) -> None:
    """Print a summary."""
    seen = Counter(name for image in report.images for name in image["pixels"])
    annotations = sum(image["annotations"] for image in report.images)
    print(
        f"{len(report.images)} images with {annotations} annotations ({report.format}) written to"
        f" {output}"
    )
    for category in report.table.entries:
        print(f"  {category.index:3} {category.name}: in {seen[category.name]} images")
    reasons = Counter(one.why for one in report.left_out)
    for why, count in reasons.most_common(_SHOWN):
        first = next(one.what for one in report.left_out if one.why == why)
        print(f"left out: {count} x {why}, such as {first}")
    if len(reasons) > _SHOWN:
        print(f"left out for {len(reasons) - _SHOWN} more reasons, see import.json")
