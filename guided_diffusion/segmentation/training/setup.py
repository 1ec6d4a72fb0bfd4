"""From flags to a fine-tuning run: the pretrained network, the data, the class table."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import (
    DiffusionConfig,
    ModelConfig,
    network_timestep,
)
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import from_flags, make_parser
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.segmentation.categories import (
    BINARY,
    Category,
    categories_for,
    load_categories,
)
from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.training.consistency import load_unlabelled
from guided_diffusion.segmentation.training.dataset import (
    LabelledImages,
    count_classes,
    load_labelled,
)
from guided_diffusion.segmentation.training.finetune import Finetuner, find_unfinished, start_again
from guided_diffusion.segmentation.training.layers import freeze, parameter_groups
from guided_diffusion.segmentation.training.learning import FinetuneConfig, LearningConfig
from guided_diffusion.segmentation.training.noised_input import NoisedInput, parse_range
from guided_diffusion.training.run import TrainConfig, precision_of

# flags of pretraining that a user may pass along and that mean nothing here
_NO_MEANING = sorted(
    {f.name for f in dataclasses.fields(TrainConfig)}
    - {f.name for f in dataclasses.fields(FinetuneConfig)}
)
# settings that may differ when the same command goes on
_MAY_CHANGE = ("resume_checkpoint", "val_interval", "microbatch", "max_skipped_steps", "wandb")


def make_flags(description: str = "") -> argparse.ArgumentParser:
    """The parser of scripts/finetune.py."""
    parser = make_parser(
        description, FinetuneConfig, ReadingConfig, ModelConfig, DiffusionConfig, TrainConfig
    )
    parser.add_argument("checkpoint", help="pretrained network: model*.pt or ema_*.pt")
    parser.add_argument("train_img", help="folder of radiographs")
    parser.add_argument("train_mask", help="folder of their masks")
    add_validation_folders(parser)
    return parser


def add_validation_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("val_img", nargs="?", help="folder of radiographs to validate on")
    parser.add_argument("val_mask", nargs="?", help="folder of their masks")


def validation_folders(overrides: Mapping[str, Any]) -> tuple[str, str] | None:
    """:raises UserError: if only one of them is given."""
    if ("val_img" in overrides) != ("val_mask" in overrides):
        raise UserError("VAL_IMG is given without VAL_MASK: give both folders or neither")
    return (overrides["val_img"], overrides["val_mask"]) if "val_img" in overrides else None


def prepare_given(overrides: Mapping[str, Any]) -> Finetuner | None:
    """`prepare` from all that was given to scripts/finetune.py."""
    train = (overrides["train_img"], overrides["train_mask"])
    return prepare(overrides["checkpoint"], train, validation_folders(overrides), overrides)


def train(
    prepare: Callable[[Mapping[str, Any]], Finetuner | None], overrides: Mapping[str, Any]
) -> int:
    """What a training script does with its given flags; its exit code."""
    dist_util.setup_dist()
    if dist_util.world_size() > 1:
        raise UserError("fine-tuning a few images runs in one process: start it without a launcher")
    finetuner = prepare(overrides)
    if finetuner is None:
        print("this run is complete: nothing to do")
        return 0
    finetuner.run()
    if finetuner.stopped_by:
        logger.log(f"stopped by {finetuner.stopped_by}: the same command goes on from here")
        return EXIT_STOPPED
    best = finetuner.best
    if finetuner.val:
        logger.log(
            f"best network: epoch {best['epoch']}, mean IoU {best['mean_iou']:.4f},"
            f" mean Dice {best['mean_dice']:.4f} of the foreground"
        )
    curves = os.path.join(finetuner.folder, "curves.png")
    logger.log(f"saved {finetuner.settings.weights_save}; curves in {curves}")
    return 0


@dataclasses.dataclass
class Plan:
    """A run that was checked and has not begun.

    source: name of the pretrained checkpoint, "" for none. messages: for the log.
    """

    model: th.nn.Module
    config: SegmentationConfig
    settings: LearningConfig
    train: LabelledImages
    val: LabelledImages | None
    source: str
    messages: list[str]
    groups: list[dict[str, Any]] | None = None
    noised_input: NoisedInput | None = None


def prepare(
    path: str,
    train_dirs: tuple[str, str],
    val_dirs: tuple[str, str] | None,
    overrides: Mapping[str, Any],
) -> Finetuner | None:
    """Check everything, then build the run; None if it is complete already.

    :param train_dirs: folders of radiographs and of masks.
    :param overrides: the given flags.
    """
    settings = from_flags(FinetuneConfig, overrides)
    settings.check()
    pretrained: Trained[ModelConfig] = read_trained(path, overrides, for_tuning=True)
    settings = settings.for_width(pretrained.model.num_channels)
    reading = dataclasses.replace(pretrained.reading, resize="pad")
    wanted = {k: v for k, v in overrides.items() if k != "in_channels"}
    reading = from_flags(ReadingConfig, wanted, reading)
    categories, train, val = load_data(settings, train_dirs, val_dirs, reading)
    diffusion = pretrained.diffusion
    config = SegmentationConfig(
        model=from_flags(
            ModelConfig,
            {k: overrides[k] for k in ("dropout", "use_checkpoint") if k in overrides},
            dataclasses.replace(pretrained.model, use_fp16=False),
        ),
        reading=reading,
        categories=categories,
        depth=settings.depth or None,
        timestep=network_timestep(settings.timestep, diffusion),
    )
    span = parse_range(settings.timestep_range, diffusion.diffusion_steps)
    noised_input = None
    if span is not None or settings.noise_at_timestep:
        noised_input = NoisedInput(
            diffusion, settings.timestep, span, settings.noise_at_timestep, settings.seed
        )
    th.manual_seed(settings.seed)
    model = config.build()
    if settings.random_init:
        messages = ["random weights: nothing of the checkpoint but its architecture is used"]
        groups = None
    else:
        try:
            report = model.load_pretrained(pretrained.weights)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        messages = [f"{path}: {report}"]
        groups = parameter_groups(model, settings.layer_decay, report.fresh, settings.head_lr_scale)
    messages.append(f"learning rate {settings.lr:.3g}")
    frozen = freeze(model, settings.unfreeze_encoder, settings.unfreeze_decoder)
    if frozen:
        messages.append(f"frozen: {', '.join(frozen)}")
    messages += [
        f"--{n} is of pretraining and has no meaning here" for n in _NO_MEANING if n in overrides
    ]
    source = os.path.basename(path)
    plan = Plan(model, config, settings, train, val, source, messages, groups, noised_input)
    return begin(plan, bool(overrides.get("use_fp16")))


def load_data(
    settings: LearningConfig,
    train_dirs: tuple[str, str],
    val_dirs: tuple[str, str] | None,
    reading: ReadingConfig,
) -> tuple[tuple[Category, ...], LabelledImages, LabelledImages | None]:
    """The class table, the training images and those to validate on."""
    categories = _categories(settings, train_dirs, val_dirs)
    names = [name.strip() for name in settings.train_names.split(",") if name.strip()]
    binary = settings.binary
    train = load_labelled(*train_dirs, reading, len(categories), names, binary)
    val = load_labelled(*val_dirs, reading, len(categories), (), binary) if val_dirs else None
    return categories, train, val


def begin(plan: Plan, use_fp16: bool = False) -> Finetuner | None:
    """Find what an earlier run of the same command left; open the logs; None if all is done.

    :param use_fp16: the precision where the settings name none.
    """
    config, settings, train, val = plan.config, plan.settings, plan.train, plan.val
    origin = {
        "checkpoint": plan.source,
        "train": list(train.names),
        "val": list(val.names) if val else [],
        **{k: v for k, v in dataclasses.asdict(settings).items() if k not in _MAY_CHANGE},
        **config.to_plain(),
    }
    synthetic = unlabelled = None
    if settings.synthetic_dir:
        dirs = [os.path.join(settings.synthetic_dir, kind) for kind in ("IMG", "MASK")]
        synthetic = load_labelled(
            *dirs, config.reading, len(config.categories), binary=settings.binary
        )
    if settings.unlabeled_dir:
        unlabelled = load_unlabelled(settings.unlabeled_dir, config.reading)
    stem, ending = os.path.splitext(settings.weights_save)
    if os.path.isdir(settings.weights_save) or not ending:
        raise UserError(f"--weights_save {settings.weights_save}: name a file such as segm.pth")
    last = f"{stem}_last{ending}"
    folder = f"{stem}_logs"
    if settings.resume_checkpoint == "none":
        start_again([settings.weights_save, last, folder])
        unfinished = None
    elif settings.resume_checkpoint in ("", "auto"):
        unfinished = find_unfinished(last, origin)
    else:
        raise UserError("--resume_checkpoint: fine-tuning goes on by itself; give auto or none")
    if unfinished is None and find_unfinished(settings.weights_save, origin):
        start_again([settings.weights_save])  # the run was killed between its first two files
    if unfinished and unfinished["epoch"] >= settings.length(len(train)).epochs:
        return None

    resume_step = unfinished["stepper"]["steps"] if unfinished else 0
    also = ("wandb",) if settings.wandb else ()
    formats = ["tqdm", "log", "csv", "tensorboard"]
    logger.configure(folder, formats, resume_step=resume_step, also=also)
    device = dist_util.dev()
    settings = dataclasses.replace(settings, precision=precision_of(settings.precision, use_fp16))
    for message in plan.messages:
        logger.log(message)
    names = ", ".join(f"{c.index} {c.name}" for c in config.categories)
    logger.log(f"{len(train)} training images, {len(val) if val else 0} for validation")
    for kind, found in (("synthetic", synthetic), ("unlabelled", unlabelled)):
        if found is not None:
            logger.log(f"{len(found)} {kind} images")
    logger.log(f"{len(config.categories)} classes: {names}")
    pixels = train.class_pixels(len(config.categories))
    unseen = [c.name for c in config.categories if not pixels[c.index]]
    if unseen:
        logger.log(f"in no training mask, so nothing to learn them from: {', '.join(unseen)}")
    model = plan.model.to(device)
    finetuner = Finetuner(
        model,
        config,
        settings,
        train,
        val,
        folder,
        origin,
        plan.groups,
        plan.noised_input,
        synthetic,
        unlabelled,
    )
    if unfinished:
        finetuner.resume(unfinished)
        logger.log(f"going on after epoch {finetuner.epoch}")
    return finetuner


def _categories(settings: LearningConfig, train_dirs, val_dirs) -> tuple[Category, ...]:
    if settings.binary:
        if settings.out_channels not in (0, 2):
            raise UserError(f"--binary makes 2 classes, not --out_channels {settings.out_channels}")
        return categories_for(2, settings.categories) if settings.categories else BINARY
    if settings.out_channels:
        return categories_for(settings.out_channels, settings.categories or None)
    if settings.categories:
        return load_categories(settings.categories)
    return categories_for(count_classes([d for d in (train_dirs, val_dirs) if d]))
