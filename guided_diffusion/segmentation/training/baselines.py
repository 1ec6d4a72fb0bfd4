"""Networks to compare with, trained by the same loop on the same images as a fine-tuned one."""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th

from guided_diffusion.image_datasets import sample_is_grey
from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import flag, from_flags, make_parser
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model
from guided_diffusion.segmentation.networks.feature_classifier import (
    FeatureClassifier,
    existing_blocks,
)
from guided_diffusion.segmentation.training.dataset import LabelledImages
from guided_diffusion.segmentation.training.finetune import Finetuner
from guided_diffusion.segmentation.training.layers import parameter_groups
from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.segmentation.training.setup import (
    Plan,
    add_validation_folders,
    begin,
    load_data,
    validation_folders,
)

NETWORKS = ("smp", "unet", "features")
# sides of images read at a share of their own size are multiples of this, which suits all networks
_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class BaselineConfig(LearningConfig):
    """Training a baseline."""

    network: str = flag(
        "smp",
        "segmentation_models_pytorch's U-Net, this package's from random weights, or a pixel"
        " classifier on frozen features of a diffusion network",
        choices=NETWORKS,
    )
    checkpoint: str = flag(
        "", "pretrained diffusion network: images are read as for it; unet has its architecture"
    )
    load: str = flag("", "model file to go on from: its network and its weights", "-f")
    scale: float = flag(
        0.5, "size of the images the network sees, unless --image_size or a file tells it", "-s"
    )
    validation: float = flag(0.0, "percent of the training images to validate on instead", "-v")
    amp: bool = flag(False, "mixed precision: fp16 on a GPU")
    encoder: str = flag("resnet34", "of the smp network")
    encoder_weights: str = flag("none", "imagenet (fetched), a file of weights, or none")
    feature_blocks: str = flag(
        "5,6,7,8,12", "decoder blocks whose outputs are features; 0: deepest"
    )
    feature_timesteps: str = flag(
        "50,150,250", "timesteps of the noised images, of 1000; scaled to other diffusions"
    )
    shared_head: bool = flag(False, "one classifier for all timesteps, its results averaged")

    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*LearningConfig.NOT_NEGATIVE, "validation")

    def check(self) -> None:
        super().check()
        if not 0 < self.scale <= 1:
            raise UserError(f"--scale {self.scale}: above 0, to 1 for the images' own size")
        if not self.validation < 100:
            raise UserError(f"--validation {self.validation}: percent, below 100")


@dataclasses.dataclass
class Baseline:
    """A network with its first weights.

    fresh: names of its parameters that are not pretrained; None where none is.
    """

    model: th.nn.Module
    config: SegmentationConfig
    fresh: set[str] | None = None
    message: str = ""


def make_flags(description: str = "") -> argparse.ArgumentParser:
    """The parser of scripts/baseline_train.py."""
    parser = make_parser(description, BaselineConfig, ReadingConfig, ModelConfig)
    parser.add_argument("train_img", nargs="?", help="folder of radiographs (default: data/imgs)")
    parser.add_argument("train_mask", nargs="?", help="folder of masks (default: data/masks)")
    add_validation_folders(parser)
    return parser


def prepare_given(overrides: Mapping[str, Any]) -> Finetuner | None:
    """Check everything, then build the run; None if it is complete already."""
    settings = from_flags(BaselineConfig, overrides)
    settings.check()
    if ("train_img" in overrides) != ("train_mask" in overrides):
        raise UserError("TRAIN_IMG is given without TRAIN_MASK: give both folders or neither")
    train_dirs = (
        overrides.get("train_img", "data/imgs"),
        overrides.get("train_mask", "data/masks"),
    )
    val_dirs = validation_folders(overrides)
    if val_dirs and settings.validation:
        raise UserError("--validation takes from the training images; VAL_IMG is given as well")
    start = load_model(settings.load) if settings.load else None
    pretrained = (
        read_trained(settings.checkpoint, overrides, for_tuning=True)
        if settings.checkpoint
        else None
    )
    reading = _reading(settings, train_dirs, overrides, start and start[1], pretrained)
    categories, train, val = load_data(settings, train_dirs, val_dirs, reading)
    if settings.validation:
        train, val = split(train, settings.validation, settings.seed)
    th.manual_seed(settings.seed)
    if start is not None:
        baseline = _loaded(settings, overrides, start, len(categories))
    else:
        config = SegmentationConfig(None, reading, categories)
        baseline = {"smp": _smp, "unet": _unet, "features": _features}[settings.network](
            config, settings, overrides, pretrained
        )
    groups = None
    if baseline.fresh is not None:
        groups = parameter_groups(baseline.model, 1.0, baseline.fresh, settings.head_lr_scale)
    model = baseline.model
    if isinstance(model, FeatureClassifier) and settings.augmentation == settings.flip == "none":
        model.remember_features()
    parameters = sum(p.numel() for p in baseline.model.parameters() if p.requires_grad)
    messages = [baseline.message, f"{baseline.config.kind}: {parameters} parameters train"]
    source = os.path.basename(settings.load or settings.checkpoint)
    plan = Plan(baseline.model, baseline.config, settings, train, val, source, messages, groups)
    return begin(plan, settings.amp or bool(overrides.get("use_fp16")))


