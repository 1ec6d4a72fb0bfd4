"""From flags to a fine-tuning run: the pretrained network, the data, the class table."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch as th
from tqdm import tqdm

from guided_diffusion import checkpoint, dist_util, logger
from guided_diffusion.errors import UserError
from guided_diffusion.flags import from_flags, pick
from guided_diffusion.infer import infer_model_config
from guided_diffusion.reading import ReadingConfig
from guided_diffusion.run_setup import TrainConfig, precision_of
from guided_diffusion.script_util import DiffusionConfig, ModelConfig, check_flags
from guided_diffusion.segmentation.categories import categories_for, load_categories
from guided_diffusion.segmentation.dataset import count_classes, load_labelled
from guided_diffusion.segmentation.finetune import (
    FinetuneConfig,
    Finetuner,
    find_unfinished,
    freeze,
    start_again,
)
from guided_diffusion.segmentation.model_file import FORMAT, SegmentationConfig

# flags of pretraining that a user may pass along and that mean nothing here
_NO_MEANING = sorted(
    {f.name for f in dataclasses.fields(TrainConfig)}
    - {f.name for f in dataclasses.fields(FinetuneConfig)}
)
# settings that may differ when the same command goes on
_MAY_CHANGE = ("resume_checkpoint", "val_interval", "microbatch", "max_skipped_steps")


class Messages(logger.SeqWriter):
    """Messages on the screen, around the progress bar; the numbers go to the files."""

    def writeseq(self, seq: Sequence[str]) -> None:
        tqdm.write(" ".join(seq))


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained diffusion network."""

    path: str
    weights: dict[str, th.Tensor]
    model: ModelConfig
    diffusion: DiffusionConfig
    reading: ReadingConfig


def load_pretrained(path: str, given: Mapping[str, Any]) -> Pretrained:
    """Read a checkpoint and the configuration beside it, or infer that from the weights' shapes.

    :param given: the given flags, checked against the configuration.
    :raises UserError: if the flags contradict it, naming flag and both values.
    """
    weights = checkpoint.load(path)
    if isinstance(weights, dict) and weights.get("format") == FORMAT:
        raise UserError(
            f"{path} is a segmentation model already: name the pretrained checkpoint (model*.pt)"
        )
    if not isinstance(weights, dict) or not all(map(th.is_tensor, weights.values())):
        raise UserError(f"{path} holds no weights: expected model*.pt or ema_*.pt")
    given = {k: v for k, v in given.items() if not (k == "in_channels" and v == "auto")}
    stored = checkpoint.read_config(path)
    if stored is None:
        model = infer_model_config(weights, given, path)
        diffusion = from_flags(DiffusionConfig, given)
        reading = ReadingConfig(model.image_size, model.in_channels)
        source = f"the weights in {path}"
    else:
        source = f"the config.json beside {path}"
        try:
            model = pick(ModelConfig, stored["model"])
            diffusion = pick(DiffusionConfig, stored["diffusion"])
            reading = ReadingConfig.from_dict(stored["reading"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{source} lacks {error}: it is not of this package") from error
        check_flags(given, diffusion, source)
    check_flags(given, model, source)
    return Pretrained(path, weights, model, diffusion, reading)


def prepare(
    path: str,
    train_dirs: tuple[str, str],
    val_dirs: tuple[str, str] | None,
    given: Mapping[str, Any],
) -> Finetuner | None:
    """Check everything, then build the run; None if it is complete already.

    :param train_dirs: folders of radiographs and of masks.
    :param given: the given flags.
    """
    settings = from_flags(FinetuneConfig, given)
    settings.check()
    pretrained = load_pretrained(path, given)
    reading = dataclasses.replace(pretrained.reading, resize="pad")
    wanted = {k: v for k, v in given.items() if k != "in_channels"}
    reading = from_flags(ReadingConfig, wanted, reading)
    categories = _categories(settings, train_dirs, val_dirs)
    train = load_labelled(*train_dirs, reading, len(categories))
    val = load_labelled(*val_dirs, reading, len(categories)) if val_dirs else None
    config = SegmentationConfig(
        model=from_flags(
            ModelConfig,
            {k: given[k] for k in ("dropout", "use_checkpoint") if k in given},
            dataclasses.replace(pretrained.model, use_fp16=False),
        ),
        reading=reading,
        categories=categories,
        depth=settings.depth or None,
        timestep=_network_timestep(settings.timestep, pretrained.diffusion),
    )
    origin = {
        "checkpoint": os.path.basename(path),
        "train": list(train.names),
        "val": list(val.names) if val else [],
        **{k: v for k, v in dataclasses.asdict(settings).items() if k not in _MAY_CHANGE},
        **config.to_plain(),
    }
    th.manual_seed(settings.seed)
    model = config.build()
    if not settings.random_init:
        try:
            report = model.load_pretrained(pretrained.weights)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    stem = os.path.splitext(settings.weights_save)[0]
    if os.path.isdir(settings.weights_save) or not os.path.splitext(settings.weights_save)[1]:
        raise UserError(f"--weights_save {settings.weights_save}: name a file such as segm.pth")
    last = f"{stem}_last{os.path.splitext(settings.weights_save)[1]}"
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
    if unfinished and unfinished["epoch"] >= settings.epochs:
        return None

    resume_step = unfinished["stepper"]["steps"] if unfinished else 0
    logger.configure(folder, ["log", "csv", "tensorboard"], resume_step=resume_step)
    logger.get_current().output_formats.append(Messages())
    device = dist_util.dev()
    precision = precision_of(settings.precision, bool(given.get("use_fp16")))
    settings = dataclasses.replace(settings, precision=precision)
    for name in _NO_MEANING:
        if name in given:
            logger.log(f"--{name} is of pretraining and has no meaning here")
    if settings.random_init:
        logger.log("random weights: nothing of the checkpoint but its architecture is used")
    else:
        logger.log(f"{path}: {report}")
    frozen = freeze(model, settings.unfreeze_encoder, settings.unfreeze_decoder)
    if frozen:
        logger.log(f"frozen: {', '.join(frozen)}")
    names = ", ".join(f"{c.index} {c.name}" for c in categories)
    logger.log(f"{len(train)} training images, {len(val) if val else 0} for validation")
    logger.log(f"{len(categories)} classes: {names}")
    finetuner = Finetuner(model.to(device), config, settings, train, val, folder, origin)
    if unfinished:
        finetuner.resume(unfinished)
        logger.log(f"going on after epoch {finetuner.epoch}")
    return finetuner


def _network_timestep(timestep: float, diffusion: DiffusionConfig) -> float:
    """A timestep of the diffusion as the network is told it."""
    if diffusion.rescale_timesteps:
        return timestep * 1000.0 / diffusion.diffusion_steps
    return timestep


def _categories(settings: FinetuneConfig, train_dirs, val_dirs):
    if settings.out_channels:
        return categories_for(settings.out_channels, settings.categories or None)
    if settings.categories:
        return load_categories(settings.categories)
    return categories_for(count_classes([d for d in (train_dirs, val_dirs) if d]))
