"""What reading the images of a run takes: a sample of them is read."""

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from guided_diffusion import dist_util
from guided_diffusion.image_datasets import Batch
from guided_diffusion.images.cache import fits
from guided_diffusion.images.files import evenly_spaced, pair_files
from guided_diffusion.images.image_io import check_images
from guided_diffusion.images.masks import ignored_values
from guided_diffusion.runtime.memory import private_bytes
from guided_diffusion.runtime.storage.files import is_local
from guided_diffusion.training.config import GuidedTrainConfig, TrainConfig
from guided_diffusion.training.guidance import check_masks
from guided_diffusion.training.run import num_workers_of
from guided_diffusion.training.trial import AnyRun, Clock

# images whose headers are checked, batches that are read, and seconds that these may take
_CHECKED, _BATCHES, _LONGEST = 64, 32, 10.0
# batches that each data loader process prepares in advance
_IN_ADVANCE = 2


@dataclass(frozen=True)
class ReadingCosts:
    """What reading takes on one rank.

    seconds: per batch, with all processes together; None where the flags name no images. images:
    in the folder. cache_bytes: of the images that stay in memory; unread_bytes: those of them
    that were not read yet. worker_bytes: of all data loader processes.
    """

    seconds: float | None = None
    images: int = 0
    cache_bytes: int = 0
    unread_bytes: int = 0
    workers: int = 0
    worker_bytes: int = 0


def seconds_of_checking(paths: Sequence[str], train: TrainConfig, clock: Clock) -> float:
    """Seconds for the headers of all images, from a sample of them.

    :raises UserError: for one without a readable header.
    """
    local = [path for path in paths if is_local(path)]
    if train.skip_bad_images or not local:
        return 0.0
    sample = evenly_spaced(local, _CHECKED)
    began = clock()
    check_images(sample)
    return (clock() - began) * len(local) / len(sample)


def seconds_of_checking_masks(train: GuidedTrainConfig, classes: int, clock: Clock) -> float:
    """Seconds for all masks, from a sample of them.

    :raises UserError: for images and masks that do not belong together, or a bad mask.
    """
    if not (train.data_dir and train.seg_dir):
        return 0.0
    pairs = pair_files(train.data_dir, train.seg_dir)
    sample = evenly_spaced(pairs, _CHECKED)
    began = clock()
    check_masks(sample, classes, ignored_values(train.ignore_index))
    return (clock() - began) * len(pairs) / len(sample)


@contextlib.contextmanager
def read_some(
    run: AnyRun,
    paths: Sequence[str],
    batches: Callable[[], Iterator[Batch]] | None,
    clock: Clock,
) -> Iterator[ReadingCosts]:
    """Read some batches; what holds the images stays in memory throughout the context.

    :param paths: of all images.
    :param batches: starts the run's data loader.
    :raises UserError: as the run would.
    """
    if batches is None:
        yield ReadingCosts()
        return
    train, geometry = run.train, run.reading.geometry()
    workers = num_workers_of(train.num_workers)
    loader = batches()
    # an image that is read twice may come from the cache
    count = max(
        1,
        min(max(_BATCHES, 4 * workers), len(paths) // (train.batch_size * dist_util.world_size())),
    )
    seconds, read = _time(loader, count, clock)
    masks = bool(getattr(train, "seg_dir", ""))
    shape = (*geometry.height_width, run.reading.in_channels + masks)
    kind = "none" if train.random_crop and train.cache == "auto" else train.cache
    ranks = dist_util.local_size()
    cached = fits(kind, len(paths), shape, ranks, workers > 0)
    total = len(paths) * math.prod(shape) if cached else 0
    in_memory = total if workers else read * train.batch_size * math.prod(shape)
    batch_bytes = 4 * train.batch_size * math.prod(shape)
    children = multiprocessing.active_children() if workers else []
    own = sum(private_bytes(child.pid) for child in children if child.pid)
    yield ReadingCosts(
        seconds=seconds,
        images=len(paths),
        cache_bytes=total,
        unread_bytes=max(0, total - in_memory),
        workers=workers,
        worker_bytes=own + workers * _IN_ADVANCE * batch_bytes,
    )
    loader.close()  # type: ignore[attr-defined]


def _time(loader: Iterator[Batch], count: int, clock: Clock) -> tuple[float, int]:
    """Seconds per batch, without the first where there are more; and how many were read."""
    began, limit = clock(), time.monotonic() + _LONGEST
    next(loader)
    first = clock()
    read = 1
    while read < count and time.monotonic() < limit:
        next(loader)
        read += 1
    return ((clock() - first) / (read - 1) if read > 1 else first - began), read
