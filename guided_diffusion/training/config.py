"""The flags of pretraining."""

import dataclasses

from guided_diffusion.runtime.command_line.flags import MOST_BATCH, flag
from guided_diffusion.runtime.command_line.loop_config import LoopConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training images."""

    data_dir: str = flag(
        "", "folder of images, searched recursively; or a glob pattern", basic=True
    )
    random_flip: bool = flag(
        False, "mirror images with probability 0.5; left becomes right", basic=True
    )
    random_crop: bool = flag(False, "crop to 80-100 % of the image at a random position")
    num_workers: int = flag(
        -1,
        "data loader processes per rank; -1: by the CPU cores per rank on CUDA, 0 on the CPU",
        least=-1,
        most=1024,
    )
    cache: str = flag("auto", "keep decoded images in memory", choices=("auto", "ram", "none"))
    skip_bad_images: bool = flag(False, "skip unreadable images, listing them in the log")


@dataclasses.dataclass(frozen=True)
class RunFolderConfig:
    """Where a training keeps its files."""

    TITLE = "Run folder"

    output: str = flag(
        "",
        "folder of checkpoints, samples and logs; '': OPENAI_LOGDIR, or runs/DATE-TIME",
        "-o",
        basic=True,
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(LoopConfig, DataConfig):
    """Training."""

    TITLE = "Training"
    SECTION = "train"

    global_batch_size: int = flag(
        0, "images per step over all ranks, instead of batch_size", least=0
    )
    schedule_sampler: str = flag(
        "uniform", "timestep sampling: uniform or loss-second-moment", metavar="NAME"
    )
    wandb: bool = flag(False, "also log to Weights & Biases (pip install wandb)")


@dataclasses.dataclass(frozen=True)
class InitTrainConfig(TrainConfig):
    """Training that may begin from a trained network."""

    init_checkpoint: str = flag(
        "",
        "trained network to begin from, whose flags are then known: model*.pt or ema_*.pt, of"
        " another run or of the original package; '': random weights",
        "--checkpoint",
        basic=True,
    )


@dataclasses.dataclass(frozen=True)
class PretrainConfig(InitTrainConfig):
    """Training on images alone."""

    TITLE = "Training on images alone"

    align_encoder: str = flag(
        "",
        "also train the features to predict an ImageNet encoder's (arXiv 2410.06940):"
        " efficientnet-lite0, whose weights a package holds, or one of timm's, which downloads"
        " them; '': no alignment",
    )
    align_weight: float = flag(
        0.5, "weight of the distance to the encoder's features, 0 to 2, in the loss", least=0
    )


@dataclasses.dataclass(frozen=True)
class GuidedTrainConfig(InitTrainConfig):
    """Training."""

    seg_dir: str = flag(
        "",
        "folder of the masks, named like their images; or one with all/ or train/ inside",
    )
    ignore_index: int = flag(
        -1,
        "value of mask pixels without a label, which count as background; -1: none",
        least=-1,
        most=2**16 - 1,
    )
    flip_swap: str = flag(
        "", "classes to exchange in masks that --random_flip mirrors, such as 1:2,5:6, or none"
    )
    dry_run: bool = flag(
        False,
        "report hours, memory, disk and seconds per step for these flags, without training",
        basic=True,
    )


@dataclasses.dataclass(frozen=True)
class ClassifierTrainConfig(TrainConfig):
    """Training; the class of an image is its file's name up to the first underscore."""

    val_data_dir: str = flag(
        "", "folder of held-out images to evaluate on; '': no evaluation", basic=True
    )
    noised: bool = flag(True, "train on images at all noise levels, as guidance requires")
    iterations: int = flag(150000, "steps after which training ends", least=1, basic=True)
    anneal_lr: bool = flag(False, "the learning rate falls linearly to 0 over the iterations")
    eval_interval: int = flag(5, "steps between evaluations on one held-out batch", least=1)
    lr: float = flag(3e-4, "learning rate of AdamW", least=0, basic=True)
    batch_size: int = flag(4, "images per rank per step", least=1, most=MOST_BATCH, basic=True)
    ema_rate: float | str = flag(
        "", "decay rates of exponential moving averages of the weights, comma-separated; '': none"
    )
    # not flags: derived from those above, or meaningless here
    max_steps: int = dataclasses.field(init=False, default=0)
    lr_anneal_steps: int = dataclasses.field(init=False, default=0)
    sample_interval: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_steps", self.iterations)
        object.__setattr__(self, "lr_anneal_steps", self.iterations if self.anneal_lr else 0)
