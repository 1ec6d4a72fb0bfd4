"""Fine-tuning: a pretrained diffusion network becomes a segmentation network."""

import dataclasses

import torch as th

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.process import network_timestep
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.training.folders import Folders
from guided_diffusion.segmentation.training.job import (
    TrainingRun,
    read_data,
    reading_of_pairs,
)
from guided_diffusion.segmentation.training.layers import freeze, parameter_groups
from guided_diffusion.segmentation.training.learning import FinetuneConfig
from guided_diffusion.segmentation.training.loop import InitialNetwork
from guided_diffusion.segmentation.training.noised_input import NoisedInput, parse_range
from guided_diffusion.segmentation.training.partner import imagenet_partner
from guided_diffusion.segmentation.training.start import start
from guided_diffusion.training.config import TrainConfig

# flags of pretraining that users may pass along, and that have no effect here
_NO_EFFECT = sorted(
    {f.name for f in dataclasses.fields(TrainConfig)}
    - {f.name for f in dataclasses.fields(FinetuneConfig)}
)


def prepare(overrides: Overrides) -> TrainingRun | None:
    """Check everything, then build the run.

    :param overrides: the flags and arguments that the user gave.
    :return: None if the run is complete already.
    :raises UserError: for whatever the user must correct, before anything is written.
    """
    if overrides.get("skip_bad_images"):
        raise UserError(
            "--skip_bad_images has no effect here: every labelled radiograph is needed; repair the"
            " unreadable ones, or leave them out of TRAIN and VAL"
        )
    settings = from_flags(FinetuneConfig, overrides)
    settings.check()
    run_lock.hold_file(settings.weights_save, "choose another --weights_save")
    folders = Folders.from_flags(overrides)
    pretrained: Trained[ModelConfig] = read_trained(
        overrides["checkpoint"], overrides, for_tuning=True
    )
    settings = settings.with_default_lr(pretrained.model.num_channels)
    flags = {k: v for k, v in overrides.items() if k != "in_channels"}  # the network's is fixed
    reading, about_reading = reading_of_pairs(pretrained.reading, flags)
    data = read_data(settings, folders, reading)
    ignored = [name for name in _NO_EFFECT if name in overrides]
    messages = [
        *about_reading,
        *(f"--{n} is for pretraining and ignored here" for n in ignored),
    ]

    def build(settings: FinetuneConfig) -> InitialNetwork:
        initial = _initial_network(settings, pretrained, reading, data.categories)
        return dataclasses.replace(initial, messages=[*initial.messages, *messages])

    sources = {"checkpoint": pretrained.path}
    partner = None
    if settings.partner == "imagenet":
        partner = imagenet_partner(reading, data.categories, settings.partner_lr)
    return start(build, settings, data, sources, bool(overrides.get("use_fp16")), partner)


def _initial_network(
    settings: FinetuneConfig,
    pretrained: Trained[ModelConfig],
    reading: ReadingConfig,
    categories: ClassTable,
) -> InitialNetwork:
    """The segmentation network with the checkpoint's weights, and which of them train how fast."""
    network = dataclasses.replace(pretrained.model, use_fp16=False)
    last = pretrained.diffusion.diffusion_steps - 1
    if settings.timestep > last:
        raise UserError(f"--timestep {settings.timestep:g}: the diffusion has steps 0 to {last}")
    config = SegmentationConfig(
        model=network,
        reading=reading,
        categories=categories,
        depth=settings.depth or None,
        timestep=network_timestep(settings.timestep, pretrained.diffusion),
        diffusion=pretrained.diffusion,
    )
    noised_input = _noised_input(settings, pretrained.diffusion)
    th.manual_seed(settings.seed)
    model = network.build_segmentation(len(categories), config.depth, config.timestep)
    if settings.random_init:
        messages = ["random weights: only the architecture of the checkpoint is used"]
        groups, fresh = None, list(model.state_dict())
    else:
        try:
            weights, message = pretrained.without_classes()
            report = model.load_pretrained(weights)
        except ValueError as error:
            raise UserError(f"{pretrained.path}: {error}") from error
        pretrained.check_loaded(
            report, ("out.2.", *(("middle_block.", "output_blocks.0.") if settings.depth else ()))
        )
        messages, fresh = [m for m in (message, f"{pretrained.path}: {report}") if m], report.fresh
        groups = parameter_groups(model, settings.layer_decay, report.fresh, settings.head_lr_scale)
    messages.append(f"learning rate {settings.lr:.3g}")
    frozen = freeze(model, settings.unfreeze_encoder, settings.unfreeze_decoder)
    if frozen:
        messages.append(f"frozen: {', '.join(frozen)}")
    if stuck := [n for n, p in model.named_parameters() if n in fresh and not p.requires_grad]:
        raise UserError(
            f"{stuck[0]} is not pretrained but would be frozen at its random values: raise"
            " --unfreeze_encoder or --unfreeze_decoder, or leave out --depth or --random_init"
        )
    return InitialNetwork(model, config, groups, noised_input, messages)


def _noised_input(settings: FinetuneConfig, diffusion: DiffusionConfig) -> NoisedInput | None:
    """What takes training images to other timesteps, or None if all stay as they are."""
    span = parse_range(settings.timestep_range, diffusion.diffusion_steps)
    if span is None and not settings.noise_at_timestep:
        return None
    return NoisedInput(
        diffusion, settings.timestep, span, settings.noise_at_timestep, settings.seed
    )
