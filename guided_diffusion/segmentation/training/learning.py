"""How a network learns from a few labels: the flags, and how long a run is."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import flag
from guided_diffusion.segmentation.training import augment, losses

# the learning rate found best for a pretrained network of this width; Adam's best one falls in
# proportion as the width grows (arXiv 2203.03466, table 3)
_LR, _LR_WIDTH = 1e-3, 32
# of a run whose length is given in steps; more log rows and validations would tell nothing new
_MOST_EPOCHS = 100


@dataclasses.dataclass(frozen=True)
class LearningConfig:
    """Learning from a few labels."""

    TITLE = "Training"

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
    lr: float = flag(_LR, "highest learning rate of AdamW", "-l", "--learning-rate")
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
    synthetic_dir: str = flag("", "folder with IMG and MASK, of further images to train on")
    synthetic_weight: float = flag(0.5, "share of the training images that come from there")
    unlabeled_dir: str = flag(
        "", "radiographs without masks, to learn what the averaged weights are sure of"
    )
    unlabeled_weight: float = flag(1.0, "of the loss on them")
    unlabeled_batch_size: int = flag(4, "radiographs without masks a step")
    unlabeled_ramp: float = flag(0.3, "share of the steps in which that weight rises from 0")
    confidence: float = flag(0.9, "probability from which a class is taken as sure")
    weights_save: str = flag("segm.pth", "file for the best network")
    max_grad_norm: float = flag(1.0, "2-norm to which longer gradients are cut; 0: never")
    precision: str = flag("", "fp32, fp16 or bf16; '': as use_fp16 says")
    val_interval: int = flag(1, "epochs between validations")
    seed: int = flag(0, "of fresh weights, order and augmentation")
    max_skipped_steps: int = flag(100, "not finite gradients in a row that end the run; 0: never")
    wandb: bool = flag(False, "also log to Weights & Biases, which must be installed (pip)")
    resume_checkpoint: str = flag("", "'' or auto: go on where it stopped; none: start again")

    # values of a subclass's flags that must be a share between 0 and 1, or not below 0
    SHARES: ClassVar[tuple[str, ...]] = ("warmup", "unlabeled_ramp", "confidence")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        *("steps", "lr", "head_lr_scale", "weight_decay", "unlabeled_weight"),
    )

    def check(self) -> None:
        """:raises UserError: for values out of range."""
        for name in ("epochs", "batch_size", "val_interval", "unlabeled_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in self.SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: a share between 0 and 1")
        for name in self.NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be below 0")
        if not 0 < self.synthetic_weight < 1:
            raise UserError(f"--synthetic_weight {self.synthetic_weight}: between 0 and 1")
        if self.unlabeled_dir and not self.ema_rate:
            raise UserError("--unlabeled_dir needs averaged weights: give --ema_rate, such as 0.99")
        if not 0 <= self.ema_rate < 1:
            raise UserError(f"--ema_rate {self.ema_rate}: from 0 to below 1, such as 0.99")

    def length(self, images: int) -> "Length":
        """How long a run on that many images is."""
        share = self.synthetic_weight if self.synthetic_dir else 0.0
        epoch = math.ceil(images / (self.batch_size * (1 - share)))
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

    TITLE = "Fine-tuning"

    lr: float = flag(
        0.0,
        f"highest learning rate of AdamW; 0: {_LR} for networks up to {_LR_WIDTH} channels wide,"
        " less in proportion for wider ones",
        "-l",
        "--learning-rate",
    )
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

    SHARES: ClassVar[tuple[str, ...]] = (
        *LearningConfig.SHARES,
        "unfreeze_decoder",
        "unfreeze_encoder",
    )

    def for_width(self, channels: int) -> "FinetuneConfig":
        """With the learning rate of a network that wide, unless one is given."""
        lr = self.lr or _LR * min(1.0, _LR_WIDTH / channels)
        return dataclasses.replace(self, lr=lr)

    def check(self) -> None:
        super().check()
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"--layer_decay {self.layer_decay}: above 0, to 1 for no decay")
