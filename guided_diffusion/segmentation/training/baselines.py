"""Baselines to compare with fine-tuning: other networks, the same images and training loop."""

import copy
import dataclasses
from typing import Any

import numpy as np
import torch as th

from guided_diffusion.image_datasets import sample_is_grey
from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model
from guided_diffusion.segmentation.networks.decoder_features import block_scales
from guided_diffusion.segmentation.networks.feature_classifier import (
    FeatureClassifier,
    blocks_by_scale,
    existing_blocks,
)
from guided_diffusion.segmentation.networks.feature_classifier import build as build_features
from guided_diffusion.segmentation.training.config import TRAIN_FOLDERS, BaselineConfig
from guided_diffusion.segmentation.training.dataset import LabelledImages
from guided_diffusion.segmentation.training.folders import Folders
from guided_diffusion.segmentation.training.job import (
    TrainingRun,
    read_data,
    reading_of_pairs,
)
from guided_diffusion.segmentation.training.loop import InitialNetwork
from guided_diffusion.segmentation.training.smp_network import smp_network
from guided_diffusion.segmentation.training.start import start

# input sizes derived from --scale are rounded up to this many pixels, which suits every network
_MULTIPLE = 32
# of decoder blocks, as fractions of the image's size: 1/8, 1/4 and 1/2
_FEATURE_SCALES = (8, 4, 2)
# of 1000 steps (arXiv 2112.03126, section 3)
_FEATURE_TIMESTEPS = (50, 150, 250)


def prepare(overrides: Overrides) -> TrainingRun | None:
    """Check everything, then build the run.

    :param overrides: the flags and arguments that the user gave.
    :return: None if the run is complete already.
    :raises UserError: for whatever the user must correct, before anything is written.
    """
    settings = from_flags(BaselineConfig, overrides)
    settings.check()
    run_lock.hold_file(settings.weights_save, "choose another --weights_save")
    folders = Folders.from_flags(overrides, default=TRAIN_FOLDERS)
    if folders.val and settings.validation:
        raise UserError("--validation holds out training images: omit either the flag or VAL_IMG")
    loaded = load_model(settings.load) if settings.load else None
    pretrained = (
        read_trained(settings.checkpoint, overrides, for_tuning=True)
        if settings.checkpoint
        else None
    )
    reading, about_reading = _reading(
        settings, folders.train, overrides, loaded and loaded[1], pretrained
    )
    data = read_data(settings, folders, reading)
    if settings.validation:
        train, val = split(data.train, settings.validation, settings.seed)
        train.require_foreground(f"{folders.train[1]} without the images held out")
        val.require_foreground(f"{folders.train[1]}, the images held out with --seed")
        data = dataclasses.replace(data, train=train, val=val)

    def build(settings: BaselineConfig) -> InitialNetwork:
        initial = _initial_network(
            settings, overrides, reading, data.categories, loaded, pretrained
        )
        trainable = sum(p.numel() for p in initial.model.parameters() if p.requires_grad)
        about_model = f"{initial.config.kind}: {trainable} trainable parameters"
        messages = [*initial.messages, *about_reading, about_model]
        return dataclasses.replace(initial, messages=messages)

    weights = settings.encoder_weights if settings.network == "smp" else ""
    sources = {
        "checkpoint": settings.checkpoint,
        "load": settings.load,
        "encoder_weights": weights,
    }
    use_fp16 = settings.amp or bool(overrides.get("use_fp16"))
    return start(build, settings, data, sources, use_fp16)


def _initial_network(
    settings: BaselineConfig,
    overrides: Overrides,
    reading: ReadingConfig,
    categories: ClassTable,
    loaded: tuple[th.nn.Module, SegmentationConfig, dict[str, Any]] | None,
    pretrained: Trained[ModelConfig] | None,
) -> InitialNetwork:
    """The network of --load or --network before its first step."""
    th.manual_seed(settings.seed)
    if loaded is not None:
        model, config, _ = loaded
        initial = _continue(settings, overrides, copy.deepcopy(model), config, len(categories))
    else:
        config = SegmentationConfig(None, reading, categories)
        build = {"smp": _smp, "unet": _unet, "features": _features}[settings.network]
        initial = build(config, settings, overrides, pretrained)
    model = initial.model
    unchanged = settings.augmentation == settings.flip == "none"
    unchanged = unchanged and settings.pseudo_augmentation in ("same", "none")
    if isinstance(model, FeatureClassifier) and unchanged:
        model.remember_features()
    return initial


