"""The training loop for few labels, shared by fine-tuning and the baselines."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from guided_diffusion import logger
from guided_diffusion.images.swaps import parse_swaps
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.command_line.precision_flag import AUTO
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.ranks.devices import of_float64
from guided_diffusion.runtime.signals import StopRequest
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.segmentation.metrics import present_scores
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model
from guided_diffusion.segmentation.training import augment, losses
from guided_diffusion.segmentation.training.dataset import (
    LabelledImages,
    TrainingData,
    training_batches,
)
from guided_diffusion.segmentation.training.layers import learning_rate
from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.segmentation.training.noised_input import NoisedInput
from guided_diffusion.segmentation.training.resume import BestScores, Origin, SavedRun
from guided_diffusion.segmentation.training.validation import count_pixels, scored_batches
from guided_diffusion.segmentation.visuals.render import NothingToPlot, plot_curves
from guided_diffusion.stepper import Stepper

# seconds between saves: writing a large network takes longer than a short epoch
SAVE_EVERY = 60.0


@dataclass(frozen=True)
class InitialNetwork:
    """A segmentation network before its first training step.

    config: what the model file will say about it. groups: parameters with their own learning rates,
    see `layers.parameter_groups`; None for one rate. noised_input: takes training images to other
    timesteps before the network sees them. messages: for the log.
    """

    model: th.nn.Module
    config: SegmentationConfig
    groups: Sequence[dict[str, Any]] | None = None
    noised_input: NoisedInput | None = None
    messages: Sequence[str] = ()


class Finetuner:
    """Trains a segmentation network on labelled images.

    The best network has the highest mean IoU of the foreground classes that the validation masks
    show, and is the first of several; while that is 0, it has the lowest validation loss. Without
    validation images it is the last.

    :param initial: the network, with its weights and on its device.
    :param settings: the flags.
    :param data: images to train and to validate on.
    :param origin: what identifies the run; a resume is refused if it differs.
    :param stage: what the run is part of, for the progress bar.
    """

    def __init__(
        self,
        initial: InitialNetwork,
        settings: LearningConfig,
        data: TrainingData,
        origin: Origin,
        stage: str = "",
    ):
        self.model = initial.model
        self.config = initial.config
        self.noised_input = initial.noised_input
        self.settings = settings
        self.data = data
        self.origin = origin
        self.stage = stage
        self.device = next(self.model.parameters()).device
        swaps = parse_swaps(settings.flip_swap)
        self.augmentation = augment.Augmentation(settings.augmentation, settings.flip, swaps)
        level = settings.pseudo_augmentation if data.pseudo is not None else "same"
        self.augmentation_of_more = (
            None if level == "same" else augment.Augmentation(level, settings.flip, swaps)
        )
        pixels = data.train.class_pixels(len(self.config.categories))
        weights = losses.class_weights(pixels, settings.class_weighting)
        # a class that no mask shows cannot be learnt: there it is background
        unknown = th.from_numpy(pixels > 0) if settings.absent_classes == "unknown" else None
        self.loss = losses.SegmentationLoss(settings.loss, weights, unknown).to(self.device)
        self.stepper = Stepper(
            self.model,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            precision="fp32" if settings.precision in AUTO else settings.precision,
            max_grad_norm=settings.max_grad_norm,
            param_groups=initial.groups,
            ema_rates=[settings.ema_rate] if settings.ema_rate else [],
        )
        self.length = settings.length(len(data.train))
        self.epoch = 0
        self.best: BestScores = {"mean_iou": -1.0, "epoch": 0}
        self._unsaved_best: dict[str, th.Tensor] | None = None
        self.stopped_by: str | None = None

    @property
    def curves_path(self) -> str:
        return os.path.join(self.settings.log_folder, "curves.png")

    @property
    def last_path(self) -> str:
        """The file that only resuming needs."""
        return self.settings.last_path

    def resume(self, saved: SavedRun) -> None:
        """Continue from what `save` wrote."""
        self.model.load_state_dict(saved["state_dict"])
        self.stepper.load_optimizer(saved["opt"])
        self.stepper.load_state_dict(saved["stepper"])
        for rate in self.stepper.ema:
            self.stepper.load_ema(rate, saved["ema"])
        self.epoch, self.best = saved["epoch"], saved["best"]
        # of a run that is longer than when it was saved, epochs may be longer too
        left = math.ceil((self.length.steps - self.stepper.steps) / self.length.epoch)
        self.length = self.length._replace(epochs=self.epoch + left)

    def run(self, stop: StopRequest | None = None) -> None:
        """Train to the last epoch or until a signal, which `stopped_by` then names.

        :param stop: of a larger run that this one is a stage of, which records signals already.
        """
        batches = training_batches(
            self.data.train,
            self.settings.batch_size,
            self.augmentation,
            self.settings.seed,
            self.stepper.steps,
            self.data.more,
            self.settings.synthetic_weight,
            self.augmentation_of_more,
        )
        epochs = self.length.epochs
        bar = progress_bar(epochs, "epoch", initial=self.epoch, desc=self.stage or None)
        saved_at = time.monotonic()
        with StopRequest() if stop is None else contextlib.nullcontext(stop) as stop, bar:
            while self.epoch < epochs and not stop.requested:
                self._train_epoch(batches)
                self.epoch += 1
                is_last = self.epoch == epochs
                if is_last or self.epoch % self.settings.val_interval == 0:
                    self._validate()
                row = logger.dumpkvs()
                bar.update()
                shown = {k: f"{row[k]:.3f}" for k in ("loss", "val_mean_dice") if k in row}
                bar.set_postfix(shown, refresh=False)
                if time.monotonic() - saved_at > SAVE_EVERY and not is_last:
                    self.save()
                    saved_at = time.monotonic()
            if self.epoch == epochs and not self.best["epoch"]:
                raise UserError(
                    "the validation loss was never finite, so there is no network to save: lower"
                    " --lr, or train in --precision fp32"
                )
            self.save()
        self.stopped_by = stop.requested if self.epoch < epochs else None

    def outcome(self) -> str:
        """The result of a run to its end, in lines of the log."""
        saved = f"saved {self.settings.weights_save}; curves in {self.curves_path}"
        if not self.data.val:
            return saved
        best = self.best
        return (
            f"best network: epoch {best['epoch']}, mean IoU {best['mean_iou']:.4f},"
            f" mean Dice {best['mean_dice']:.4f} of the foreground\n{saved}"
        )

    def _train_epoch(self, batches: Iterator[tuple[th.Tensor, th.Tensor]]) -> None:
        self.model.train()
        for _ in range(min(self.length.epoch, self.length.steps - self.stepper.steps)):
            step = self.stepper.steps
            self._accumulate_labelled(step, *next(batches))
            lr = learning_rate(self.settings, step, self.length.steps)
            logger.logkv_mean("grad_norm", self.stepper.step(lr))
            logger.logkv("lr", lr)
        in_a_row, total = self.stepper.skipped()
        logger.logkv("skipped_steps", total)
        if in_a_row >= self.settings.max_skipped_steps > 0:
            raise UserError(
                f"{in_a_row} consecutive steps had non-finite gradients: lower --lr, or train in"
                " --precision fp32"
            )
        logger.logkv("epoch", self.epoch + 1)
        logger.logkv("step", self.stepper.steps)

    def _accumulate_labelled(self, step: int, images: th.Tensor, masks: th.Tensor) -> None:
        """Add the gradients of a batch of labelled images."""
        timesteps = None
        if self.noised_input is not None:
            images, timesteps = self.noised_input(images, step * len(images))
        inputs = [x for x in (masks, images, timesteps) if x is not None]

        def sums(first: int) -> th.Tensor:
            rows = slice(first, first + self.settings.forward_size)
            there = (x[rows].to(self.device, non_blocking=True) for x in inputs)
            truth, *arguments = there
            th.manual_seed(rng.derive_seed(self.settings.seed, "dropout", step, first))
            with self.stepper.autocast():
                scores = self.stepper.model(*arguments)
            return self.loss.sums(scores, truth)

        starts = range(0, len(images), self.settings.forward_size)
        if len(starts) == 1:
            loss = self.loss.of(sums(0))
            self.stepper.backward(loss)
        else:  # the loss is one of the whole batch: its slope in each sum needs the sums of all
            with self._unchanged_buffers(), th.no_grad():
                total = sum(map(sums, starts), th.zeros((), device=self.device))
            total.requires_grad_()
            loss = self.loss.of(total)
            (slope,) = th.autograd.grad(loss, total)
            for first in starts:
                self.stepper.backward(sums(first) @ slope)
        logger.logkv_mean("loss", loss.detach())

    @contextlib.contextmanager
    def _unchanged_buffers(self) -> Iterator[None]:
        """Forward passes in the context leave no trace in running statistics."""
        before = [buffer.clone() for buffer in self.model.buffers()]
        yield
        for buffer, value in zip(self.model.buffers(), before):
            buffer.copy_(value)

    def _validate(self) -> None:
        if self.data.val is None:
            self.best = {"epoch": self.epoch}
            return
        confusion, loss = self._evaluate(self.data.val)
        scores = present_scores(confusion)
        logger.logkv("val_loss", loss)
        logger.logkv("val_mean_dice", scores.mean_dice())
        logger.logkv("val_mean_iou", scores.mean_iou())
        for category in self.config.categories:
            logger.logkv(f"val_dice {category.name}", float(scores.dice[category.index]))
            logger.logkv(f"val_iou {category.name}", float(scores.iou[category.index]))
        better = scores.mean_iou() > self.best["mean_iou"] or (
            scores.mean_iou() == self.best["mean_iou"] == 0 and loss < self.best.get("loss", 0)
        )
        if better and math.isfinite(loss):
            self.best = {
                "epoch": self.epoch,
                "loss": loss,
                "mean_iou": scores.mean_iou(),
                "mean_dice": scores.mean_dice(),
                "dice": scores.dice.tolist(),
                "iou": scores.iou.tolist(),
            }
            self._unsaved_best = {k: v.cpu().clone() for k, v in self._weights_to_save().items()}

    def _weights_to_save(self) -> dict[str, th.Tensor]:
        """The weights that are validated and saved: averaged ones, if --ema_rate asks for them."""
        rate = self.settings.ema_rate
        return self.stepper.weights_as_state_dict(self.stepper.ema[rate] if rate else None)

    def _network_to_save(self) -> contextlib.AbstractContextManager[th.nn.Module]:
        """The network with these weights, for the duration of the context."""
        if self.settings.ema_rate:
            return self.stepper.averaged_weights(self.settings.ema_rate)
        return contextlib.nullcontext(self.model)

    @th.no_grad()
    def _evaluate(self, data: LabelledImages) -> tuple[np.ndarray, float]:
        """Confusion matrix and loss over all images at the size of the data, without padding."""
        confusion = np.zeros((len(self.config.categories),) * 2, np.int64)
        total = th.zeros((), dtype=th.float64, device=of_float64(self.device))
        with self._network_to_save() as model:
            batches = scored_batches(
                model.eval(), data, self.settings.forward_size, self.stepper.autocast
            )
            for scores, masks in batches:
                total = total + self.loss.sums(scores, masks).to(total.device).double()
                confusion += count_pixels(scores, masks)
        return confusion, float(self.loss.of(total))

    def save(self) -> None:
        """Write the best network, then what resuming needs, then the curves."""
        run_lock.check_held()
        logger.flush()
        shared = {"best": self.best, "origin": self.origin.to_plain()}
        best = self._weights_to_save() if self.data.val is None else self._unsaved_best
        if best is not None:
            save_model(self.settings.weights_save, self.config, best, **shared)
            self._unsaved_best = None
        save_model(
            self.settings.last_path,
            self.config,
            self.model.state_dict(),
            **shared,
            ema=self._weights_to_save() if self.settings.ema_rate else {},
            epoch=self.epoch,
            opt=self.stepper.opt.state_dict(),
            stepper=self.stepper.state_dict(),
        )
        log = os.path.join(self.settings.log_folder, "progress.csv")
        if os.path.exists(log):
            with contextlib.suppress(NothingToPlot):
                plot_curves(log, self.curves_path, self.config.categories)
