"""The few-label training loop: from a pretrained diffusion network to a segmentation network."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.reading import normalize
from guided_diffusion.runtime import checkpoint, rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.signals import StopRequest
from guided_diffusion.segmentation.categories import parse_swaps
from guided_diffusion.segmentation.metrics import confusion_matrix, dice_iou
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model
from guided_diffusion.segmentation.networks.windows import sliding_scores
from guided_diffusion.segmentation.training import augment, losses
from guided_diffusion.segmentation.training.consistency import Consistency, consistency_loss
from guided_diffusion.segmentation.training.dataset import LabelledImages, training_batches
from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.segmentation.training.noised_input import NoisedInput
from guided_diffusion.segmentation.visuals.render import plot_curves
from guided_diffusion.stepper import Stepper, warmup_cosine

# seconds between saves; writing a large network after every short epoch would take longer than it
SAVE_EVERY = 60.0


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
    :param synthetic: further training images.
    :param unlabelled: radiographs without masks, see `consistency.load_unlabelled`.
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
        synthetic: LabelledImages | None = None,
        unlabelled: LabelledImages | None = None,
    ):
        self.model = model
        self.config = config
        self.settings = settings
        self.train = train
        self.val = val
        self.folder = folder
        self.origin = origin
        self.noised_input = noised_input
        self.synthetic = synthetic
        self.device = next(model.parameters()).device
        swaps = parse_swaps(settings.flip_swap)
        self.augmentation = augment.Augmentation(settings.augmentation, settings.flip, swaps)
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
        self.consistency = None
        if unlabelled is not None:
            self.consistency = Consistency(
                unlabelled,
                settings.unlabeled_batch_size,
                settings.confidence,
                settings.unlabeled_weight,
                round(settings.unlabeled_ramp * self.length.steps),
                settings.seed,
                settings.flip,
                swaps,
            )
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
            self.synthetic,
            self.settings.synthetic_weight,
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
            if self.consistency is not None:
                self._learn_unlabelled(step, self.consistency)
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

    def _learn_unlabelled(self, step: int, consistency: Consistency) -> None:
        """Add the gradients of a batch of radiographs without masks."""
        views = consistency.views(step)
        size = self._forward_size()
        for first in range(0, len(views[0]), size):
            weak, strong, masks = (view[first : first + size].to(self.device) for view in views)
            with self._kept_network() as teacher, th.no_grad(), self.stepper.autocast():
                labels = consistency.labels(teacher(weak), masks)
            th.manual_seed(rng.derive_seed(self.settings.seed, "unlabelled dropout", step, first))
            with self.stepper.autocast():
                scores = self.stepper.model(strong)
            loss = consistency_loss(scores, labels)
            share = consistency.weight(step) * len(weak) / len(views[0])
            self.stepper.backward(loss * share)
            logger.logkv_mean("unlabeled_loss", loss.detach())
            logger.logkv_mean("unlabeled_sure", (labels != IGNORE).float().mean())

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
