"""Radiographs paired with masks, checked and kept in memory: there are only a handful."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch as th

from guided_diffusion.images import masks as mask_files
from guided_diffusion.images.files import pair_files
from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.masks import MaskRule, check_sizes, ignored_values
from guided_diffusion.images.names import composed, stem
from guided_diffusion.images.reading import ReadingConfig, normalize
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.contents import digests
from guided_diffusion.runtime.text import visible
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.networks.padding import margins
from guided_diffusion.segmentation.training.augment import Augmentation


@dataclass(frozen=True)
class LabelledImages:
    """N radiographs and masks at the network's size, or, read as "native", each at its own size.

    images: uint8 `[H x W x C]`. masks: uint8 `[H x W]` of class indices, IGNORE in the padding.
    window: height and width of the crops to train on, for native sizes. digests: hashes of both
    files of each pair, with a space between; () if they are not known.
    """

    names: tuple[str, ...]
    images: Sequence[np.ndarray]
    masks: Sequence[np.ndarray]
    window: tuple[int, int] | None = None
    digests: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def choose(self, numbers: Sequence[int]) -> "LabelledImages":
        """The pairs with these numbers, in this order."""
        return LabelledImages(
            tuple(self.names[i] for i in numbers),
            [self.images[i] for i in numbers],
            [self.masks[i] for i in numbers],
            self.window,
            tuple(self.digests[i] for i in numbers) if self.digests else (),
        )

    def join(self, more: "LabelledImages") -> "LabelledImages":
        """These pairs, then those of `more`."""
        return LabelledImages(
            (*self.names, *more.names),
            [*self.images, *more.images],
            [*self.masks, *more.masks],
            self.window,
        )

    def class_pixels(self, num_classes: int) -> np.ndarray:
        """Pixels of each class over all masks, int64 `[num_classes]`."""
        counts = [np.bincount(mask.ravel(), minlength=256) for mask in self.masks]
        return np.sum(counts, axis=0)[:num_classes]

    def with_foreground(self) -> list[int]:
        """The numbers of the pairs whose masks show a class other than the background."""
        return [n for n, mask in enumerate(self.masks) if shows_foreground(mask)]

    def require_foreground(self, source: str) -> None:
        """:raises UserError: naming the source, if all masks show background alone."""
        _require_any(map(shows_foreground, self.masks), source, self.names)

    def batch(
        self,
        numbers: Sequence[int],
        augmentation: Augmentation | Sequence[Augmentation] | None = None,
        seeds: Sequence[int] = (),
    ) -> tuple[th.Tensor, th.Tensor]:
        """Images float32 `[B x C x H x W]` in [-1, 1] and masks int64 `[B x H x W]`.

        :param augmentation: of all images, or one per image.
        :param seeds: one per image, for augmentation and random crops.
        """
        images, masks = [], []
        for place, number in enumerate(numbers):
            image, mask = self.images[number], self.masks[number]
            if self.window:
                image, mask = _random_crop(image, mask, self.window, seeds[place] if seeds else 0)
            if augmentation is not None:
                each = augmentation if callable(augmentation) else augmentation[place]
                image, mask = each(image, mask, seeds[place])
            images.append(image)
            masks.append(mask)
        return normalize(np.stack(images)), th.from_numpy(np.stack(masks)).long()


@dataclass(frozen=True)
class TrainingData:
    """The images of a run.

    categories: the classes of all masks. val: to validate on, if any. synthetic: further pairs to
    train on. unlabelled: radiographs without masks, see `unlabelled.load_unlabelled`. shared: a
    warning of patients that train and val have in common. pseudo: radiographs with pseudo-labels.
    """

    categories: ClassTable
    train: LabelledImages
    val: LabelledImages | None = None
    synthetic: LabelledImages | None = None
    unlabelled: LabelledImages | None = None
    shared: str = ""
    pseudo: LabelledImages | None = None

    @property
    def more(self) -> LabelledImages | None:
        """Pairs to mix with those of `train`."""
        return self.synthetic if self.pseudo is None else self.pseudo


def load_labelled(
    image_dir: str,
    mask_dir: str,
    reading: ReadingConfig,
    rule: MaskRule,
    only: Sequence[str] = (),
) -> LabelledImages:
    """Read and check all pairs of a folder.

    :param rule: what the values of the masks mean.
    :param only: names of the pairs to read; () for all.
    :raises UserError: for files that do not pair, cannot be read, differ in size or hold values
        that do not fit the rule; or if all masks show background alone.
    """
    names, images, masks, hashes = [], [], [], []
    for name, image_path, mask_path in choose_pairs(pair_files(image_dir, mask_dir), only):
        image = read_image(image_path, reading.in_channels, reading.intensity_rule())
        mask = rule.read(mask_path)
        check_sizes(mask_path, mask, image_path, image)
        names.append(name)
        images.append(reading.prepare(image))
        masks.append(reading.geometry().apply_mask(mask))
        hashes.append(" ".join(digests((image_path, mask_path))))
    window = reading.geometry().height_width if reading.resize == "native" else None
    data = LabelledImages(tuple(names), images, masks, window, tuple(hashes))
    data.require_foreground(mask_dir)
    return data


def check_masks(image_dir: str, mask_dir: str, rule: MaskRule, only: Sequence[str] = ()) -> None:
    """Read the masks that `load_labelled` will read; raises as it does."""
    pairs = choose_pairs(pair_files(image_dir, mask_dir), only)
    shown = [shows_foreground(rule.read(path)) for _, _, path in pairs]
    _require_any(shown, mask_dir, [name for name, *_ in pairs])


def shows_foreground(mask: np.ndarray) -> bool:
    """Whether a mask shows a class other than the background."""
    return bool(((mask > 0) & (mask != IGNORE)).any())


def _require_any(shown: Iterable[bool], source: str, names: Sequence[str]) -> None:
    if not any(shown):
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(
            f"{source}: the masks ({some}) show no class but the background, so they can"
            " neither train a network nor select the best: check their values, add images"
            " with foreground, or validate on none"
        )


def choose_pairs(
    pairs: Sequence[tuple[str, str, str]], names: Sequence[str]
) -> list[tuple[str, str, str]]:
    """The pairs with these names, in the order of the names; all pairs if there are none."""
    if not names:
        return list(pairs)
    known = {pair[0]: pair for pair in pairs}
    names = [name if name in known else stem(name) for name in map(composed, names)]
    shown = {visible(name): name for name in known}
    names = [shown.get(name, name) for name in names]
    missing = [name for name in names if name not in known]
    if missing:
        some = ", ".join(list(known)[:5])
        raise UserError(
            f"--train_names: no radiograph with a mask is named {', '.join(missing)};"
            f" there are {len(known)}, such as {some}"
        )
    return [known[name] for name in dict.fromkeys(names)]


def _random_crop(
    image: np.ndarray, mask: np.ndarray, window: tuple[int, int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of the window's size at a random position; outside the image, black and IGNORE."""
    missing = margins(mask.shape, window)
    image = np.pad(image, [*missing, (0, 0)])
    mask = np.pad(mask, missing, constant_values=IGNORE)
    generator = np.random.default_rng(seed)
    top, left = (int(generator.integers(have - side + 1)) for side, have in zip(window, mask.shape))
    part = np.s_[top : top + window[0], left : left + window[1]]
    return image[part], mask[part]


