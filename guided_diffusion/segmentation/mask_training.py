"""Training the diffusion that draws masks, by the loop that trains all diffusions."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.conditional import MaskDiffusionConfig
from guided_diffusion.errors import UserError
from guided_diffusion.flags import flag, from_flags
from guided_diffusion.image_datasets import Batch
from guided_diffusion.image_io import pair_files, read_image, read_mask
from guided_diffusion.pictures import write_png
from guided_diffusion.reading import ReadingConfig
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.run_setup import ConditionalTrainConfig, Run, grid_path, open_run
from guided_diffusion.segmentation import augment
from guided_diffusion.segmentation.categories import (
    Category,
    categories_for,
    load_categories,
)
from guided_diffusion.segmentation.dataset import (
    LabelledImages,
    count_classes,
    load_labelled,
    training_batches,
)
from guided_diffusion.segmentation.mask_diffusion import MaskDiffusionModel, describe, encode
from guided_diffusion.segmentation.mask_process import write_process
from guided_diffusion.segmentation.metrics import confusion_matrix, dice_iou
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model
from guided_diffusion.segmentation.render import comparison
from guided_diffusion.train_util import TrainLoop

MODEL_NAME = "segm.pth"
# radiographs whose masks are drawn to look at, and to score, while training
_SHOWN = 8
# flags of other trainers that mean nothing here, and what does
_ELSEWHERE = {
    "data_dir": "give the folders TRAIN_IMG and TRAIN_MASK",
    "random_flip": "--flip mirrors radiograph and mask together",
    "random_crop": "--augmentation heavy crops radiograph and mask together",
    "class_cond": "the radiograph is the condition",
    "skip_bad_images": "every labelled radiograph counts",
}


@dataclasses.dataclass(frozen=True)
class MaskTrainConfig(ConditionalTrainConfig):
    """Training."""

    categories: str = flag("", "class table, JSON; '': flags/categories.json where it fits")
    mask_threshold: int = flag(
        -1, "masks are black and white, what is above this is foreground; -1: class numbers"
    )
    augmentation: str = flag("medium", "of image and mask together", choices=augment.LEVELS)
    flip: str = flag("none", "mirror half the images", choices=augment.FLIPS)
    flip_swap: str = flag("", "classes that change places when mirrored, e.g. 1:2")
    weights_save: str = flag("", "file of the segmentation model; '': segm.pth in the run's folder")
    visualize_process: bool = flag(
        False, "with each grid of samples show noise becoming mask: process_N.png and .gif"
    )


@dataclasses.dataclass(frozen=True)
class MaskRun:
    """A run about to start.

    run: as of any diffusion. config: what the model file says. train: training images. val: images
    to look at; `validates`: whether they are others than those of the training. augmentation: of
    the training images with their masks.
    """

    run: Run
    config: SegmentationConfig
    train: LabelledImages
    val: LabelledImages
    validates: bool
    augmentation: augment.Augmentation

    def loop(self) -> "MaskTrainLoop":
        """The loop that trains the network."""
        diffusion = self.run.diffusion.build()
        sampler = create_named_schedule_sampler(self.run.train.schedule_sampler, diffusion)
        return MaskTrainLoop(
            config=self.config,
            path=self.model_path,
            # a pretrained network has seen radiographs, which are the condition here
            model=self.run.build(at=self.run.model.mask_channels),
            diffusion=diffusion,
            data=self.batches,
            schedule_sampler=sampler,
            sample_fn=self.look,
            **self.run.loop_arguments(),
        )

    @property
    def model_path(self) -> str:
        """The file of the segmentation model."""
        return self.run.train.weights_save or os.path.join(self.run.folder, MODEL_NAME)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from a step on: class maps to diffuse, and {"cond": radiographs}."""
        settings = self.run.train
        step, ranks, rank = start_step, dist_util.world_size(), dist_util.rank()
        while True:
            here = training_batches(
                self.train,
                settings.batch_size,
                self.augmentation,
                settings.seed,
                step * ranks + rank,
            )
            images, masks = next(here)
            yield encode(masks, len(self.config.categories)), {"cond": images}
            step += 1

    @th.no_grad()
    def look(self, network: th.nn.Module, step: int) -> None:
        """Draw masks of some radiographs: a picture, and their Dice in the log.

        A row a radiograph: its own mask, then three that are drawn.
        """
        model = MaskDiffusionModel(network, self.run.diffusion.build(), num_samples=3)
        numbers = range(min(_SHOWN, len(self.val)))
        images, masks = self.val.batch(numbers, seeds=numbers)
        draws = model.draws(images.to(dist_util.dev()))
        drawn = draws.argmax(2).cpu().numpy().astype(np.uint8)
        masks = masks.numpy().astype(np.uint8)
        classes = len(self.config.categories)
        mean = draws.mean(0).argmax(1).cpu().numpy().astype(np.uint8)
        scores = dice_iou(confusion_matrix(mean, masks, classes))
        part = "val" if self.validates else "train"
        logger.logkv(f"{part}_mean_dice", scores.mean_dice())
        logger.log(f"step {step}: mean Dice of the foreground {scores.mean_dice():.4f} ({part})")
        pictures = ((images + 1) / 2).movedim(1, -1).numpy()
        rows = [[masks[i], *drawn[:, i]] for i in numbers]
        grid = comparison(list(pictures), rows, self.config.categories)
        write_png(grid_path(self.run.folder, step), grid)
        if self.run.train.visualize_process:
            stem = os.path.join(self.run.folder, f"process_{step:06d}")
            write_process(model, images[:1], masks[0], self.config.categories, stem)


