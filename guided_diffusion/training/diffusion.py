"""Training of diffusion networks: on images alone, or on images with their classes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch as th

from guided_diffusion import dist_util
from guided_diffusion.image_datasets import Batch
from guided_diffusion.networks.alignment import ENCODER_SIDE
from guided_diffusion.networks.config import ModelConfig, UNetConfig
from guided_diffusion.networks.encoders import open_encoder
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.sampling.images import preview_images, save_grid
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.alignment import AlignedLoop, alignment
from guided_diffusion.training.config import PretrainConfig, TrainConfig
from guided_diffusion.training.run import Run, grid_path, open_run, run_training

# from a network in eval mode to images [N x C x H x W] in [-1, 1] and the columns of their grid
DrawGrid = Callable[[th.nn.Module], tuple[th.Tensor, int]]
# from a run to the arguments of TrainLoop that make it probe
MakeProbe = Callable[[Run[ModelConfig, TrainConfig]], dict[str, Any]]
# samples in a grid
GRID_IMAGES = 16


def train(overrides: Overrides, probe: MakeProbe | None = None) -> int:
    """Train a network on images; returns the command's exit code.

    :param overrides: the flags on the command line.
    :param probe: makes what measures the network meanwhile.
    """
    asked = from_flags(PretrainConfig, overrides)
    encoder = open_encoder(asked.align_encoder, ENCODER_SIDE) if asked.align_encoder else None
    run = open_run(overrides, "diffusion", ModelConfig, PretrainConfig)
    batches, grid = partial(diffusion_batches, run), partial(_draw_samples, run)
    more = probe(run) if probe else {}
    if encoder is None:
        return train_with_grids(run, batches, grid, **more)
    network = run.build()
    more |= alignment(network, run.model, encoder, run.train.align_weight)
    return train_with_grids(run, batches, grid, AlignedLoop, network, **more)


def train_with_grids(
    run: Run[UNetConfig, TrainConfig],
    batches: Callable[[int], Iterator[Batch]],
    draw_grid: DrawGrid,
    loop_type: type[TrainLoop] = TrainLoop,
    network: th.nn.Module | None = None,
    **more: Any,
) -> int:
    """Train a run's network, saving a grid of samples every `sample_interval` steps.

    :param batches: from a step to the batches from that step on.
    :param network: by default built here.
    :param more: further arguments of `loop_type`.
    :return: the command's exit code.
    """

    def save_samples(network: th.nn.Module, step: int) -> None:
        images, columns = draw_grid(network)
        save_grid(grid_path(run.folder, step), images, columns)

    built = run.build() if network is None else network
    return run_training(run.loop(loop_type, built, batches, save_samples, **more), run)


def diffusion_batches(
    run: Run[UNetConfig, TrainConfig], start_step: int, **more: Any
) -> Iterator[Batch]:
    """`Run.batches`, some without their classes where the network trains with `cond_drop_prob`."""
    batches = run.batches(start_step, **more)
    if not run.model.cond_drop_prob:
        return batches
    null = run.model.num_classes
    return drop_classes(batches, run.model.cond_drop_prob, null, run.train.seed, start_step)


def drop_classes(
    batches: Iterator[Batch], probability: float, null: int, seed: int, start_step: int
) -> Iterator[Batch]:
    """Replace classes by the class `null`, "no class", with the given probability.

    So one network learns to denoise with and without the class (arXiv 2207.12598, algorithm 1).
    Which images lose theirs is a function of the seed and of their index in the run.
    """
    for step, (images, cond) in enumerate(batches, start_step):
        draws = rng.uniforms(seed, "drop class", image_indices(step, len(images)))
        dropped = th.from_numpy(draws < probability)
        yield images, {**cond, "y": cond["y"].masked_fill(dropped, null)}


def image_indices(step: int, count: int) -> range:
    """Indices in the run of this rank's `count` images of a step."""
    first = (step * dist_util.world_size() + dist_util.rank()) * count
    return range(first, first + count)


def first_images(
    batches: Callable[[int], Iterator[Batch]], count: int
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """The first images of the training, at most `count`, with their arguments, on the device."""
    images, cond = next(batches(0))
    device = dist_util.dev()
    return images[:count].to(device), {k: v[:count].to(device) for k, v in cond.items()}


def _draw_samples(
    run: Run[ModelConfig, TrainConfig], network: th.nn.Module
) -> tuple[th.Tensor, int]:
    """Samples in 4 columns, of one class after the other."""
    device, size = dist_util.dev(), run.model.image_size
    cond = {}
    if run.classes:
        cond["y"] = th.arange(GRID_IMAGES, device=device) % len(run.classes)
    shape = (run.model.in_channels, size, size)
    return preview_images(network, run.diffusion.build(), shape, GRID_IMAGES, device, cond), 4