def count_classes(mask_dirs: Sequence[tuple[str, str]], ignore_index: int = -1) -> int:
    """The number of classes in all masks, at least 2; see `images.masks.count_classes`."""
    rule = MaskRule(None, ignored_values(ignore_index))
    seen: set[int] = set()
    for image_dir, mask_dir in mask_dirs:
        for _, _, mask_path in pair_files(image_dir, mask_dir):
            seen.update(np.unique(rule.read(mask_path)).tolist())
    return mask_files.count_classes(seen, "--out_channels")


def training_batches(
    data: LabelledImages,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    step: int,
    more: LabelledImages | None = None,
    share: float = 0.0,
    augmentation_of_more: Augmentation | None = None,
) -> Iterator[tuple[th.Tensor, th.Tensor]]:
    """Endless batches from step number `step` on, each a function of (seed, step).

    An epoch sees every image once, in an order of its own; a batch larger than the set holds
    several augmentations of an image.

    :param more: further images, which make up the fraction `share` of all, evenly spread.
    :param augmentation_of_more: of these; None: the same.
    """
    other = augmentation_of_more or augmentation
    everything = data if more is None else data.join(more)
    while True:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        chosen = []
        for n in numbers:
            before = math.floor(n * share) if more is not None else 0
            if more is not None and math.floor((n + 1) * share) > before:
                chosen.append(len(data) + draw_order(before, len(more), seed, "order of more"))
            else:
                chosen.append(draw_order(n - before, len(data), seed, "order"))
        seeds = [rng.derive_seed(seed, "augment", n) for n in numbers]
        augmentations = [augmentation if n < len(data) else other for n in chosen]
        yield everything.batch(chosen, augmentations, seeds)
        step += 1


def draw_order(n: int, count: int, seed: int, purpose: str) -> int:
    """Index of the n-th image of a run: all `count` images once, then all in another order, ..."""
    epoch, place = divmod(n, count)
    order = np.random.default_rng(rng.derive_seed(seed, purpose, epoch)).permutation(count)
    return int(order[place])
