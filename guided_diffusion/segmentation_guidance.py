"""Class maps as a condition (arXiv 2402.05210): radiographs that show what a mask says.

A mask joins the noisy image as one channel for each class but the background. Unlike a single
channel of class numbers this gives no class a place between two others, and a class that is
missing is a channel of zeros.
"""

import dataclasses
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from . import checkpoint, dist_util, rng
from .conditional import GuidedConfig, check_classes
from .errors import UserError
from .flags import flag
from .geometry import IGNORE
from .guidance import ClassifierFree
from .image_datasets import Batch
from .image_io import check_sizes, list_images, pair_files, read_image, read_mask
from .pictures import write_png
from .progress import progress_bar
from .run_setup import ConditionalTrainConfig, Run, open_run
from .sample_config import Labels, SampleConfig
from .sample_job import SampleJob, guided
from .sampling import preview_images
from .trained import Trained, read_trained

# share of the images that keep all their classes where classes are dropped
_WHOLE = 0.5
# pairs whose sizes are compared before a run starts
_SIZES_CHECKED = 16
_ONLY_GUIDED = (
    "seg_dir",
    "num_segmentation_classes",
    "use_ablated_segmentations",
    "init_checkpoint",
)


@dataclasses.dataclass(frozen=True)
class GuidedTrainConfig(ConditionalTrainConfig):
    """Training."""

    seg_dir: str = flag("", "folder of the class maps, named as their images, or with all/train")
    dry_run: bool = flag(
        False,
        "report parameters, memory and seconds a step of these flags; train and write nothing",
    )


@dataclasses.dataclass(frozen=True)
class GuidedSampleConfig(SampleConfig):
    """Sampling."""

    seg_dir: str = flag("", "class maps: an image is sampled for each, under its name")
    seg_split: str = flag("test", "which of SEG_DIR/all/{train,val,test}, where that is the layout")
    samples_per_mask: int = flag(1, "images for each class map")
    ablate_classes: str = flag("", "numbers of classes to leave open, by commas, e.g. 1,3")


def open_guided_run(given: Mapping[str, Any]) -> Run:
    """`open_run` for a network that class maps guide.

    :raises UserError: for masks that are not those of the images, or hold too many classes.
    """
    if not given.get("seg_dir"):
        raise UserError("--seg_dir is missing: name the folder of the masks")
    classes = given.get("num_segmentation_classes", 0)
    check_classes(classes)
    given = {**given, "seg_dir": split_folder(given["seg_dir"], "train")}
    if given.get("data_dir"):
        given["data_dir"] = split_folder(given["data_dir"], "train")
        if dist_util.is_main():
            check_masks(pair_files(given["data_dir"], given["seg_dir"]), classes)
    return open_run(given, "segmentation_guided", GuidedConfig, GuidedTrainConfig)


def refuse_guidance(given: Mapping[str, Any]) -> None:
    """:raises UserError: for flags that mean something in guided runs alone."""
    for name in _ONLY_GUIDED:
        if given.get(name):
            raise UserError(f"--{name} is for networks with --segmentation_guided True: add that")


def split_folder(folder: str, split: str) -> str:
    """The part of a folder with the layout `all/{train,val,test}` or `{train,val,test}`.

    :return: the folder itself where it has neither.
    """
    for part in (bf.join(folder, "all", split), bf.join(folder, split)):
        if bf.isdir(part):
            return part
    return folder


def check_masks(pairs: Sequence[tuple[str, str, str]], classes: int) -> None:
    """Read every mask, since a run may last for days before it comes to a bad one.

    :param pairs: as `pair_files` gives them.
    :raises UserError: for a mask with too high a class or of another size than its image.
    """
    shown = np.linspace(0, len(pairs) - 1, min(_SIZES_CHECKED, len(pairs))).round().astype(int)
    compared = set(shown.tolist())
    with progress_bar(len(pairs), "mask", desc="checking masks") as bar:
        for number, (_, image_path, mask_path) in enumerate(pairs):
            mask = read_mask(mask_path, classes)
            if number in compared:
                check_sizes(mask_path, mask, image_path, read_image(image_path))
            bar.update()


