"""Class maps as a condition (arXiv 2402.05210): radiographs that show what a mask says.

A mask joins the noisy image as one channel for each class but the background. Unlike a single
channel of class numbers this gives no class a place between two others, and a class that is
missing is a channel of zeros.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.image_datasets import Batch
from guided_diffusion.images.files import pair_files, split_folder
from guided_diffusion.images.image_io import check_sizes, read_image, read_mask
from guided_diffusion.networks.conditional import GuidedConfig, check_classes, one_hot
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import flag
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.sampling.images import preview_images
from guided_diffusion.training.run import ConditionalTrainConfig, Run, open_run

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


def open_guided_run(overrides: Mapping[str, Any]) -> Run:
    """`open_run` for a network that class maps guide.

    :raises UserError: for masks that are not those of the images, or hold too many classes.
    """
    if not overrides.get("seg_dir"):
        raise UserError("--seg_dir is missing: name the folder of the masks")
    classes = overrides.get("num_segmentation_classes", 0)
    check_classes(classes)
    overrides = {**overrides, "seg_dir": split_folder(overrides["seg_dir"], "train")}
    if overrides.get("data_dir"):
        overrides["data_dir"] = split_folder(overrides["data_dir"], "train")
        if dist_util.is_main():
            check_masks(pair_files(overrides["data_dir"], overrides["seg_dir"]), classes)
    return open_run(overrides, "segmentation_guided", GuidedConfig, GuidedTrainConfig)


def refuse_guidance(overrides: Mapping[str, Any]) -> None:
    """:raises UserError: for flags that mean something in guided runs alone."""
    for name in _ONLY_GUIDED:
        if overrides.get(name):
            raise UserError(f"--{name} is for networks with --segmentation_guided True: add that")


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
