"""Training of super-resolution networks: the image averaged down is the condition."""

from collections.abc import Iterator
from functools import partial

import torch as th
import torch.nn.functional as F

from guided_diffusion.image_datasets import Batch
from guided_diffusion.networks.config import SuperResConfig
from guided_diffusion.runtime.command_line.flags import Overrides
from guided_diffusion.sampling.images import preview_images
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.diffusion import diffusion_batches, first_images, train_with_grids
from guided_diffusion.training.run import Run, open_run


def train(overrides: Overrides) -> int:
    """Train a super-resolution network; returns the command's exit code.

    :param overrides: the flags on the command line.
    """
    run = open_run(overrides, "super_res", SuperResConfig, TrainConfig)
    return train_with_grids(run, partial(_batches, run), partial(_draw_columns, run))


def with_low_res(batches: Iterator[Batch], small_size: int) -> Iterator[Batch]:
    """Add "low_res" `[N x C x small_size x small_size]`, the images averaged down, to batches."""
    for images, cond in batches:
        yield images, {**cond, "low_res": F.interpolate(images, small_size, mode="area")}


def _batches(run: Run[SuperResConfig, TrainConfig], start_step: int) -> Iterator[Batch]:
    return with_low_res(diffusion_batches(run, start_step), run.model.small_size)


def _draw_columns(
    run: Run[SuperResConfig, TrainConfig], network: th.nn.Module
) -> tuple[th.Tensor, int]:
    """A column per image: upsampled by interpolation, by the network, the original."""
    images, cond = first_images(partial(_batches, run), 8)
    process, device = run.diffusion.build(), images.device
    sampled = preview_images(network, process, images.shape[1:], len(images), device, cond)
    upsampled = F.interpolate(cond["low_res"], run.model.large_size, mode="bilinear")
    return th.cat([upsampled, sampled, images]), len(images)
