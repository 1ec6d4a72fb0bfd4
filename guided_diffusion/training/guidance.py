"""Training of networks guided by masks (arXiv 2402.05210): radiographs that show what a mask says.

A mask joins the noisy image as one channel per class except the background. Unlike a single
channel of class indices this does not order the classes, and a class that is missing is a channel
of zeros.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import Batch
from guided_diffusion.images.files import pair_files, split_folder
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.masks import check_sizes, ignored_values, read_mask
from guided_diffusion.images.swaps import check_swap_classes, parse_swaps
from guided_diffusion.networks.conditional import GuidedConfig, check_classes, one_hot
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.command_line.flags import Overrides
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.sampling.images import preview_images
from guided_diffusion.training.config import GuidedTrainConfig
from guided_diffusion.training.diffusion import (
    diffusion_batches,
    first_images,
    image_indices,
    train_with_grids,
)
from guided_diffusion.training.run import Run, open_run

# probability that an image keeps all its classes where classes are dropped
_KEEP_ALL = 0.5
# pairs whose sizes are compared before a run starts
_SIZES_CHECKED = 16
# images of the training whose masks guide the samples of a grid
GUIDED_GRID_IMAGES = 8
# flags that mean nothing without --segmentation_guided
_GUIDED_FLAGS = (
    "seg_dir",
    "ignore_index",
    "flip_swap",
    "num_segmentation_classes",
    "use_ablated_segmentations",
)


def train(overrides: Overrides) -> int:
    """Train a network that masks guide; returns the command's exit code.

    :param overrides: the flags on the command line.
    """
    run = open_guided_run(overrides)
    return train_with_grids(run, partial(guided_batches, run), partial(guided_grid, run))


def open_guided_run(overrides: Overrides) -> Run[GuidedConfig, GuidedTrainConfig]:
    """`open_run` for a network that masks guide.

    :raises UserError: for masks that do not belong to the images, or hold too many classes.
    """
    if overrides.get("align_encoder"):
        raise UserError(
            "--align_encoder does not apply to --segmentation_guided True: omit one of them"
        )
    if not overrides.get("seg_dir"):
        raise UserError("--seg_dir is missing: name the folder of the masks")
    classes = overrides.get("num_segmentation_classes", 0)
    check_classes(classes)
    check_swap_classes(parse_swaps(overrides.get("flip_swap", "")), classes)
    pairs: list[tuple[str, str]] = []
    overrides = {**overrides, "seg_dir": split_folder(overrides["seg_dir"], "train")}
    if overrides.get("data_dir"):
        overrides["data_dir"] = split_folder(overrides["data_dir"], "train")
        named = pair_files(overrides["data_dir"], overrides["seg_dir"])
        if dist_util.is_main():
            check_masks(named, classes, ignored_values(overrides.get("ignore_index", -1)))
        pairs = [(image, mask) for _, image, mask in named]
    run = open_run(overrides, "segmentation_guided", GuidedConfig, GuidedTrainConfig, pairs=pairs)
    if run.train.random_flip and not run.train.flip_swap:
        logger.log("--random_flip mirrors masks too: exchange left and right with --flip_swap")
    return run


def refuse_guidance(overrides: Overrides) -> None:
    """:raises UserError: for flags that apply to guided runs only."""
    for name in _GUIDED_FLAGS:
        if overrides.get(name) not in (None, False, "", 0, -1):
            raise UserError(f"--{name} requires --segmentation_guided True: add it")


def check_masks(
    pairs: Sequence[tuple[str, str, str]], classes: int, ignore: tuple[int, ...] = ()
) -> None:
    """Read every mask, since a run may last for days before it reaches a bad one.

    :param pairs: of `pair_files`.
    :param ignore: values of pixels without a label.
    :raises UserError: for a mask with a class out of range or of another size than its image.
    """
    spread = np.linspace(0, len(pairs) - 1, min(_SIZES_CHECKED, len(pairs))).round().astype(int)
    compared = set(spread.tolist())
    with progress_bar(len(pairs), "mask", desc="checking masks") as bar:
        for number, (_, image_path, mask_path) in enumerate(pairs):
            mask = read_mask(mask_path, classes, ignore)
            if number in compared:
                check_sizes(mask_path, mask, image_path, read_image(image_path))
            bar.update()


def ablated(condition: th.Tensor, seed: int, indices: Sequence[int]) -> th.Tensor:
    """The condition without the classes that these images are to be trained without.

    Half of the images keep all classes; the others lose from one to all, each number being equally
    likely, so that the network often sees none. In arXiv 2402.05210 (mask-ablated training) every
    subset of the classes is equally likely, so that of 6 classes only 1 image in 64 keeps none.

    :param condition: uint8 `[N x K x H x W]` of `one_hot`.
    :param seed: of the run; what is dropped is a function of it and of the image's index.
    :param indices: of the images in the run.
    """
    condition = condition.clone()
    count = condition.shape[1]
    for row, index in zip(condition, indices):
        draw = np.random.default_rng(rng.derive_seed(seed, "ablate", index))
        if draw.random() >= _KEEP_ALL:
            row[draw.permutation(count)[: draw.integers(1, count + 1)]] = 0
    return condition


def guided_batches(run: Run[GuidedConfig, GuidedTrainConfig], start_step: int) -> Iterator[Batch]:
    """The run's batches from a step on, with the condition "cond" that the network takes."""
    classes = run.model.num_segmentation_classes
    masked = diffusion_batches(
        run,
        start_step,
        mask_dir=run.train.seg_dir,
        mask_classes=classes,
        mask_ignore=ignored_values(run.train.ignore_index),
        flip_swaps=parse_swaps(run.train.flip_swap),
    )
    for step, (images, arguments) in enumerate(masked, start_step):
        condition = one_hot(arguments.pop("mask"), classes)
        if run.model.use_ablated_segmentations:
            condition = ablated(condition, run.train.seed, image_indices(step, len(images)))
        yield images, {**arguments, "cond": condition}


def guided_grid(
    run: Run[GuidedConfig, GuidedTrainConfig], network: th.nn.Module
) -> tuple[th.Tensor, int]:
    """A column per image: its classes in shades of grey, the sample that they guide, the image.

    :return: `[3 * columns x C x H x W]` in [-1, 1], row by row, and the number of columns.
    """
    images, arguments = first_images(partial(guided_batches, run), GUIDED_GRID_IMAGES)
    process, device = run.diffusion.build(), images.device
    sampled = preview_images(network, process, images.shape[1:], len(images), device, arguments)
    condition = arguments["cond"].float()
    shades = th.linspace(0, 2, condition.shape[1] + 1, device=device)[1:]
    maps = (condition * shades[:, None, None]).sum(1, keepdim=True) - 1
    return th.cat([maps.expand_as(images), sampled, images]), len(images)
