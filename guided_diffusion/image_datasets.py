"""Unlabelled radiographs to batches, each a pure function of (seed, rank, step)."""

import contextlib
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch as th
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from .images.files import list_images, pair_files
from .images.geometry import Geometry
from .images.image_io import ImageError, check_sizes, is_grey, read_image, read_mask
from .images.reading import ReadingConfig, normalize, to_uint8_channels
from .runtime.errors import UserError
from .runtime.rng import derive_seed
from .runtime.signals import leave_to_parent

CACHES = ("auto", "ram", "none")

Batch = tuple[th.Tensor, dict[str, th.Tensor]]

# Crops of `random_crop` show at least this much of the picture's short side, at most that much.
_MIN_CROP, _MAX_CROP = 0.8, 1.0
_SHARED_MEMORY = "/dev/shm"
_CONTROL_GROUP = "/sys/fs/cgroup"


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
) -> Iterator[Batch]:
    """Batches for ever: float32 [N x C x H x W] in [-1, 1] and a dict.

    The dict holds with `class_cond` "y", int64 [N], and with `mask_dir` "mask", uint8 [N x H x W].

    data_dir         folder (searched recursively), file or glob; local or a cloud path
    batch_size       images of one rank's batch
    image_size       as in ReadingConfig; the rest of it comes from `reading` where given
    class_cond       labels are the file names up to the first underscore, in sorted order
    deterministic    go through the files in their sorted order instead of a shuffled one
    random_crop      crop 80 to 100 % of the short side at a random place (only with resize "crop")
    random_flip      mirror every second image; left is not right in most radiographs
    classes          the names in the order of their labels, instead of those that the files have
    seed             of the order, the flips and the crops
    start_step       number of the first batch: a resumed run goes on with what would have followed
    num_workers      reading processes, 0 reads in this one; the batches are the same
    cache            "ram" keeps decoded 8-bit images in memory, shared between the workers; "auto"
                     does so if they take at most a quarter of the free memory; "none" reads anew
    rank, num_ranks  this process's number and their count; None: as torch.distributed says
    skip_bad_images  put the next image in the place of one that cannot be read
    on_skip          told one line for each image that was skipped; None prints it to stderr
    mask_dir         masks of class indices, of the same names; they share their images' crops and
                     flips, padding is IGNORE
    mask_classes     masks hold 0 to `mask_classes` - 1; None to allow any

    Raises UserError at once for what is wrong with the folder, and ImageError, unless bad images
    are skipped, when the turn of an unreadable file comes.
    """
    if rank is None or num_ranks is None:
        running = dist.is_available() and dist.is_initialized()
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
    reading = _with_size(reading or ReadingConfig(), image_size)
    if reading.resize == "native":
        raise UserError("resize native has no one size for a batch; choose crop, pad or squash")
    masks = None
    if mask_dir:
        pairs = pair_files(data_dir, mask_dir)
        paths, masks = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
    else:
        paths = list_images(data_dir)
    if len(paths) < batch_size * num_ranks:
        raise UserError(
            f"{data_dir} holds {len(paths)} images, fewer than the {batch_size * num_ranks} of one "
            f"step ({batch_size} on each of {num_ranks} ranks); lower --batch_size or add images"
        )
    images = ImageDataset(
        reading.image_size,
        paths,
        classes=class_labels(paths, classes) if class_cond else None,
        random_crop=random_crop,
        random_flip=random_flip,
        reading=reading,
        cache=_cache_for(
            cache, len(paths), reading, random_crop, num_ranks, num_workers, bool(masks)
        ),
        mask_paths=masks,
        mask_classes=mask_classes,
    )
    steps = _Steps(images, batch_size, rank, num_ranks, seed, deterministic, skip_bad_images)
    return _batches(steps, start_step, num_workers, on_skip or _print_skipped)