def split(data: LabelledImages, percent: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Images to train on and, `percent` of them but at least one, to validate on."""
    order = np.random.default_rng(rng.derive_seed(seed, "validation")).permutation(len(data))
    count = max(1, round(len(data) * percent / 100))
    if count >= len(data):
        raise UserError(f"--validation {percent}: leaves none of {len(data)} images to train on")
    return data.choose(sorted(order[count:])), data.choose(sorted(order[:count]))


def _reading(
    settings: BaselineConfig,
    train_dirs: tuple[str, str],
    overrides: Mapping[str, Any],
    start: SegmentationConfig | None,
    pretrained: Trained[ModelConfig] | None,
) -> ReadingConfig:
    """As the file to start from was read, else as the flags say, else as suits the images."""
    if start is not None:
        return from_flags(ReadingConfig, overrides, start.reading)
    if pretrained is not None:
        reading = dataclasses.replace(pretrained.reading, resize="pad")
        return from_flags(ReadingConfig, overrides, reading)
    paths = [image for _, image, _ in pair_files(*train_dirs)]
    found: dict[str, Any] = {"resize": "pad"}
    if "in_channels" not in overrides:
        found["in_channels"] = 1 if sample_is_grey(paths) else 3
    if "image_size" not in overrides:
        sizes = np.array([read_image(path, 1).shape for path in paths])
        sides = np.ceil(settings.scale * sizes.max(axis=0) / _MULTIPLE).astype(int) * _MULTIPLE
        found["image_size"] = tuple(sides.tolist())
    return from_flags(ReadingConfig, {**found, **overrides})


def _smp(
    config: SegmentationConfig,
    settings: BaselineConfig,
    overrides: Mapping[str, Any],
    pretrained: Trained[ModelConfig] | None,
) -> Baseline:
    from guided_diffusion.segmentation.networks.smp_unet import SmpUnet

    weights = settings.encoder_weights
    is_file = weights not in ("", "none") and (os.path.exists(weights) or "." in weights)
    name = None if is_file or weights in ("", "none") else weights
    model = SmpUnet(settings.encoder, config.in_channels, len(config.categories), name)
    if is_file:
        model.load_encoder(weights)
    config = dataclasses.replace(config, kind="smp", options={"encoder": settings.encoder})
    message = f"smp U-Net with encoder {settings.encoder}, weights {weights or 'none'}"
    if weights in ("", "none"):
        return Baseline(model, config, None, message)
    names = {n for n, _ in model.named_parameters() if not n.startswith("network.encoder.")}
    return Baseline(model, config, names, message)


def _unet(
    config: SegmentationConfig,
    settings: BaselineConfig,
    overrides: Mapping[str, Any],
    pretrained: Trained[ModelConfig] | None,
) -> Baseline:
    if pretrained is not None:
        model = dataclasses.replace(pretrained.model, use_fp16=False)
    else:
        size = config.reading.image_size
        own = {
            "image_size": max(size) if isinstance(size, tuple) else size,
            "in_channels": config.in_channels,
            "use_fp16": False,
        }
        model = from_flags(ModelConfig, {**overrides, **own}).with_explicit_channel_mult()
    config = dataclasses.replace(config, model=model)
    return Baseline(config.build(), config, None, "this package's U-Net from random weights")


def _features(
    config: SegmentationConfig,
    settings: BaselineConfig,
    overrides: Mapping[str, Any],
    pretrained: Trained[ModelConfig] | None,
) -> Baseline:
    if pretrained is None:
        raise UserError("--network features needs --checkpoint, the pretrained diffusion network")
    if pretrained.model.class_cond:
        raise UserError(
            f"{pretrained.path} is class-conditional: features need a network without classes"
        )
    network = dataclasses.replace(pretrained.model, use_fp16=False)
    wanted = _integers("feature_blocks", settings.feature_blocks)
    levels = len(network.mult())
    count = levels * (network.num_res_blocks + 1)
    blocks = existing_blocks(wanted, count)
    steps = pretrained.diffusion.diffusion_steps
    timesteps = _integers("feature_timesteps", settings.feature_timesteps)
    if not all(0 <= t < 1000 for t in timesteps):
        raise UserError(f"--feature_timesteps {settings.feature_timesteps}: from 0 to 999, of 1000")
    options = {
        "diffusion": dataclasses.asdict(pretrained.diffusion),
        "blocks": blocks,
        "timesteps": [min(round(t * steps / 1000), steps - 1) for t in timesteps],
        "shared_head": settings.shared_head,
        "noise_seed": 0,
    }
    config = dataclasses.replace(config, model=network, kind="features", options=options)
    model = config.build()
    model.backbone.load_state_dict(pretrained.weights)
    model.backbone.requires_grad_(False)
    missing = [block for block in wanted if block not in blocks]
    message = f"features of decoder blocks {', '.join(map(str, blocks))} of {count}"
    if missing:
        message += f"; it has no {', '.join(map(str, missing))}"
    message += f"; timesteps {', '.join(map(str, options['timesteps']))} of {steps}"
    return Baseline(model, config, None, message)


def _loaded(
    settings: BaselineConfig,
    overrides: Mapping[str, Any],
    start: tuple[th.nn.Module, SegmentationConfig, dict[str, Any]],
    classes: int,
) -> Baseline:
    model, config, _ = start
    if settings.network != config.kind and "network" in overrides:
        raise UserError(
            f"--load {settings.load} holds a network of kind {config.kind}, not {settings.network}"
        )
    if len(config.categories) != classes:
        raise UserError(
            f"--load {settings.load} has {len(config.categories)} classes, the masks {classes}:"
            " give --out_channels if they are the same"
        )
    return Baseline(model, config, None, f"going on from {settings.load}")


def _integers(name: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise UserError(f"--{name} {text}: expected whole numbers by commas")
    return found
