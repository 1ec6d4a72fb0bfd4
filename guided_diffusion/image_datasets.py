"""Batches of images for training, each a pure function of (seed, rank, step)."""

import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import torch as th
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from . import dist_util
from .images.cache import ImageCache, make_cache
from .images.files import evenly_spaced, list_radiographs, pair_files
from .images.geometry import Geometry
from .images.image_io import ImageError, is_grey, read_image
from .images.masks import check_sizes, read_mask
from .images.names import composed
from .images.reading import ReadingConfig, normalize, to_uint8_channels
from .images.swaps import Swaps, exchange
from .runtime.errors import UserError
from .runtime.rng import derive_seed
from .runtime.signals import leave_to_parent

Batch = tuple[th.Tensor, dict[str, th.Tensor]]
# a generator of its own, or the module, which is Python's global one
_Random = random.Random | ModuleType

# the shares of the short side that random crops show
_MIN_CROP, _MAX_CROP = 0.8, 1.0


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int | tuple[int, int],
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    start_step: int = 0,
    num_workers: int = 0,
    reading: ReadingConfig | None = None,
    cache: str = "none",
    rank: int | None = None,
    num_ranks: int | None = None,
    skip_bad_images: bool = False,
    on_skip: Callable[[str], None] | None = None,
    mask_dir: str = "",
    mask_classes: int | None = None,
    mask_ignore: tuple[int, ...] = (),
    flip_swaps: Swaps = (),
) -> Iterator[Batch]:
    """Yield batches endlessly: float32 [N x C x H x W] in [-1, 1], and a dict.

    The dict holds "y", int64 [N], if `class_cond`, and "mask", uint8 [N x H x W], if `mask_dir`.

    :param data_dir: folder (searched recursively), file or glob; a local or a cloud path.
    :param batch_size: images per batch, on each rank.
    :param image_size: as in ReadingConfig; everything else is taken from `reading`, if given.
    :param class_cond: label images by their file names up to the first underscore, in sorted order.
    :param deterministic: read the files in sorted instead of shuffled order.
    :param random_crop: crop 80 to 100 % of the short side at a random position; needs resize
        "crop".
    :param random_flip: mirror half of the images; in most radiographs left and right differ.
    :param classes: class names in the order of their labels, instead of those of the files.
    :param seed: for order, flips and crops.
    :param start_step: index of the first batch, so that a resumed run continues where it stopped.
    :param num_workers: processes that read images, 0 to read in this one; batches do not depend on
        it.
    :param reading: how files are read; by default as ReadingConfig says.
    :param cache: "ram" keeps decoded 8-bit images in memory, shared between the workers; "auto"
        does so if they take at most a quarter of the free memory; "none" does not.
    :param rank: this process's rank; None: from torch.distributed.
    :param num_ranks: the number of ranks; None: from torch.distributed.
    :param skip_bad_images: replace an image that cannot be read by the next one.
    :param on_skip: called with a line of text for each image skipped; None: print it to stderr.
    :param mask_dir: masks of class indices with the names of their images; crops and flips apply to
        both, padding is IGNORE.
    :param mask_classes: masks hold 0 to `mask_classes` - 1; None allows any.
    :param mask_ignore: values of mask pixels without a label, which become IGNORE.
    :param flip_swaps: pairs of classes that are exchanged in mirrored masks.
    :raises UserError: at once, if the folder or the arguments are unsuitable.
    :raises ImageError: when an unreadable file is reached, unless bad images are skipped.
    """
    if rank is None or num_ranks is None:
        running = dist.is_available() and dist.is_initialized()
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
    reading = replace(reading or ReadingConfig(), image_size=image_size)
    if reading.resize == "native":
        raise UserError("resize native leaves images of several sizes; choose crop, pad or squash")
    masks = None
    if mask_dir:
        pairs = pair_files(data_dir, mask_dir)
        paths, masks = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
    else:
        paths, _ = list_radiographs(data_dir)
    if len(paths) < batch_size * num_ranks:
        raise UserError(
            f"{data_dir} holds {len(paths)} images, fewer than the {batch_size * num_ranks} of one "
            f"step ({batch_size} on each of {num_ranks} ranks); lower --batch_size or add images"
        )
    if random_crop and cache == "ram":
        raise UserError("--cache ram holds images at one size; with --random_crop use --cache none")
    images = ImageDataset(
        reading.image_size,
        paths,
        classes=class_labels(paths, classes) if class_cond else None,
        random_crop=random_crop,
        random_flip=random_flip,
        reading=reading,
        cache=make_cache(
            "none" if random_crop and cache == "auto" else cache,
            len(paths),
            (*reading.geometry().height_width, reading.in_channels + bool(masks)),
            copies=dist_util.local_size() if dist_util.world_size() == num_ranks else num_ranks,
            shared=num_workers > 0,
        ),
        mask_paths=masks,
        mask_classes=mask_classes,
        mask_ignore=mask_ignore,
        flip_swaps=flip_swaps,
    )
    steps = _Steps(images, batch_size, rank, num_ranks, seed, deterministic, skip_bad_images)
    return _batches(steps, start_step, num_workers, on_skip or _print_skipped)


