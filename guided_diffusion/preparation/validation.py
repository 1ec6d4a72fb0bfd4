"""Faults of a data set: everything that would stop a training run or spoil its result."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.images.duplicates import Fingerprint, find_duplicates, fingerprint
from guided_diffusion.images.files import Unpaired
from guided_diffusion.images.geometry import Geometry
from guided_diffusion.images.image_io import ImageError, read_counted
from guided_diffusion.images.masks import MaskRule
from guided_diffusion.preparation.layouts import Item
from guided_diffusion.preparation.mask_repair import SetValues, examine_mask
from guided_diffusion.runtime.progress import track
from guided_diffusion.segmentation.categories import ClassTable

USUAL_SIZE = 0.8  # share of the images that must agree before another size is unusual

# kind -> (whether it stops a training run, what --fix-issues does about it; "" for nothing)
KINDS: dict[str, tuple[bool, str]] = {
    "unreadable image": (True, "leaves it out, with its mask"),
    "unreadable mask": (True, "leaves the pair out"),
    "image without mask": (True, "puts it into unlabelled/"),
    "mask without image": (True, "leaves it out"),
    "several of one name": (True, "leaves them all out"),
    "sizes differ": (True, "resizes the mask where the shapes agree, else leaves the pair out"),
    "value out of range": (True, "leaves the pair out"),
    "black-and-white mask": (True, "makes white class 1"),
    "undeclared 255": (True, ""),
    "values with gaps": (True, ""),
    "colour mask": (True, "turns colours into classes, see tools/rgb2tif.py"),
    "blurred mask": (False, "gives stray pixels the class of their neighbours"),
    "thin or stray values": (False, ""),
    "lossy mask": (True, "rewrites black-and-white and colour masks, leaves others out"),
    "empty mask": (False, ""),
    "blank image": (False, "leaves the pair out"),
    "exact duplicate": (False, "keeps one"),
    "near duplicate": (False, ""),
    "exact duplicate across splits": (False, "keeps the one that is not in TRAIN"),
    "near duplicate across splits": (False, "keeps the one that is not in TRAIN"),
    "unusual size": (False, ""),
}


class MaskReading(NamedTuple):
    """What is known about the masks of a set, see `examine_mask`."""

    rule: MaskRule
    table: ClassTable
    whole: SetValues


@dataclass(frozen=True)
class Fault:
    """`name`: that of the item (see layouts.Item), or the path if there is none."""

    kind: str
    name: str
    path: str
    text: str

    @property
    def stops_training(self) -> bool:
        return KINDS[self.kind][0]

    @property
    def repairable(self) -> bool:
        return bool(KINDS[self.kind][1])

    def to_plain(self) -> dict[str, Any]:
        derived = {"stops_training": self.stops_training, "repairable": self.repairable}
        return asdict(self) | derived


@dataclass
class Report:
    """The faults found, and what a repaired copy does about them.

    dropped    images to leave out, with their masks
    rewritten  images whose mask is to be rewritten, see `repaired_mask`
    lost       classes that only masks hold which are left out
    """

    faults: list[Fault] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    rewritten: set[str] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)

    def add(self, kind: str, item: Item, text: str) -> None:
        self.faults.append(Fault(kind, item.name, item.image, text))


def validate(
    items: Sequence[Item],
    unpaired: Sequence[Unpaired],
    reading: MaskReading,
) -> Report:
    """Examine every file."""
    report = Report([Fault(u.kind, u.path, u.path, u.text) for u in unpaired])
    prints: dict[str, Fingerprint] = {}
    sizes: dict[str, tuple[int, int]] = {}
    kept: dict[str, set[int]] = {}
    for item in track(items, "checking"):
        image = _read(item, report)
        if image is not None:
            sizes[item.image] = image.shape[:2]
            prints[item.image] = fingerprint(image)
        if item.mask:
            size = None if image is None else image.shape[:2]
            mask, found = repaired_mask(item.name, item.mask, size, reading)
            report.faults += found
            if mask is not None:
                kept.setdefault(item.image, set()).update(np.unique(mask).tolist())
            if mask is None:
                report.dropped.add(item.image)
            elif any(fault.repairable for fault in found):
                report.rewritten.add(item.image)
    _compare_sizes(items, sizes, report)
    _compare_images([item for item in items if item.image in prints], prints, report)
    rule, _, whole = reading
    left = set().union(*(v for image, v in kept.items() if image not in report.dropped))
    classes = {v for v in whole.drawn if rule.classes is None or v < rule.classes} - {255}
    report.lost = classes - left if rule.classes or left else set()
    return report


def fault_table(faults: list[Fault], examples: int = 3) -> str:
    """Text: each kind found, how often, what --fix-issues does about it, and a few files."""
    lines = []
    for kind, (stops, remedy) in KINDS.items():
        found = [fault for fault in faults if fault.kind == kind]
        if not found:
            continue
        weight = "stops training" if stops else "worth checking"
        remedy = f"--fix-issues {remedy}" if remedy else "not fixed by --fix-issues"
        lines.append(f"{len(found):5d}  {kind} ({weight}; {remedy})")
        lines += [f"         {fault.path} {fault.text}" for fault in found[:examples]]
        if len(found) > examples:
            lines.append(f"         and {len(found) - examples} more")
    return "\n".join(lines)


def _read(item: Item, report: Report) -> np.ndarray | None:
    try:
        image, counted = read_counted(item.image)
    except ImageError as error:
        text = str(error).removeprefix(item.image).strip()
        report.add("unreadable image", item, text)
        report.dropped.add(item.image)
        return None
    if counted.min() == counted.max():
        report.add("blank image", item, f"is {counted.flat[0]:g} in every pixel")
        report.dropped.add(item.image)
    return image


def repaired_mask(
    name: str,
    path: str,
    size: tuple[int, int] | None,
    reading: MaskReading,
) -> tuple[np.ndarray | None, list[Fault]]:
    """An item's mask as it should be, None if that cannot be known, and its faults.

    :param name: of the item.
    :param path: of the mask.
    :param size: (height, width) of the image; None if that is unreadable.
    """
    mask, found = examine_mask(path, *reading)
    faults = [Fault(fault.kind, name, path, fault.text) for fault in found]
    if mask is not None and size is not None and mask.shape != size:
        shapes = ["x".join(map(str, shape)) for shape in (mask.shape, size)]
        text = f"is {shapes[0]} pixels (height x width), its image {shapes[1]}"
        faults.append(Fault("sizes differ", name, path, text))
        mask = _resized(mask, size)
    return mask, faults


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """Resize by nearest neighbour; None if the aspect ratios differ."""
    across = [wanted / now for wanted, now in zip(size, mask.shape)]
    # a side rounded to whole pixels may be off by one
    if abs(across[0] / across[1] - 1) > 0.01 + 1 / min(*size, *mask.shape):
        return None
    return Geometry("squash", size).apply_mask(mask)


def _compare_sizes(
    items: Sequence[Item], sizes: dict[str, tuple[int, int]], report: Report
) -> None:
    if not sizes:
        return
    usual, count = Counter(sizes.values()).most_common(1)[0]
    if count < max(2, USUAL_SIZE * len(sizes)):
        return
    for item in items:
        size = sizes.get(item.image, usual)
        if size != usual:
            text = f"is {size[0]}x{size[1]} pixels (height x width), {count} of {len(sizes)} are "
            report.add("unusual size", item, text + f"{usual[0]}x{usual[1]}")


def _compare_images(items: Sequence[Item], prints: dict[str, Fingerprint], report: Report) -> None:
    # the later of two is dropped: preferably one that is dropped anyway, then one of TRAIN
    items = sorted(items, key=lambda item: (item.image in report.dropped, item.split == "TRAIN"))
    for later, first, same in find_duplicates([prints[item.image] for item in items]):
        item, other = items[later], items[first]
        kind = f"{'exact' if same else 'near'} duplicate"
        if item.split != other.split:
            kind += " across splits"
        text = f"{'has the same pixels as' if same else 'shows the same picture as'} {other.image}"
        report.add(kind, item, text)
        if report.faults[-1].repairable:
            report.dropped.add(item.image)