def one_hot(masks: th.Tensor, classes: int) -> th.Tensor:
    """Uint8 `[N x H x W]` of class indices to 0 or 1, uint8 `[N x classes - 1 x H x W]`.

    The background and what is no class (IGNORE) have no channel.
    """
    numbers = th.arange(1, classes, dtype=masks.dtype, device=masks.device)
    return (masks[:, None] == numbers[:, None, None]).to(th.uint8)


def ablated(condition: th.Tensor, seed: int, indices: Sequence[int]) -> th.Tensor:
    """Without the classes that images of these numbers are to be trained without.

    Half the images keep all classes; the others lose from one to all, each number being as likely,
    so that the network often sees none, too. In arXiv 2402.05210 (mask-ablated training) every
    subset of the classes is as likely, so that of 6 classes only 1 image in 64 keeps none.

    :param condition: uint8 `[N x K x H x W]` of `one_hot`.
    :param seed: of the run; what is dropped is a function of it and of the image's number.
    """
    condition = condition.clone()
    count = condition.shape[1]
    for row, index in zip(condition, indices):
        draw = np.random.default_rng(rng.derive_seed(seed, "ablate", index))
        if draw.random() >= _WHOLE:
            row[draw.permutation(count)[: draw.integers(1, count + 1)]] = 0
    return condition


def guided_batches(run: Run, start_step: int) -> Iterator[Batch]:
    """The run's batches from a step on, with the condition "cond" that the network takes."""
    classes = run.model.num_segmentation_classes
    batches = run.batches(start_step, mask_dir=run.train.seg_dir, mask_classes=classes)
    ranks, rank = dist_util.world_size(), dist_util.rank()
    for step, (images, arguments) in enumerate(batches, start_step):
        condition = one_hot(arguments.pop("mask"), classes)
        if run.model.use_ablated_segmentations:
            first = (step * ranks + rank) * len(images)
            condition = ablated(condition, run.train.seed, range(first, first + len(images)))
        yield images, {**arguments, "cond": condition}


def guided_grid(run: Run, network: th.nn.Module, diffusion: Any, columns: int = 8) -> th.Tensor:
    """A column an image: its classes in shades of grey, what the network draws, the image.

    :return: `[3 * columns x C x H x W]` in [-1, 1], row by row.
    """
    device = dist_util.dev()
    images, arguments = next(guided_batches(run, 0))
    images = images[:columns].to(device)
    arguments = {name: value[:columns].to(device) for name, value in arguments.items()}
    drawn = preview_images(network, diffusion, images.shape[1:], len(images), device, arguments)
    condition = arguments["cond"].float()
    shades = th.linspace(0, 2, condition.shape[1] + 1, device=device)[1:]
    maps = (condition * shades[:, None, None]).sum(1, keepdim=True) - 1
    return th.cat([maps.expand_as(images), drawn, images])