class ImageDataset(Dataset):
    """The images of one shard: (float32 array [C x H x W] in [-1, 1], dict), see `load_data`.

    :param resolution: as ReadingConfig.image_size; everything else is taken from `reading`, if
        given.
    :param image_paths: the files; this shard has every `num_shards`-th of them, from `shard` on.
    :param classes: their labels, if they have any.
    :param cache: room for every decoded image, or None.
    :param mask_paths: masks of the images, if they have any.
    """

    def __init__(
        self,
        resolution: int | tuple[int, int],
        image_paths: list[str],
        classes: list[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
        reading: ReadingConfig | None = None,
        cache: ImageCache | None = None,
        mask_paths: list[str] | None = None,
        mask_classes: int | None = None,
        mask_ignore: tuple[int, ...] = (),
        flip_swaps: Swaps = (),
    ):
        super().__init__()
        self.reading = replace(reading or ReadingConfig(), image_size=resolution)
        self.paths = image_paths[shard::num_shards]
        self.classes = None if classes is None else classes[shard::num_shards]
        self.mask_paths = None if mask_paths is None else mask_paths[shard::num_shards]
        self.mask_classes, self.mask_ignore = mask_classes, mask_ignore
        self.flip_swaps = flip_swaps
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.cache = cache
        if random_crop and (
            self.reading.resize != "crop" or not isinstance(self.reading.image_size, int)
        ):
            raise UserError("--random_crop needs --resize crop and a square image size")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        images, cond = self.collate([self.read(index, random)], [index])
        return images[0].numpy(), {name: value[0].numpy()[()] for name, value in cond.items()}

    def collate(self, arrays: Sequence[np.ndarray], indices: Sequence[int]) -> Batch:
        """A batch of what `read` returned for these indices."""
        stack, cond = np.stack(arrays), {}
        if self.classes is not None:
            cond["y"] = th.tensor([self.classes[index] for index in indices])
        if self.mask_paths is not None:
            cond["mask"] = th.from_numpy(np.ascontiguousarray(stack[..., -1]))
            stack = stack[..., :-1]
        return normalize(stack), cond

    def read(self, index: int, rng: _Random) -> np.ndarray:
        """Read an image, and crop and flip it at random if so configured.

        :return: uint8 [H x W x C], with the mask, if any, as one more channel.
        """
        if self.random_crop:
            image, mask = self._files(index)
            size = self.reading.geometry().height_width[0]
            image = self._stack(*_random_crop(image, mask, size, _MIN_CROP, _MAX_CROP, rng))
        elif self.cache is not None:
            image = self.cache.get(index, self._load)
        else:
            image = self._load(index)
        if self.random_flip and rng.random() < 0.5:
            image = image[:, ::-1]
            if self.flip_swaps:
                image = np.concatenate(
                    [image[..., :-1], exchange(image[..., -1:], self.flip_swaps)], axis=2
                )
        return image

    def _load(self, index: int) -> np.ndarray:
        image, mask = self._files(index)
        geometry = self.reading.geometry()
        resized_mask = None if mask is None else geometry.apply_mask(mask)
        return self._stack(geometry.apply_image(image), resized_mask)

    def _files(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """An image and its mask, if there are masks, at their original size."""
        path, reading = self.paths[index], self.reading
        image = read_image(path, reading.in_channels, reading.intensity_rule())
        if self.mask_paths is None:
            return image, None
        mask = read_mask(self.mask_paths[index], self.mask_classes, self.mask_ignore)
        check_sizes(self.mask_paths[index], mask, path, image)
        return image, mask

    def _stack(self, image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        image = to_uint8_channels(image, self.reading.in_channels)
        return image if mask is None else np.concatenate([image, mask[..., None]], axis=2)


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """Scale the short side to `image_size` and keep the centre: uint8 [size x size (x 3)]."""
    return Geometry("crop", image_size).apply_image(np.asarray(pil_image))


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    rng: random.Random | None = None,
) -> np.ndarray:
    """A square of `min_crop_frac` to `max_crop_frac` of the short side: uint8 [size x size (x 3)].

    Uses Python's global generator unless `rng` is given.
    """
    image = np.asarray(pil_image)
    return _random_crop(image, None, image_size, min_crop_frac, max_crop_frac, rng or random)[0]


def class_names(paths: Sequence[str]) -> list[str]:
    """The classes in file names (up to the first underscore), sorted in the order of labels."""
    return sorted({_class_name(path) for path in paths})


def class_labels(paths: Sequence[str], names: Sequence[str] | None = None) -> list[int]:
    """The class label of every file.

    :param names: all classes in the order of their labels; by default those of the files.
    :raises UserError: if a file is of another class.
    """
    known = names or class_names(paths)
    labels = {composed(name): label for label, name in enumerate(known)}
    for path in paths:
        if _class_name(path) not in labels:
            raise UserError(
                f"{path} has class {_class_name(path)!r} (its name up to the first underscore),"
                f" which is not one of the network's: {', '.join(list(labels)[:10])}"
            )
    return [labels[_class_name(path)] for path in paths]


def sample_is_grey(paths: list[str], how_many: int = 64) -> bool:
    """Whether all images of a sample, spread evenly over `paths`, are grey.

    Unreadable files are ignored; without a readable one the answer is False.
    """
    answers = []
    for path in evenly_spaced(paths, how_many):
        try:
            answers.append(is_grey(path))
        except ImageError:
            continue
    return bool(answers) and all(answers)


@dataclass(eq=False)
class _Steps(Dataset):
    """Item s is the batch of step s: images, their dict, and messages about skipped files."""

    images: ImageDataset
    batch_size: int
    rank: int
    num_ranks: int
    seed: int
    deterministic: bool
    skip_bad_images: bool
    _orders: dict[int, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, step: int) -> tuple[th.Tensor, dict, list[str]] | ImageError:
        first = (step * self.num_ranks + self.rank) * self.batch_size
        arrays: list[np.ndarray] = []
        indices: list[int] = []
        skipped: list[str] = []
        for number in range(first, first + self.batch_size):
            try:
                index, array = self._sample(number, skipped)
            except ImageError as error:
                return error  # if it were raised here, a worker would wrap it in a traceback
            arrays.append(array)
            indices.append(index)
        return *self.images.collate(arrays, indices), skipped

    def _sample(self, number: int, skipped: list[str]) -> tuple[int, np.ndarray]:
        """The index of the image that is sample `number` of the whole run, and its pixels."""
        for attempt in range(len(self.images)):
            index = self._index(number + attempt)
            rng = random.Random(derive_seed(self.seed, "image", number))
            try:
                return index, self.images.read(index, rng)
            except ImageError as error:
                if not self.skip_bad_images:
                    raise
                skipped.append(str(error))
        raise ImageError("not one image could be read; the last error: " + skipped[-1])

    def _index(self, number: int) -> int:
        epoch, position = divmod(number, len(self.images))
        if self.deterministic:
            return position
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            generator = np.random.default_rng(derive_seed(self.seed, "order", epoch))
            self._orders[epoch] = generator.permutation(len(self.images))
        return int(self._orders[epoch][position])


def _batches(
    steps: _Steps, start_step: int, num_workers: int, on_skip: Callable[[str], None]
) -> Iterator[Batch]:
    loader = DataLoader(
        steps,
        batch_size=None,  # an item is a batch already
        sampler=itertools.count(start_step),
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=th.cuda.is_available(),
        persistent_workers=num_workers > 0,
        generator=th.Generator(),  # otherwise iterating would draw from the global generator
        worker_init_fn=leave_to_parent,
        # leave_to_parent needs a forked worker, and not every Python forks by default
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )
    reported: set[str] = set()
    for item in loader:
        if isinstance(item, ImageError):
            raise item
        images, cond, skipped = item
        for line in skipped:
            if line not in reported:
                reported.add(line)
                on_skip(line)
        yield images, cond


def _identity(item: object) -> object:
    return item


def _print_skipped(line: str) -> None:
    print(f"skipped: {line}", file=sys.stderr, flush=True)


def _random_crop(
    image: np.ndarray,
    mask: np.ndarray | None,
    size: int,
    smallest: float,
    largest: float,
    rng: _Random,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Cut a random square of `size` pixels after scaling, of which the side is between `smallest`
    and `largest` of the short side."""
    geometry = Geometry("crop", rng.randint(math.ceil(size / largest), math.ceil(size / smallest)))
    scaled = geometry.scaled_image(image)
    top = rng.randint(0, scaled.shape[0] - size)
    left = rng.randint(0, scaled.shape[1] - size)
    part = np.s_[top : top + size, left : left + size]
    return scaled[part], (None if mask is None else geometry.scaled_mask(mask)[part])


def _class_name(path: str) -> str:
    return composed(os.path.basename(path).split("_")[0])