def split(data: LabelledImages, percent: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Hold out a random `percent` of the images, at least one.

    :return: the images to train on and those to validate on.
    :raises UserError: if none are left to train on.
    """
    order = np.random.default_rng(rng.derive_seed(seed, "validation")).permutation(len(data))
    count = max(1, round(len(data) * percent / 100))
    if count >= len(data):
        raise UserError(
            f"--validation {percent}: leaves none of the {len(data)} images for training"
        )
    return data.choose(sorted(order[count:])), data.choose(sorted(order[:count]))


def _reading(
    settings: BaselineConfig,
    train_dirs: tuple[str, str],
    overrides: Overrides,
    loaded: SegmentationConfig | None,
    pretrained: Trained[ModelConfig] | None,
) -> tuple[ReadingConfig, list[str]]:
    """How to read images: as --load or --checkpoint did, or else to suit the images.

    :return: also lines for the log.
    """
    if loaded is not None:
        return from_flags(ReadingConfig, overrides, loaded.reading), []
    if pretrained is not None:
        return reading_of_pairs(pretrained.reading, overrides)
    paths = [image for _, image, _ in pair_files(*train_dirs)]
    suited: dict[str, Any] = {"resize": "pad"}
    if "in_channels" not in overrides:
        suited["in_channels"] = 1 if sample_is_grey(paths) else 3
    if "image_size" not in overrides:
        sizes = np.array([read_image(path, 1).shape for path in paths])
        sides = np.ceil(settings.scale * sizes.max(axis=0) / _MULTIPLE).astype(int) * _MULTIPLE
        suited["image_size"] = tuple(sides.tolist())
    return from_flags(ReadingConfig, {**suited, **overrides}), []


def _smp(
    config: SegmentationConfig,
    settings: BaselineConfig,
    overrides: Overrides,
    pretrained: Trained[ModelConfig] | None,
) -> InitialNetwork:
    return smp_network(config, settings.encoder, settings.encoder_weights, settings.head_lr_scale)


def _unet(
    config: SegmentationConfig,
    settings: BaselineConfig,
    overrides: Overrides,
    pretrained: Trained[ModelConfig] | None,
) -> InitialNetwork:
    if pretrained is not None:
        network = dataclasses.replace(pretrained.model, use_fp16=False)
    else:
        size = config.reading.image_size
        own = {
            "image_size": max(size) if isinstance(size, tuple) else size,
            "in_channels": config.in_channels,
            "use_fp16": False,
        }
        network = from_flags(ModelConfig, {**overrides, **own}).with_explicit_channel_mult()
    config = dataclasses.replace(config, model=network)
    messages = ["this package's U-Net, randomly initialised"]
    return InitialNetwork(config.build(), config, messages=messages)


def _features(
    config: SegmentationConfig,
    settings: BaselineConfig,
    overrides: Overrides,
    pretrained: Trained[ModelConfig] | None,
) -> InitialNetwork:
    if pretrained is None:
        raise UserError("--network features needs --checkpoint: a pretrained diffusion network")
    if pretrained.model.class_cond:
        raise UserError(
            f"{pretrained.path} is class-conditional: --network features needs an unconditional one"
        )
    network = dataclasses.replace(pretrained.model, use_fp16=False)
    scales = block_scales(len(network.mult()), network.num_res_blocks + 1)
    wanted = blocks_by_scale(scales, _FEATURE_SCALES)
    if settings.feature_blocks:
        wanted = _integers("feature_blocks", settings.feature_blocks)
    blocks = existing_blocks(wanted, len(scales))
    steps = pretrained.diffusion.diffusion_steps
    timesteps = [round(t * steps / 1000) for t in _FEATURE_TIMESTEPS]
    if settings.feature_timesteps:
        timesteps = _integers("feature_timesteps", settings.feature_timesteps)
    if not all(0 <= t < steps for t in timesteps):
        raise UserError(
            f"--feature_timesteps {settings.feature_timesteps}: the diffusion has the steps 0 to"
            f" {steps - 1}"
        )
    options = {
        "diffusion": dataclasses.asdict(pretrained.diffusion),
        "blocks": blocks,
        "timesteps": timesteps,
        "shared_head": settings.shared_head,
        "noise_seed": 0,
    }
    config = dataclasses.replace(config, model=network, kind="features", options=options)
    model = build_features(config)
    model.backbone.load_state_dict(pretrained.weights)
    missing = [block for block in wanted if block not in blocks]
    parts = ", ".join(f"{block} (1/{scales[block]} of the image)" for block in blocks)
    message = f"features of decoder blocks {parts}, of {len(scales)}"
    if missing:
        message += f"; not available: {', '.join(map(str, missing))}"
    message += f"; timesteps {', '.join(map(str, timesteps))} of {steps}"
    return InitialNetwork(model, config, messages=[message])


def _continue(
    settings: BaselineConfig,
    overrides: Overrides,
    model: th.nn.Module,
    config: SegmentationConfig,
    classes: int,
) -> InitialNetwork:
    if settings.network != config.kind and "network" in overrides:
        raise UserError(
            f"--load {settings.load} holds a network of kind {config.kind}, not {settings.network}"
        )
    if len(config.categories) != classes:
        raise UserError(
            f"--load {settings.load} has {len(config.categories)} classes, the masks have"
            f" {classes}: pass --out_channels if the classes are the same"
        )
    return InitialNetwork(model, config, messages=[f"starting from {settings.load}"])


def _integers(name: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise UserError(f"--{name} {text}: expected comma-separated integers")
    return found