@dataclasses.dataclass(frozen=True)
class GuidingMasks:
    """Masks for which images are sampled; image k belongs to mask k // per_mask.

    names: of the masks. paths: their files. per_mask: images for each. dropped: classes that are
    left open. trained: the network.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    per_mask: int
    dropped: tuple[int, ...]
    trained: Trained

    def image_names(self) -> list[str]:
        """The names of the images: the masks' own, numbered where a mask has several."""
        if self.per_mask == 1:
            return list(self.names)
        return [f"{name}_{number}" for name in self.names for number in range(self.per_mask)]

    def mask(self, index: int) -> np.ndarray:
        """What guides image `index`: class indices uint8 `[H x W]` at the network's size.

        Classes that are left open and padding are background.
        """
        classes = self.trained.model.num_segmentation_classes
        mask = read_mask(self.paths[index // self.per_mask], classes)
        mask = self.trained.reading.geometry().apply_mask(mask)
        return np.where(np.isin(mask, (*self.dropped, IGNORE)), 0, mask).astype(np.uint8)

    def conditions(self, indices: Sequence[int]) -> dict[str, th.Tensor]:
        """The network's argument for images of these numbers."""
        masks = th.from_numpy(np.stack([self.mask(index) for index in indices]))
        classes = self.trained.model.num_segmentation_classes
        return {"cond": one_hot(masks, classes).to(dist_util.dev())}

    def write(self, count: int, folder: str) -> None:
        """Write `MASK/NAME.png` for the first images, so that IMG and MASK are a dataset."""
        for index, name in enumerate(self.image_names()[:count]):
            path = bf.join(folder, "MASK", f"{name}.png")
            if not bf.exists(path):
                write_png(path, self.mask(index))

    def identity(self) -> dict[str, Any]:
        """What tells the images from those of other masks, as plain values."""
        crc = 0
        for name, path in zip(self.names, self.paths):
            with bf.BlobFile(path, "rb") as file:
                crc = zlib.crc32(file.read(), zlib.crc32(name.encode(), crc))
        return {
            "masks": crc,
            "samples_per_mask": self.per_mask,
            "ablate_classes": list(self.dropped),
        }


def read_trained_image_network(path: str, given: Mapping[str, Any]) -> Trained:
    """`read_trained` for a network that class maps may guide, or not, as its config.json says.

    :raises UserError: if the flags ask for guidance that it does not know.
    """
    stored = checkpoint.read_config(path) if path else None
    guided = stored is not None and stored.get("kind") == "segmentation_guided"
    if given.get("segmentation_guided") and not guided:
        raise UserError(f"{path} was trained without --segmentation_guided True")
    return read_trained(path, given, "segmentation_guided" if guided else "diffusion")


def guiding_masks(settings: GuidedSampleConfig, trained: Trained) -> GuidingMasks | None:
    """The masks that the flags ask for; None for images without any.

    :raises UserError: if the network cannot do that.
    """
    if not isinstance(trained.model, GuidedConfig):
        for name in ("seg_dir", "ablate_classes"):
            if getattr(settings, name):
                raise UserError(
                    f"--{name}: {trained.path} was trained without --segmentation_guided True"
                )
        return None
    dropped = _parse_classes(settings.ablate_classes, trained.model.num_segmentation_classes)
    if not trained.model.use_ablated_segmentations and (dropped or not settings.seg_dir):
        asked = "--ablate_classes" if dropped else "without --seg_dir"
        raise UserError(
            f"{asked}: {trained.path} was trained without --use_ablated_segmentations True, it"
            " knows no images whose classes are open"
        )
    if not settings.seg_dir:
        if dropped:
            raise UserError("--ablate_classes: there are no masks, --seg_dir is missing")
        return None
    if settings.samples_per_mask < 1:
        raise UserError(f"--samples_per_mask {settings.samples_per_mask}: must be at least 1")
    folder = split_folder(settings.seg_dir, settings.seg_split)
    paths = list_images(folder)
    base = folder if bf.isdir(folder) else ""
    relative = (path[len(base) :].strip("/") if base else bf.basename(path) for path in paths)
    names = [os.path.splitext(name)[0] for name in relative]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{folder} holds several masks with the name {twice[0]}")
    for path in paths:
        read_mask(path, trained.model.num_segmentation_classes)
    return GuidingMasks(tuple(names), tuple(paths), settings.samples_per_mask, dropped, trained)


def _parse_classes(text: str, classes: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and 0 < int(part) < classes for part in parts):
        raise UserError(f"--ablate_classes {text}: expected numbers from 1 to {classes - 1}")
    return tuple(sorted({int(part) for part in parts}))


def guided_job(
    settings: GuidedSampleConfig, trained: Trained, labels: Labels | None, masks: GuidingMasks
) -> SampleJob:
    """The images of all masks, or of the first --num_samples where that are fewer.

    :raises UserError: if the network cannot be guided as the flags ask.
    """
    names = masks.image_names()
    count = min(settings.num_samples, len(names))
    network = trained.network(dist_util.dev())
    if settings.guidance_scale != 1 and trained.model.use_ablated_segmentations:
        model = ClassifierFree(network, settings.guidance_scale, 0, "cond")
    else:
        model = guided(network, settings, trained)
    return SampleJob(
        dataclasses.replace(settings, num_samples=count),
        trained,
        model,
        labels,
        masks.conditions,
        also=masks.identity(),
        names=names,
        prepare=partial(masks.write, count),
    )