class ImageDataset(Dataset):
    """The images of one shard: (float32 array [C x H x W] in [-1, 1], dict), see `load_data`.

    resolution  as ReadingConfig.image_size; `reading` may hold the same and says the rest
    cache       memory for every decoded image, or None
    mask_paths  of the images' masks, if they have any
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
        cache: "ImageCache | None" = None,
        mask_paths: list[str] | None = None,
        mask_classes: int | None = None,
    ):
        super().__init__()
        self.reading = _with_size(reading or ReadingConfig(), resolution)
        self.paths = image_paths[shard::num_shards]
        self.classes = None if classes is None else classes[shard::num_shards]
        self.mask_paths = None if mask_paths is None else mask_paths[shard::num_shards]
        self.mask_classes = mask_classes
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

    def read(self, index: int, rng: random.Random | None) -> np.ndarray:
        """uint8 [H x W x C], the mask as one channel more where there are masks.

        Cropped and mirrored, where that was asked for, as `rng` says.
        """
        if self.random_crop:
            image, mask = self._files(index)
            size = self.reading.image_size
            image, mask = _random_crop(image, mask, size, _MIN_CROP, _MAX_CROP, rng)
            image = self._joined(image, mask)
        elif self.cache is not None:
            image = self.cache.get(index, self._load)
        else:
            image = self._load(index)
        if self.random_flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return image

    def _load(self, index: int) -> np.ndarray:
        if self.mask_paths is None:
            return self.reading.load(self.paths[index])
        image, mask = self._files(index)
        geometry = self.reading.geometry()
        return self._joined(geometry.apply_image(image), geometry.apply_mask(mask))

    def _files(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """An image and its mask, if there are masks, as their files hold them."""
        path, reading = self.paths[index], self.reading
        image = read_image(path, reading.in_channels, reading.intensity_rule())
        if self.mask_paths is None:
            return image, None
        mask = read_mask(self.mask_paths[index], self.mask_classes)
        check_sizes(self.mask_paths[index], mask, path, image)
        return image, mask

    def _joined(self, image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        image = to_uint8_channels(image, self.reading.in_channels)
        return image if mask is None else np.concatenate([image, mask[..., None]], axis=2)


class ImageCache:
    """Decoded images in memory that worker processes share, each filled in when first wanted."""

    def __init__(self, count: int, shape: tuple[int, ...], shared: bool):
        self.images = th.zeros((count, *shape), dtype=th.uint8)
        self.filled = th.zeros(count, dtype=th.uint8)
        if shared:
            self.images.share_memory_()
            self.filled.share_memory_()

    def get(self, index: int, load: Callable[[int], np.ndarray]) -> np.ndarray:
        """The image of this number, loaded once."""
        kept = self.images[index].numpy()
        if not self.filled[index]:
            kept[...] = load(index)
            self.filled[index] = 1  # last, so that nobody sees half an image
        return kept


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

    Drawn from Python's global generator unless `rng` is given.
    """
    image = np.asarray(pil_image)
    return _random_crop(image, None, image_size, min_crop_frac, max_crop_frac, rng or random)[0]


def class_names(paths: Sequence[str]) -> list[str]:
    """The classes that file names tell, sorted; a class's number is its place here."""
    return sorted({_class_name(path) for path in paths})


def class_labels(paths: Sequence[str], names: Sequence[str] | None = None) -> list[int]:
    """The class number of every file.

    :param names: all classes in the order of their numbers; by default those of the files.
    :raises UserError: if a file is of another class.
    """
    numbers = {name: number for number, name in enumerate(names or class_names(paths))}
    for path in paths:
        if _class_name(path) not in numbers:
            raise UserError(
                f"{path} is of the class {_class_name(path)!r} (its name up to the first"
                f" underscore), the network knows {', '.join(list(numbers)[:10])}"
            )
    return [numbers[_class_name(path)] for path in paths]


def sample_is_grey(paths: list[str], how_many: int = 64) -> bool:
    """Whether a sample, spread evenly over `paths`, is all grey; unreadable files don't count."""
    places = np.linspace(0, len(paths) - 1, min(how_many, len(paths))).round().astype(int)
    answers = []
    for place in np.unique(places):
        try:
            answers.append(is_grey(paths[place]))
        except ImageError:
            continue
    return bool(answers) and all(answers)


class _Steps(Dataset):
    """Item number s is the batch of step s: images, their dict, and what was skipped."""

    def __init__(
        self,
        images: ImageDataset,
        batch_size: int,
        rank: int,
        num_ranks: int,
        seed: int,
        deterministic: bool,
        skip_bad_images: bool,
    ):
        self.images = images
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.seed = seed
        self.deterministic = deterministic
        self.skip_bad_images = skip_bad_images
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, step: int) -> tuple[th.Tensor, dict, list[str]] | ImageError:
        first = (step * self.num_ranks + self.rank) * self.batch_size
        arrays, indices, skipped = [], [], []
        for number in range(first, first + self.batch_size):
            try:
                index, array = self._sample(number, skipped)
            except ImageError as error:
                return error  # a worker would wrap it in a traceback if it were raised here
            arrays.append(array)
            indices.append(index)
        return *self.images.collate(arrays, indices), skipped

    def _sample(self, number: int, skipped: list[str]) -> tuple[int, np.ndarray]:
        """Sample of this global number: which image it is, and its pixels."""
        for attempt in range(len(self.images)):
            index = self._index(number + attempt)
            rng = None
            if self.images.random_flip or self.images.random_crop:
                rng = random.Random(derive_seed(self.seed, "image", number))
            try:
                return index, self.images.read(index, rng)
            except ImageError as error:
                if not self.skip_bad_images:
                    raise
                skipped.append(str(error))
        raise ImageError("not one image could be read; the last: " + skipped[-1])

    def _index(self, number: int) -> int:
        epoch, place = divmod(number, len(self.images))
        if self.deterministic:
            return place
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            generator = np.random.default_rng(derive_seed(self.seed, "order", epoch))
            self._orders[epoch] = generator.permutation(len(self.images))
        return int(self._orders[epoch][place])


