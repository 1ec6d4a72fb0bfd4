"""Everything that a training run would refuse or regret."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from guided_diffusion.images.image_io import ImageError, read_image
from guided_diffusion.preparation.duplicates import Fingerprint, find_duplicates, fingerprint
from guided_diffusion.preparation.faults import Fault
from guided_diffusion.preparation.layouts import Item, Unpaired
from guided_diffusion.preparation.mask_repair import examine_mask
from guided_diffusion.segmentation.categories import Category

USUAL_SIZE = 0.8  # share of the images that must agree before another size is unusual


@dataclass
class Report:
    """Faults, and what becomes of the items that have some in a repaired copy.

    dropped    images whose pair is to be left out
    rewritten  images whose mask is to be written anew, see `repaired_mask`
    """

    faults: list[Fault] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    rewritten: set[str] = field(default_factory=set)

    def add(self, kind: str, item: Item, path: str, text: str) -> None:
        self.faults.append(Fault(kind, item.name, path, text))


def validate(
    items: Sequence[Item],
    unpaired: Sequence[Unpaired],
    num_classes: int | None,
    categories: Sequence[Category],
) -> Report:
    """Examine every file.

    :param num_classes: masks hold 0 to `num_classes` - 1; None: only 255 is known to be no class.
    :param categories: whose colours colour masks have.
    """
    report = Report([Fault(u.kind, u.path, u.path, u.text) for u in unpaired])
    prints: dict[str, Fingerprint] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for item in tqdm(items, desc="checking", unit="image", disable=None, leave=False):
        image = _read(item, report)
        if image is not None:
            sizes[item.image] = image.shape[:2]
            prints[item.image] = fingerprint(image)
        if item.mask:
            size = None if image is None else image.shape[:2]
            mask, found = repaired_mask(item, size, num_classes, categories)
            report.faults += found
            if mask is None:
                report.dropped.add(item.image)
            elif any(fault.repairable for fault in found):
                report.rewritten.add(item.image)
    _compare_sizes(items, sizes, report)
    _compare_images([item for item in items if item.image in prints], prints, report)
    return report


def _read(item: Item, report: Report) -> np.ndarray | None:
    try:
        image = read_image(item.image)
    except ImageError as error:
        text = str(error).removeprefix(item.image).strip()
        report.add("unreadable image", item, item.image, text)
        report.dropped.add(item.image)
        return None
    if image.min() == image.max():
        report.add("blank image", item, item.image, f"every pixel is {image.flat[0]:g}")
        report.dropped.add(item.image)
    return image


def repaired_mask(
    item: Item,
    size: tuple[int, int] | None,
    num_classes: int | None,
    categories: Sequence[Category],
) -> tuple[np.ndarray | None, list[Fault]]:
    """The item's mask as it should be, None where nobody can tell, and what was wrong with it.

    :param size: (height, width) of the image; None where that cannot be read.
    """
    mask, found = examine_mask(item.mask, num_classes, categories)
    faults = [Fault(fault.kind, item.name, item.mask, fault.text) for fault in found]
    if mask is not None and size is not None and mask.shape != size:
        shapes = ["x".join(map(str, shape)) for shape in (mask.shape, size)]
        text = f"is {shapes[0]} pixels (height x width), its image {shapes[1]}"
        faults.append(Fault("sizes differ", item.name, item.mask, text))
        mask = _resized(mask, size)
    return mask, faults


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """The mask at another size by nearest neighbour, if that does not stretch it."""
    across = [wanted / now for wanted, now in zip(size, mask.shape)]
    # a side rounded to whole pixels may be off by one
    if abs(across[0] / across[1] - 1) > 0.01 + 1 / min(*size, *mask.shape):
        return None
    rows, columns = (
        ((np.arange(wanted) + 0.5) * now / wanted).astype(int)
        for wanted, now in zip(size, mask.shape)
    )
    return mask[np.ix_(rows, columns)]


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
            report.add("unusual size", item, item.image, text + f"{usual[0]}x{usual[1]}")


def _compare_images(items: Sequence[Item], prints: dict[str, Fingerprint], report: Report) -> None:
    # the later of two is dropped: rather one that is useless anyway, rather one of TRAIN
    items = sorted(items, key=lambda item: (item.image in report.dropped, item.split == "TRAIN"))
    for later, first, same in find_duplicates([prints[item.image] for item in items]):
        item, other = items[later], items[first]
        kind = f"{'exact' if same else 'near'} duplicate"
        if item.split != other.split:
            kind += " across splits"
        text = f"{'has the same pixels as' if same else 'shows the same picture as'} {other.image}"
        report.add(kind, item, item.image, text)
        if report.faults[-1].repairable:
            report.dropped.add(item.image)
