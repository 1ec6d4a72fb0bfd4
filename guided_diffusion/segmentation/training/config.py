"""The flags of the scripts that learn to segment."""

import dataclasses

from guided_diffusion.images.masks import BINARY_HELP, MaskRule
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.checkpoint_flags import (
    FROM_CHECKPOINT,
    IN_SHAPES,
    OF_TRAINING,
    network_part,
    process_part,
)
from guided_diffusion.networks.conditional import MaskDiffusionConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.runtime.command_line.flags import flag
from guided_diffusion.runtime.command_line.instead import add_instead
from guided_diffusion.runtime.command_line.parsing import CommandParser, Part, make_parser
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.training.folders import Folders
from guided_diffusion.segmentation.training.learning import (
    FLIPS,
    LEVELS,
    FinetuneConfig,
    LearningConfig,
)
from guided_diffusion.training.config import InitTrainConfig, RunFolderConfig, TrainConfig

NETWORKS = ("smp", "unet", "features")
# default folders
TRAIN_FOLDERS = ("data/imgs", "data/masks")
# flags of loading images that are not all read at the start
_LOADING = ("num_workers", "cache")


@dataclasses.dataclass(frozen=True)
class BaselineConfig(LearningConfig):
    """Training a baseline."""

    TITLE = "Training a baseline"
    SECTION = "baseline"

    network: str = flag(
        "smp",
        "smp: the U-Net of segmentation_models_pytorch; unet: this package's U-Net, randomly"
        " initialised; features: a pixel classifier on frozen features of a diffusion network",
        choices=NETWORKS,
        basic=True,
    )
    checkpoint: str = flag(
        "",
        "pretrained diffusion network: images are read as it read them; unet copies its"
        " architecture, features uses its weights",
        basic=True,
    )
    load: str = flag("", "segmentation model to continue training", "-f")
    scale: float = flag(
        0.5,
        "input size as a fraction of the largest image, unless --image_size, --load or"
        " --checkpoint sets it",
        "-s",
        above=0,
        most=1,
    )
    validation: float = flag(
        0.0,
        "percentage of the training images held out for validation",
        "-v",
        least=0,
        below=100,
    )
    amp: bool = flag(False, "mixed precision (fp16) on a GPU; see --precision")
    encoder: str = flag("resnet34", "encoder of the smp network", basic=True)
    encoder_weights: str = flag(
        "none",
        "imagenet (downloaded; that of tu-tf_efficientnet_lite0 comes with the extra [imagenet]), a"
        " weights file, or none",
        metavar="NAME",
    )
    feature_blocks: str = flag(
        "",
        "decoder blocks whose outputs are the features, 0 being the deepest; '': the last at 1/8,"
        " 1/4 and 1/2 of the image's size",
    )
    feature_timesteps: str = flag(
        "", "diffusion steps at which features are taken; '': 5, 15 and 25 % of all steps"
    )
    shared_head: bool = flag(
        False, "share one classifier between timesteps, averaging its probabilities over them"
    )


@dataclasses.dataclass(frozen=True)
class MaskTrainConfig(InitTrainConfig):
    """Training."""

    init_checkpoint: str = flag(
        "",
        "pretrained network to start from, model*.pt or ema_*.pt; '': random",
        "--checkpoint",
        basic=True,
    )
    max_steps: int = flag(
        0, "steps after which training ends; 0: lr_anneal_steps", "--steps", least=0, basic=True
    )
    categories: str = flag(
        "",
        "class table (JSON); '': flags/categories.json if it has as many classes as the masks",
        basic=True,
    )
    binary: bool = flag(False, BINARY_HELP)
    mask_threshold: int = flag(
        -1,
        "two classes: grey levels of masks, 0 to 255, above this are foreground; -1: see binary",
        least=-1,
        most=255,
    )
    ignore_index: int = flag(
        -1,
        "mask value of pixels without a label, trained as background; -1: as the class table",
        least=-1,
        most=2**16 - 1,
    )
    train_names: str = flag(
        "", "train on these images only: comma-separated file names without extension"
    )
    augmentation: str = flag(
        "medium", "strength of the augmentation of image and mask", choices=LEVELS
    )
    flip: str = flag("none", "mirror half of the images", choices=FLIPS)
    flip_swap: str = flag(
        "",
        "classes to exchange in images mirrored left to right, such as 1:2,5:6, or none",
    )
    weights_save: str = flag(
        "",
        "where to save the segmentation model, with checkpoints in NAME_logs; '': segm.pth in the"
        " run's folder",
        basic=True,
    )
    visualize_process: bool = flag(
        False, "with each grid of samples, show noise turning into a mask: process_N.png and .gif"
    )

    def rule(self, table: ClassTable) -> MaskRule:
        """What the values of the masks mean."""
        return table.mask_rule(
            self.binary or self.mask_threshold >= 0,
            self.mask_threshold if self.mask_threshold >= 0 else None,
        )


@dataclasses.dataclass(frozen=True)
class MaskProcessConfig(DiffusionConfig):
    """The diffusion process of the masks."""

    # the radiograph, present at every timestep, determines most of the mask
    predict_xstart: bool = flag(True, "predict the mask itself instead of the noise")


def finetune_flags(description: str = "") -> CommandParser:
    """The parser of scripts/finetune.py."""
    parser = make_parser(
        description,
        FinetuneConfig,
        Part(
            ReadingConfig,
            default=FROM_CHECKPOINT,
            defaults={"resize": "pad; squash if the pretraining used it"},
            ignored=["in_channels"],
            basic=["image_size", "resize"],
        ),
        network_part(ModelConfig, IN_SHAPES),
        process_part(["timestep_respacing", "predict_xstart", *OF_TRAINING, *IN_SHAPES]),
        Part(TrainConfig, ignored=True),
        ProcessConfig,
    )
    parser.add_argument("checkpoint", help="pretrained network: model*.pt or ema_*.pt")
    add_instead(parser, "checkpoint", "--checkpoint")
    Folders.add_to(parser)
    return parser


def baseline_flags(description: str = "") -> CommandParser:
    """The parser of scripts/baseline_train.py."""
    parser = make_parser(
        description,
        BaselineConfig,
        Part(
            ReadingConfig,
            defaults={
                "image_size": "by --scale, --load or --checkpoint",
                "in_channels": "from the images",
                "resize": "pad; as --load or --checkpoint read",
            },
            basic=["image_size"],
        ),
        Part(
            ModelConfig,
            title="Network of --network unet, without --checkpoint",
            ignored=["class_cond", "num_classes", "cond_drop_prob", "learn_sigma"],
            basic=(),
        ),
        ProcessConfig,
    )
    Folders.add_to(parser, default=TRAIN_FOLDERS)
    return parser


def mask_diffusion_flags(description: str = "") -> CommandParser:
    """The parser of scripts/mask_diffusion_train.py."""
    parser = make_parser(
        description,
        Part(
            MaskTrainConfig,
            ignored=["data_dir", "random_flip", "random_crop", "skip_bad_images", *_LOADING],
        ),
        Part(MaskDiffusionConfig, ignored=["class_cond", "num_classes", "cond_drop_prob"]),
        MaskProcessConfig,
        Part(ReadingConfig, defaults={"resize": "pad"}),
        RunFolderConfig,
        ProcessConfig,
    )
    Folders.add_to(parser)
    return parser