class _CountFrom(Sampler):
    """step, step + 1, step + 2, ... for ever."""

    def __init__(self, step: int):
        self.step = step

    def __iter__(self) -> Iterator[int]:
        step = self.step
        while True:
            yield step
            step += 1


def _batches(
    steps: _Steps, start_step: int, num_workers: int, on_skip: Callable[[str], None]
) -> Iterator[Batch]:
    loader = DataLoader(
        steps,
        batch_size=None,  # an item is a whole batch already
        sampler=_CountFrom(start_step),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=th.cuda.is_available(),
        persistent_workers=num_workers > 0,
        generator=th.Generator(),  # else starting it would draw from the global generator
        worker_init_fn=leave_to_parent,
        # it knows its parent only if that has forked it, which is not every Python's default
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )
    reported = set()
    for item in loader:
        if isinstance(item, ImageError):
            raise item
        images, cond, skipped = item
        for line in skipped:
            if line not in reported:
                reported.add(line)
                on_skip(line)
        yield images, cond


def _as_it_is(item: object) -> object:
    return item


def _print_skipped(line: str) -> None:
    print(f"skipped: {line}", file=sys.stderr, flush=True)


def _random_crop(
    image: np.ndarray,
    mask: np.ndarray | None,
    size: int,
    smallest: float,
    largest: float,
    rng: random.Random,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale so that `size` is the drawn fraction of the short side, then cut a random square."""
    geometry = Geometry("crop", rng.randint(math.ceil(size / largest), math.ceil(size / smallest)))
    scaled = geometry.scaled_image(image)
    top = rng.randint(0, scaled.shape[0] - size)
    left = rng.randint(0, scaled.shape[1] - size)
    part = np.s_[top : top + size, left : left + size]
    return scaled[part], (None if mask is None else geometry.scaled_mask(mask)[part])


def _class_name(path: str) -> str:
    return os.path.basename(path).split("_")[0]


def _with_size(reading: ReadingConfig, image_size: int | tuple[int, int]) -> ReadingConfig:
    return ReadingConfig.from_dict({**reading.to_dict(), "image_size": image_size})


def _cache_for(
    kind: str,
    count: int,
    reading: ReadingConfig,
    random_crop: bool,
    num_ranks: int,
    num_workers: int,
    with_masks: bool = False,
) -> ImageCache | None:
    """The cache that was asked for, or that fits where that was left open."""
    if kind not in CACHES:
        raise UserError(f"cache {kind!r} must be one of {', '.join(CACHES)}")
    if kind == "none" or (kind == "auto" and random_crop):
        return None
    if random_crop:
        raise UserError("--cache ram holds images at one size; with --random_crop use --cache none")
    height, width = reading.geometry().height_width
    shape = (height, width, reading.in_channels + with_masks)
    needed = count * math.prod(shape) * int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    free, limit = _free_memory(shared=num_workers > 0)
    if kind == "auto" and needed > min(free // 4, limit):
        return None
    if needed > min(free, limit):
        raise UserError(
            f"--cache ram needs {needed / 2**30:.1f} GiB for {count} images and "
            f"{min(free, limit) / 2**30:.1f} GiB are free; use --cache none"
        )
    return ImageCache(count, shape, shared=num_workers > 0)


def _free_memory(shared: bool) -> tuple[int, int]:
    """Bytes free in memory, and of them what shared memory may take (containers limit both)."""
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            sizes = dict(line.split(":") for line in file)
        free = int(sizes["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max": no limit
        free = min(free, _control_group("memory.max") - _control_group("memory.current"))
    if shared and os.path.isdir(_SHARED_MEMORY):
        stats = os.statvfs(_SHARED_MEMORY)
        return free, stats.f_bavail * stats.f_frsize
    return free, free


def _control_group(name: str) -> int:
    with open(f"{_CONTROL_GROUP}/{name}") as file:
        return int(file.read())