class MaskTrainLoop(TrainLoop):
    """Trains a network to denoise class maps; with every checkpoint writes a segmentation model.

    Takes TrainLoop's arguments.

    :param config: what the segmentation model's file says of it.
    :param path: that file; it holds the averaged weights of the highest rate.
    """

    def __init__(self, *, config: SegmentationConfig, path: str, **kwargs: Any):
        self.config = config
        self.path = path
        super().__init__(**kwargs)

    def save(self) -> None:
        super().save()
        if dist_util.is_main():
            rate = max(self.ema_rates.values(), default=None)
            averages = None if rate is None else self.stepper.ema[rate]
            weights = self.stepper.weights_as_state_dict(averages)
            named = {f"network.{name}": value for name, value in weights.items()}
            save_model(self.path, self.config, named, step=self.step)


def open_mask_run(
    train_dirs: tuple[str, str], val_dirs: tuple[str, str] | None, given: Mapping[str, Any]
) -> MaskRun:
    """Check everything, then begin the run's log.

    :param train_dirs: folders of radiographs and of masks.
    :param given: the given flags.
    :raises UserError: for whatever the user must mend.
    """
    for name, instead in _ELSEWHERE.items():
        if name in given:
            raise UserError(f"--{name} has no meaning here: {instead}")
    settings = from_flags(MaskTrainConfig, given)
    swaps = augment.parse_swaps(settings.flip_swap)
    augmentation = augment.Augmentation(settings.augmentation, settings.flip, swaps)
    folders = [dirs for dirs in (train_dirs, val_dirs) if dirs]
    categories = _categories(settings, given.get("num_segmentation_classes", 0), folders)
    classes = len(categories)
    given = {**given, "num_segmentation_classes": classes, "data_dir": train_dirs[0]}
    if settings.mask_threshold < 0:
        for dirs in folders:
            for _, _, path in pair_files(*dirs):
                read_mask(path, classes)
    run = open_run(
        given,
        "mask_diffusion",
        MaskDiffusionConfig,
        MaskTrainConfig,
        reading=ReadingConfig(resize="pad"),
        repeats=True,
    )
    train = _load(train_dirs, run.reading, classes, settings.mask_threshold)
    val = _load(val_dirs, run.reading, classes, settings.mask_threshold) if val_dirs else None
    names = ", ".join(f"{c.index} {c.name}" for c in categories)
    logger.log(f"{len(train)} training images, {len(val) if val else 0} for validation")
    logger.log(f"{classes} classes: {names}")
    config = describe(run.model, run.diffusion, run.reading, categories)
    return MaskRun(run, config, train, val or train, val is not None, augmentation)


def _categories(
    settings: MaskTrainConfig, number: int, folders: Sequence[tuple[str, str]]
) -> tuple[Category, ...]:
    if settings.mask_threshold >= 0:
        if number not in (0, 2):
            raise UserError(f"--mask_threshold makes two classes, not {number}")
        number = 2
    if number:
        return categories_for(number, settings.categories or None)
    if settings.categories:
        return load_categories(settings.categories)
    return categories_for(count_classes(folders))


def _load(
    dirs: tuple[str, str], reading: ReadingConfig, classes: int, threshold: int
) -> LabelledImages:
    """Radiographs and masks; with a threshold from 0 on, of masks in black and white."""
    if threshold < 0:
        return load_labelled(*dirs, reading, classes)
    names, images, masks = [], [], []
    for name, image_path, mask_path in pair_files(*dirs):
        image = read_image(image_path, reading.in_channels, reading.intensity_rule())
        mask = (read_mask(mask_path) > threshold).astype(np.uint8)
        if image.shape[:2] != mask.shape:
            raise UserError(f"{mask_path} and {image_path} differ in size: export them alike")
        names.append(name)
        images.append(reading.prepare(image))
        masks.append(reading.geometry().apply_mask(mask))
    window = reading.geometry().height_width if reading.resize == "native" else None
    return LabelledImages(tuple(names), images, masks, window)
