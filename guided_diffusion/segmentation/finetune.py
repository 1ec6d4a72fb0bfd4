"""The few-label training loop: from a pretrained diffusion network to a segmentation network."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from tqdm import tqdm

from guided_diffusion import checkpoint, logger, rng
from guided_diffusion.errors import UserError
from guided_diffusion.flags import flag
from guided_diffusion.reading import normalize
from guided_diffusion.segmentation import augment, losses
from guided_diffusion.segmentation.dataset import LabelledImages, training_batches
from guided_diffusion.segmentation.metrics import confusion_matrix, dice_iou
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model
from guided_diffusion.segmentation.predict import sliding_scores
from guided_diffusion.segmentation.render import plot_curves
from guided_diffusion.signals import StopRequest
from guided_diffusion.stepper import Stepper, warmup_cosine
from guided_diffusion.unet import SegmentationUNetModel

# seconds between saves; writing a large network after every short epoch would take longer than it
SAVE_EVERY = 60.0


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning."""

    out_channels: int = flag(0, "classes, background counted; 0: as the categories or masks have")
    categories: str = flag("", "class table, JSON; '': flags/categories.json where it fits")
    epochs: int = flag(200, "passes over the training images", "-e")
    lr: float = flag(1e-4, "highest learning rate of AdamW", "-l", "--learning-rate")
    batch_size: int = flag(2, "images a step", "-b")
    microbatch: int = flag(-1, "images a forward pass, to save memory; -1: the whole batch")
    weight_decay: float = flag(0.0, "decoupled weight decay of AdamW")
    schedule: str = flag("cosine", "learning rate over time", choices=("cosine", "constant"))
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises from 0")
    loss: str = flag("ce+dice", "cross-entropy, soft Dice or both", choices=losses.LOSSES)
    class_weighting: str = flag(
        "none", "of the cross-entropy, by inverse frequency", choices=losses.WEIGHTINGS
    )
    augmentation: str = flag("medium", "of image and mask together", choices=augment.LEVELS)
    flip: str = flag("none", "mirror half the images", choices=augment.FLIPS)
    flip_swap: str = flag("", "classes that change places when mirrored, e.g. 1:2")
    weights_save: str = flag("segm.pth", "file for the best network")
    unfreeze_decoder: float = flag(1.0, "share of the decoder that trains, from the output on")
    unfreeze_encoder: float = flag(1.0, "share of the encoder that trains, from the middle on")
    depth: int = flag(0, "finest levels to keep of the pretrained network; 0: all")
    timestep: float = flag(1.0, "timestep at which radiographs enter, of the diffusion's steps")
    random_init: bool = flag(False, "start from random weights, to compare with")
    max_grad_norm: float = flag(1.0, "2-norm to which longer gradients are cut; 0: never")
    precision: str = flag("", "fp32, fp16 or bf16; '': as use_fp16 says")
    val_interval: int = flag(1, "epochs between validations")
    seed: int = flag(0, "of fresh weights, order and augmentation")
    max_skipped_steps: int = flag(100, "not finite gradients in a row that end the run; 0: never")
    resume_checkpoint: str = flag("", "'' or auto: go on where it stopped; none: start again")

    def check(self) -> None:
        """:raises UserError: for values out of range."""
        for name in ("epochs", "batch_size", "val_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("unfreeze_decoder", "unfreeze_encoder", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: a share between 0 and 1")


def freeze(model: SegmentationUNetModel, encoder: float, decoder: float) -> list[str]:
    """Let only a share of the network train, and its output layer always.

    :param encoder: share of the middle and input blocks, from the middle outwards.
    :param decoder: share of the output blocks, from the output inwards.
    :return: names of the parts that stay as they are.
    """
    parts = {
        "encoder": [("middle_block", model.middle_block)]
        + [(f"input_blocks.{i}", block) for i, block in reversed([*enumerate(model.input_blocks)])],
        "decoder": [
            (f"output_blocks.{i}", block)
            for i, block in reversed([*enumerate(model.output_blocks)])
        ],
    }
    frozen = []
    for share, blocks in ((encoder, parts["encoder"]), (decoder, parts["decoder"])):
        for name, block in blocks[round(share * len(blocks)) :]:
            block.requires_grad_(False)
            frozen.append(name)
    if encoder < 1:  # every block hears of the timestep; frozen ones must hear the same as before
        model.time_embed.requires_grad_(False)
        frozen.append("time_embed")
    return frozen


