"""The few-label training loop: from a pretrained diffusion network to a segmentation network."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

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
from guided_diffusion.segmentation.noised_input import NoisedInput
from guided_diffusion.segmentation.predict import sliding_scores
from guided_diffusion.segmentation.render import plot_curves
from guided_diffusion.signals import StopRequest
from guided_diffusion.stepper import Stepper, warmup_cosine

# of a run whose length is given in steps; more log rows and validations would tell nothing new
_MOST_EPOCHS = 100
# seconds between saves; writing a large network after every short epoch would take longer than it
SAVE_EVERY = 60.0


@dataclasses.dataclass(frozen=True)
class LearningConfig:
    """Learning from a few labels."""

    out_channels: int = flag(
        0, "classes, background counted; 0: as the categories or masks have", "--classes", "-c"
    )
    binary: bool = flag(False, "two classes: any value but 0 in a mask is the second")
    categories: str = flag("", "class table, JSON; '': flags/categories.json where it fits")
    train_names: str = flag("", "train on these images alone: names without ending, by commas")
    epochs: int = flag(200, "passes over the training images", "-e")
    steps: int = flag(
        0,
        "optimisation steps however many images there are, instead of --epochs; an epoch is then"
        " at least a hundredth of them; 0: as --epochs says",
    )
    lr: float = flag(1e-4, "highest learning rate of AdamW", "-l", "--learning-rate")
    batch_size: int = flag(2, "images a step", "-b")
    microbatch: int = flag(-1, "images a forward pass, to save memory; -1: the whole batch")
    weight_decay: float = flag(0.0, "decoupled weight decay of AdamW")
    schedule: str = flag("cosine", "learning rate over time", choices=("cosine", "constant"))
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises from 0")
    head_lr_scale: float = flag(1.0, "factor on the learning rate of layers without pretraining")
    ema_rate: float = flag(
        0.0, "save the average of the weights, this much of it kept in a step; 0: the last weights"
    )
    loss: str = flag("ce+dice", "cross-entropy, soft Dice or both", choices=losses.LOSSES)
    class_weighting: str = flag(
        "none", "of the cross-entropy, by inverse frequency", choices=losses.WEIGHTINGS
    )
    augmentation: str = flag("medium", "of image and mask together", choices=augment.LEVELS)
    flip: str = flag("none", "mirror half the images", choices=augment.FLIPS)
    flip_swap: str = flag("", "classes that change places when mirrored, e.g. 1:2")
    weights_save: str = flag("segm.pth", "file for the best network")
    max_grad_norm: float = flag(1.0, "2-norm to which longer gradients are cut; 0: never")
    precision: str = flag("", "fp32, fp16 or bf16; '': as use_fp16 says")
    val_interval: int = flag(1, "epochs between validations")
    seed: int = flag(0, "of fresh weights, order and augmentation")
    max_skipped_steps: int = flag(100, "not finite gradients in a row that end the run; 0: never")
    resume_checkpoint: str = flag("", "'' or auto: go on where it stopped; none: start again")

    # values of a subclass's flags that must be a share between 0 and 1, or not below 0
    SHARES: ClassVar[tuple[str, ...]] = ("warmup",)
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("steps", "lr", "head_lr_scale", "weight_decay")

    def check(self) -> None:
        """:raises UserError: for values out of range."""
        for name in ("epochs", "batch_size", "val_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in self.SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: a share between 0 and 1")
        for name in self.NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be below 0")
        if not 0 <= self.ema_rate < 1:
            raise UserError(f"--ema_rate {self.ema_rate}: from 0 to below 1, such as 0.99")

    def length(self, images: int) -> "Length":
        """How long a run on that many images is."""
        epoch = math.ceil(images / self.batch_size)
        if not self.steps:
            return Length(self.epochs, epoch, self.epochs * epoch)
        epoch = max(epoch, math.ceil(self.steps / _MOST_EPOCHS))
        return Length(math.ceil(self.steps / epoch), epoch, self.steps)


class Length(NamedTuple):
    """Of a run: its epochs, the steps of each but perhaps the last, and all steps."""

    epochs: int
    epoch: int
    steps: int


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(LearningConfig):
    """Fine-tuning."""

    layer_decay: float = flag(
        1.0, "factor on the learning rate from each block to the next, from the output on"
    )
    unfreeze_decoder: float = flag(1.0, "share of the decoder that trains, from the output on")
    unfreeze_encoder: float = flag(1.0, "share of the encoder that trains, from the middle on")
    depth: int = flag(0, "finest levels to keep of the pretrained network; 0: all")
    timestep: float = flag(1.0, "timestep at which radiographs enter, of the diffusion's steps")
    timestep_range: str = flag(
        "", "LOW,HIGH: train at random timesteps between; '': at --timestep alone"
    )
    noise_at_timestep: bool = flag(
        False, "train on images with the noise of their timestep; prediction is without"
    )
    random_init: bool = flag(
        False, "start from random weights, to compare with; all layers then learn at --lr"
    )

    SHARES: ClassVar[tuple[str, ...]] = ("warmup", "unfreeze_decoder", "unfreeze_encoder")

    def check(self) -> None:
        super().check()
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"--layer_decay {self.layer_decay}: above 0, to 1 for no decay")


class Finetuner:
    """Fine-tunes a segmentation network on labelled images.

    :param model: network on its device, pretrained weights loaded.
    :param config: what the model file will say of it.
    :param settings: the flags.
    :param train: training images.
    :param val: validation images, or None: then the last network counts as the best.
    :param folder: for logs and curves.
    :param origin: what the run is, as plain values; a resume is refused if it differs.
    :param groups: parameters with learning rates of their own, see `layers.parameter_groups`.
    :param noised_input: what becomes of training images before the network sees them.
    """

    def __init__(
        self,
        model: th.nn.Module,
        config: SegmentationConfig,
        settings: LearningConfig,
        train: LabelledImages,
        val: LabelledImages | None,
        folder: str,
        origin: dict[str, Any],
        groups: Sequence[dict[str, Any]] | None = None,
        noised_input: NoisedInput | None = None,
    ):
        self.model = model
        self.config = config
        self.settings = settings
        self.train = train
        self.val = val
        self.folder = folder
        self.origin = origin
        self.noised_input = noised_input
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
            param_groups=groups,
            ema_rates=[settings.ema_rate] if settings.ema_rate else [],
        )
        self.length = settings.length(len(train))
        self.epoch = 0
        self.best: dict[str, Any] = {"mean_iou": -1.0, "epoch": 0}
        self._best_weights: dict[str, th.Tensor] | None = None
        self.stopped_by: str | None = None

    @property
    def last_path(self) -> str:
        """The file for resuming, beside the best network's."""
        stem, ending = os.path.splitext(self.settings.weights_save)
        return f"{stem}_last{ending}"

    def resume(self, values: dict[str, Any]) -> None:
        """Go on from what `save` wrote."""
        self.model.load_state_dict(values["state_dict"])
        self.stepper.load_optimizer(values["opt"])
        self.stepper.load_state_dict(values["stepper"])
        for rate in self.stepper.ema:
            self.stepper.load_ema(rate, values["ema"])
        self.epoch, self.best = values["epoch"], values["best"]

    def run(self) -> None:
        """Train until the last epoch or a signal; `stopped_by` names the signal."""
        batches = training_batches(
            self.train,
            self.settings.batch_size,
            self.augmentation,
            self.settings.seed,
            self.stepper.steps,
        )
        epochs = self.length.epochs
        bar = tqdm(total=epochs, initial=self.epoch, unit="epoch", dynamic_ncols=True)
        saved_at = time.monotonic()
        with StopRequest() as stop, bar:
            while self.epoch < epochs and not stop.requested:
                self._train_epoch(batches)
                self.epoch += 1
                ended = self.epoch == epochs
                if ended or self.epoch % self.settings.val_interval == 0:
                    self._validate()
                row = logger.dumpkvs()
                bar.update()
                bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "val_mean_dice") if k in row})
                if time.monotonic() - saved_at > SAVE_EVERY and not ended:
                    self.save()
                    saved_at = time.monotonic()
            self.save()
        self.stopped_by = stop.requested if self.epoch < epochs else None

    def _train_epoch(self, batches: Iterator[tuple[th.Tensor, th.Tensor]]) -> None:
        self.model.train()
        for _ in range(min(self.length.epoch, self.length.steps - self.stepper.steps)):
            step = self.stepper.steps
            self._learn(step, *next(batches))
            lr = self._learning_rate(step)
            logger.logkv_mean("grad_norm", self.stepper.step(lr))
            logger.logkv("lr", lr)
        in_a_row, total = self.stepper.skipped()
        logger.logkv("skipped_steps", total)
        if in_a_row >= self.settings.max_skipped_steps > 0:
            raise UserError(
                f"no finite gradient in {in_a_row} steps in a row: lower --lr, or train in"
                " --precision fp32"
            )
        logger.logkv("epoch", self.epoch + 1)
        logger.logkv("step", self.stepper.steps)

    def _learn(self, step: int, images: th.Tensor, masks: th.Tensor) -> None:
        """Add the gradients of a batch."""
        timesteps = None
        if self.noised_input is not None:
            images, timesteps = self.noised_input(images, step * len(images))
        size = self._forward_size()
        for first in range(0, len(images), size):
            rows = slice(first, first + size)
            inputs = [images[rows]] if timesteps is None else [images[rows], timesteps[rows]]
            th.manual_seed(rng.derive_seed(self.settings.seed, "dropout", step, first))
            with self.stepper.autocast():
                scores = self.stepper.model(*(x.to(self.device, non_blocking=True) for x in inputs))
            loss = self.loss(scores, masks[rows].to(self.device, non_blocking=True))
            self.stepper.backward(loss * (len(images[rows]) / len(images)))
            logger.logkv_mean("loss", loss.detach())

    def _learning_rate(self, step: int) -> float:
        if self.settings.schedule == "constant":
            return self.settings.lr
        warmup = round(self.settings.warmup * self.length.steps)
        return self.settings.lr * warmup_cosine(step, self.length.steps, warmup)

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
            self._best_weights = {k: v.cpu().clone() for k, v in self._kept_weights().items()}

    def _kept_weights(self) -> dict[str, th.Tensor]:
        """Those of the network that is validated and saved: averaged, if so wanted."""
        rate = self.settings.ema_rate
        return self.stepper.weights_as_state_dict(self.stepper.ema[rate] if rate else None)

    def _kept_network(self) -> contextlib.AbstractContextManager[th.nn.Module]:
        """The network with these weights, for as long as the context lasts."""
        if self.settings.ema_rate:
            return self.stepper.averaged_weights(self.settings.ema_rate)
        return contextlib.nullcontext(self.model)

    def _forward_size(self) -> int:
        """Images a forward pass."""
        settings = self.settings
        return settings.microbatch if settings.microbatch > 0 else settings.batch_size

    @th.no_grad()
    def _evaluate(self, data: LabelledImages) -> tuple[np.ndarray, float]:
        """Confusion matrix and mean loss at the size of the data, padding left out."""
        classes = len(self.config.categories)
        confusion, total = np.zeros((classes, classes), np.int64), 0.0
        size = 1 if data.window else self._forward_size()
        with self._kept_network() as model:
            model.eval()
            for first in range(0, len(data), size):
                numbers = range(first, min(first + size, len(data)))
                with self.stepper.autocast():
                    if data.window:
                        images = normalize(data.images[first])[None].to(self.device)
                        masks = th.from_numpy(data.masks[first])[None].long()
                        scores = sliding_scores(model, images, data.window)
                    else:
                        images, masks = data.batch(numbers)
                        scores = model(images.to(self.device))
                total += float(self.loss(scores, masks.to(self.device))) * len(numbers)
                predicted = scores.argmax(1).cpu().numpy()
                confusion += confusion_matrix(predicted, masks.numpy().astype(np.uint8), classes)
        return confusion, total / len(data)

    def save(self) -> None:
        """Write the best network, then what a resume needs, then the curves."""
        logger.flush()
        scores = {"best": self.best, "origin": self.origin}
        if self._best_weights is not None or self.val is None:
            best = self._kept_weights() if self.val is None else self._best_weights
            save_model(self.settings.weights_save, self.config, best, **scores)
            self._best_weights = None
        save_model(
            self.last_path,
            self.config,
            self.model.state_dict(),
            **scores,
            ema=self._kept_weights() if self.settings.ema_rate else {},
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
