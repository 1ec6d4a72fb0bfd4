"""Training a mask diffusion model, with the training loop of all diffusion models."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import Batch
from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import write_image
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import MaskDiffusionConfig
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint, run_lock
from guided_diffusion.runtime.storage.contents import Files, digests
from guided_diffusion.runtime.storage.files import check_output
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.metrics import confusion_matrix, present_scores
from guided_diffusion.segmentation.model_file import (
    SegmentationConfig,
    save_model,
    swaps_of_training,
)
from guided_diffusion.segmentation.networks.mask_diffusion import (
    MaskDiffusionModel,
    describe,
    encode,
)
from guided_diffusion.segmentation.training import augment
from guided_diffusion.segmentation.training.config import MaskProcessConfig, MaskTrainConfig
from guided_diffusion.segmentation.training.dataset import (
    LabelledImages,
    TrainingData,
    check_masks,
    choose_pairs,
    load_labelled,
    training_batches,
)
from guided_diffusion.segmentation.training.folders import Folders
from guided_diffusion.segmentation.training.job import (
    about_reading,
    find_table,
    log_data,
    shared_with_validation,
    split_names,
)
from guided_diffusion.segmentation.training.mask_process import write_process
from guided_diffusion.segmentation.visuals.render import comparison
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.run import (
    Run,
    grid_path,
    open_run,
    run_training,
)
from guided_diffusion.unet import ConditionalUNetModel

MODEL_NAME = "segm.pth"
# number of radiographs whose masks are drawn, for inspection and scores, during training
_SHOWN = 8
# flags of other trainers that have no effect here, and what has
_INSTEAD = {
    "data_dir": "pass the folders TRAIN_IMG and TRAIN_MASK",
    "random_flip": "--flip mirrors radiograph and mask together",
    "random_crop": "--augmentation heavy crops radiograph and mask together",
    "class_cond": "the radiograph is the condition",
    "skip_bad_images": "every labelled radiograph is needed",
}


@dataclasses.dataclass
class MaskTraining:
    """A run about to start.

    diffusion_run: as for any diffusion. config: what the model file says. train: training images.
    val: images to draw masks of; `validates`: whether they differ from the training images.
    augmentation: of the training images with their masks. stopped_by: the signal that ended `run`.
    """

    diffusion_run: Run[MaskDiffusionConfig, MaskTrainConfig]
    config: SegmentationConfig
    train: LabelledImages
    val: LabelledImages
    validates: bool
    augmentation: augment.Augmentation
    stopped_by: str | None = None

    def run(self) -> int:
        """Train to the last step or until a signal; returns the command's exit code."""
        loop = self._loop()
        code = run_training(loop, self.diffusion_run)
        self.stopped_by = loop.stopped_by
        return code

    @property
    def model_path(self) -> str:
        """The file of the segmentation model."""
        folder = self.diffusion_run.folder
        return self.diffusion_run.train.weights_save or bf.join(folder, MODEL_NAME)

    @property
    def last_path(self) -> str:
        """The largest file that only resuming needs."""
        step = self.diffusion_run.train.max_steps
        return bf.join(self.diffusion_run.folder, checkpoint.step_name("opt", step))

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from a step on: class maps to diffuse, and `{"cond": radiographs}`."""
        size, seed = self.diffusion_run.train.batch_size, self.diffusion_run.train.seed
        step, ranks, rank = start_step, dist_util.world_size(), dist_util.rank()
        while True:
            number = step * ranks + rank
            images, masks = next(
                training_batches(self.train, size, self.augmentation, seed, number)
            )
            yield encode(masks, len(self.config.categories)), {"cond": images}
            step += 1

    def _loop(self) -> "MaskTrainLoop":
        run = self.diffusion_run
        # a pretrained network has seen radiographs, which are the condition here
        network = run.build(at=run.model.mask_channels)
        return run.loop(
            MaskTrainLoop,
            network,
            self.batches,
            self._look,
            config=self.config,
            path=self.model_path,
        )

    @th.no_grad()
    def _look(self, network: th.nn.Module, step: int) -> None:
        """Draw masks of some radiographs: a picture, and their Dice in the log.

        One row per radiograph: its own mask, then three drawn ones.
        """
        if not isinstance(network, ConditionalUNetModel):
            raise TypeError(f"{type(network).__name__} does not draw masks")
        run, categories = self.diffusion_run, self.config.categories
        model = MaskDiffusionModel(network, run.diffusion.build(), num_samples=3)
        numbers = self.val.with_foreground()[:_SHOWN]
        images, labels = self.val.batch(numbers, seeds=numbers)
        draws = model.draws(images.to(dist_util.dev()))
        drawn = draws.argmax(2).cpu().numpy().astype(np.uint8)
        mean = draws.mean(0).argmax(1).cpu().numpy().astype(np.uint8)
        masks = labels.numpy().astype(np.uint8)
        scores = present_scores(confusion_matrix(mean, masks, len(categories)))
        part = "val" if self.validates else "train"
        logger.logkv(f"{part}_mean_dice", scores.mean_dice())
        logger.log(f"step {step}: mean Dice of the foreground {scores.mean_dice():.4f} ({part})")
        pictures = ((images + 1) / 2).movedim(1, -1).numpy()
        rows = [[mask, *drawn[:, i]] for i, mask in enumerate(masks)]
        write_image(grid_path(run.folder, step), comparison(list(pictures), rows, categories))
        if run.train.visualize_process:
            stem = bf.join(run.folder, f"process_{step:06d}")
            write_process(model, images[:1], masks[0], categories, stem)


class MaskTrainLoop(TrainLoop):
    """Trains a network to denoise class maps; saves a segmentation model with every checkpoint.

    Takes TrainLoop's arguments.

    :param config: what the segmentation model's file says about it.
    :param path: that file; it holds the averaged weights of the highest rate.
    """

    def __init__(self, *, config: SegmentationConfig, path: str, **kwargs: Any):
        self.config = config
        self.path = path
        super().__init__(**kwargs)

    def save(self, passing: bool = False) -> None:
        super().save(passing)
        if dist_util.is_main():
            self._save_model()

    def run_loop(self) -> None:
        super().run_loop()
        # a run that was killed between its last checkpoint and the model has no step left to do
        if dist_util.is_main() and not (bf.exists(self.path) and self._model_step() == self.step):
            self._save_model()

    def _model_step(self) -> int:
        return checkpoint.load(self.path).get("step", -1)

    def _save_model(self) -> None:
        rate = max(self.ema_rates.values(), default=None)
        averages = None if rate is None else self.stepper.ema[rate]
        weights = self.stepper.weights_as_state_dict(averages)
        named = {f"network.{name}": value for name, value in weights.items()}
        save_model(self.path, self.config, named, step=self.step)


def prepare(overrides: Overrides) -> MaskTraining:
    """Check everything, then open the run's log.

    :param overrides: the flags and arguments that the user gave.
    :raises UserError: for whatever the user must correct.
    """
    for name, instead in _INSTEAD.items():
        if name in overrides:
            raise UserError(f"--{name} has no effect here: {instead}")
    settings = from_flags(MaskTrainConfig, overrides)
    run_folder = _folder(settings.weights_save, overrides.get("output", ""))
    folders = Folders.from_flags(overrides)
    categories = find_table(
        folders,
        overrides.get("num_segmentation_classes", 0),
        settings.categories,
        settings.binary or settings.mask_threshold >= 0,
        settings.ignore_index,
    )
    swaps = augment.check_flips(categories, settings.flip, settings.flip_swap)
    augmentation = augment.Augmentation(settings.augmentation, settings.flip, swaps)
    rule = settings.rule(categories)
    names = split_names(settings.train_names)
    for chosen, pair in zip((names, ()), folders.pairs):
        check_masks(*pair, rule, chosen)
    run = open_run(
        {
            "predict_xstart": MaskProcessConfig.predict_xstart,
            **overrides,
            "num_segmentation_classes": len(categories),
            "data_dir": folders.train[0],
        },
        "mask_diffusion",
        MaskDiffusionConfig,
        MaskTrainConfig,
        reading=ReadingConfig(resize="pad"),
        repeats=True,
        folder=run_folder,
        files=_contents(folders, categories, names),
        pairs=[(image, mask) for _, image, mask in pair_files(*folders.train)],
    )
    train = load_labelled(*folders.train, run.reading, rule, names)
    val = load_labelled(*folders.val, run.reading, rule) if folders.val else None
    shared = shared_with_validation(folders, names, train, val)
    log_data(TrainingData(categories, train, val, shared=shared))
    if run.init:
        for line in about_reading(run.reading, run.init.reading, "resize" not in overrides):
            logger.log(line)
    config = dataclasses.replace(
        describe(run.model, run.diffusion, run.reading, categories),
        flip_swaps=swaps_of_training(settings.flip, settings.flip_swap),
    )
    return MaskTraining(run, config, train, val or train, val is not None, augmentation)


def _folder(weights_save: str, output: str) -> str:
    """The run's folder, "" if the flags leave it open."""
    if output.endswith(".pth"):
        raise UserError(f"--output {output}: name the folder; --weights_save names the model file")
    if weights_save and not os.path.splitext(weights_save)[1]:
        raise UserError(f"--weights_save {weights_save}: name a file such as segm.pth")
    if weights_save:
        check_output(weights_save)
    if weights_save and dist_util.is_main():
        run_lock.hold_file(weights_save, "choose another --weights_save")
    return output or (f"{os.path.splitext(weights_save)[0]}_logs" if weights_save else "")


def _contents(folders: Folders, categories: ClassTable, train_names: Sequence[str]) -> Files:
    """What the run learns from: both files of each pair, and the class table."""
    table = "; ".join(f"{c.index} {c.name} {c.color}" for c in categories.entries)
    files: Files = {"class table": {"categories": table}}
    for part, dirs, only in zip(("train", "val"), folders.pairs, (train_names, ())):
        chosen = choose_pairs(pair_files(*dirs), only)
        files[part] = {name: " ".join(digests(paths)) for name, *paths in chosen}
    return files