class Finetuner:
    """Fine-tunes a segmentation network on labelled images.

    :param model: network on its device, pretrained weights loaded.
    :param config: what the model file will say of it.
    :param settings: the flags.
    :param train: training images.
    :param val: validation images, or None: then the last network counts as the best.
    :param folder: for logs and curves.
    :param origin: what the run is, as plain values; a resume is refused if it differs.
    """

    def __init__(
        self,
        model: SegmentationUNetModel,
        config: SegmentationConfig,
        settings: FinetuneConfig,
        train: LabelledImages,
        val: LabelledImages | None,
        folder: str,
        origin: dict[str, Any],
    ):
        self.model = model
        self.config = config
        self.settings = settings
        self.train = train
        self.val = val
        self.folder = folder
        self.origin = origin
        self.device = next(model.parameters()).device
        self.augmentation = augment.Augmentation(
            settings.augmentation, settings.flip, augment.parse_swaps(settings.flip_swap)
        )
        weights = losses.class_weights(
            train.class_pixels(len(config.categories)), settings.class_weighting
        )
        self.loss = losses.SegmentationLoss(settings.loss, weights).to(self.device)
        self.stepper = Stepper(
            model,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            precision=settings.precision or "fp32",
            max_grad_norm=settings.max_grad_norm,
        )
        self.steps_an_epoch = math.ceil(len(train) / settings.batch_size)
        self.epoch = 0
        self.best: dict[str, Any] = {"mean_iou": -1.0, "epoch": 0}
        self._best_weights: dict[str, th.Tensor] | None = None
        self.stopped_by: str | None = None

    @property
    def last_path(self) -> str:
        """The file for resuming, beside the best network's."""
        stem, ending = os.path.splitext(self.settings.weights_save)
        return f"{stem}_last{ending}"

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.steps_an_epoch

    def resume(self, values: dict[str, Any]) -> None:
        """Go on from what `save` wrote."""
        self.model.load_state_dict(values["state_dict"])
        self.stepper.load_optimizer(values["opt"])
        self.stepper.load_state_dict(values["stepper"])
        self.epoch, self.best = values["epoch"], values["best"]

    def run(self) -> None:
        """Train until the last epoch or a signal; `stopped_by` names the signal."""
        batches = training_batches(
            self.train,
            self.settings.batch_size,
            self.augmentation,
            self.settings.seed,
            self.epoch * self.steps_an_epoch,
        )
        bar = tqdm(total=self.settings.epochs, initial=self.epoch, unit="epoch", dynamic_ncols=True)
        saved_at = time.monotonic()
        with StopRequest() as stop, bar:
            while self.epoch < self.settings.epochs and not stop.requested:
                self._train_epoch(batches)
                self.epoch += 1
                ended = self.epoch == self.settings.epochs
                if ended or self.epoch % self.settings.val_interval == 0:
                    self._validate()
                row = logger.dumpkvs()
                bar.update()
                bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "val_mean_dice") if k in row})
                if time.monotonic() - saved_at > SAVE_EVERY and not ended:
                    self.save()
                    saved_at = time.monotonic()
            self.save()
        self.stopped_by = stop.requested if self.epoch < self.settings.epochs else None

    def _train_epoch(self, batches) -> None:
        self.model.train()
        for _ in range(self.steps_an_epoch):
            images, masks = next(batches)
            step = self.stepper.steps
            size = self._forward_size()
            for first in range(0, len(images), size):
                rows = slice(first, first + size)
                share = len(images[rows]) / len(images)
                th.manual_seed(rng.derive_seed(self.settings.seed, "dropout", step, first))
                with self.stepper.autocast():
                    scores = self.stepper.model(images[rows].to(self.device, non_blocking=True))
                loss = self.loss(scores, masks[rows].to(self.device, non_blocking=True))
                self.stepper.backward(loss * share)
                logger.logkv_mean("loss", loss.detach())
            factor = 1.0
            if self.settings.schedule == "cosine":
                warmup = round(self.settings.warmup * self.steps)
                factor = warmup_cosine(step, self.steps, warmup)
            logger.logkv_mean("grad_norm", self.stepper.step(self.settings.lr * factor))
            logger.logkv("lr", self.settings.lr * factor)
        in_a_row, total = self.stepper.skipped()
        logger.logkv("skipped_steps", total)
        if in_a_row >= self.settings.max_skipped_steps > 0:
            raise UserError(
                f"no finite gradient in {in_a_row} steps in a row: lower --lr, or train in"
                " --precision fp32"
            )
        logger.logkv("epoch", self.epoch + 1)
        logger.logkv("step", self.stepper.steps)

    def _validate(self) -> None:
        if self.val is None:
            self.best = {"epoch": self.epoch}
            self._best_weights = None
            return
        confusion, loss = self._evaluate(self.val)
        scores = dice_iou(confusion)
        logger.logkv("val_loss", loss)
        logger.logkv("val_mean_dice", scores.mean_dice())
        logger.logkv("val_mean_iou", scores.mean_iou())
        for category in self.config.categories:
            logger.logkv(f"val_dice {category.name}", float(scores.dice[category.index]))
            logger.logkv(f"val_iou {category.name}", float(scores.iou[category.index]))
        if not scores.mean_iou() <= self.best["mean_iou"]:
            self.best = {
                "epoch": self.epoch,
                "mean_iou": scores.mean_iou(),
                "mean_dice": scores.mean_dice(),
                "dice": scores.dice.tolist(),
                "iou": scores.iou.tolist(),
            }
            self._best_weights = {k: v.cpu().clone() for k, v in self.model.state_dict().items()}

    def _forward_size(self) -> int:
        """Images a forward pass."""
        settings = self.settings
        return settings.microbatch if settings.microbatch > 0 else settings.batch_size

    @th.no_grad()
    def _evaluate(self, data: LabelledImages) -> tuple[np.ndarray, float]:
        """Confusion matrix and mean loss at the size of the data, padding left out."""
        self.model.eval()
        classes = len(self.config.categories)
        confusion, total = np.zeros((classes, classes), np.int64), 0.0
        size = 1 if data.window else self._forward_size()
        for first in range(0, len(data), size):
            numbers = range(first, min(first + size, len(data)))
            with self.stepper.autocast():
                if data.window:
                    images = normalize(data.images[first])[None].to(self.device)
                    masks = th.from_numpy(data.masks[first])[None].long()
                    scores = sliding_scores(self.model, images, data.window)
                else:
                    images, masks = data.batch(numbers)
                    scores = self.model(images.to(self.device))
            total += float(self.loss(scores, masks.to(self.device))) * len(numbers)
            predicted = scores.argmax(1).cpu().numpy()
            confusion += confusion_matrix(predicted, masks.numpy().astype(np.uint8), classes)
        return confusion, total / len(data)

    def save(self) -> None:
        """Write the best network, then what a resume needs, then the curves."""
        logger.flush()
        weights = self.model.state_dict()
        scores = {"best": self.best, "origin": self.origin}
        if self._best_weights is not None or self.val is None:
            best = weights if self.val is None else self._best_weights
            save_model(self.settings.weights_save, self.config, best, **scores)
            self._best_weights = None
        save_model(
            self.last_path,
            self.config,
            weights,
            **scores,
            epoch=self.epoch,
            opt=self.stepper.opt.state_dict(),
            stepper=self.stepper.state_dict(),
        )
        log = os.path.join(self.folder, "progress.csv")
        if os.path.exists(log):
            with contextlib.suppress(UserError):  # no column worth drawing yet
                plot_curves(log, os.path.join(self.folder, "curves.png"), self.config.categories)


def start_again(paths: Sequence[str]) -> None:
    """Put files of an earlier run aside, so that nothing is lost."""
    for path in paths:
        if os.path.exists(path):
            aside, number = f"{path}.old", 1
            while os.path.exists(aside):
                number += 1
                aside = f"{path}.old{number}"
            os.rename(path, aside)


def find_unfinished(path: str, origin: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run of the same command left under `path`, or None.

    :raises UserError: if it is of another command, naming the first difference.
    """
    if not os.path.exists(path):
        return None
    values = checkpoint.load(path)
    theirs = values.get("origin", {}) if isinstance(values, dict) else {}
    for name, value in origin.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{path} is of another run, with {name} {theirs.get(name)!r} instead of {value!r}:"
                " choose another --weights_save, or put it aside with --resume_checkpoint none"
            )
    return values
