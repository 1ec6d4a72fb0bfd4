"""Pretrain a diffusion network on unlabelled images, or on images guided by their masks."""

from functools import partial

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import make_parser, parse_flags
from guided_diffusion.sampling.images import preview_images, save_grid
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.dry_run import dry_run
from guided_diffusion.training.guidance import (
    GuidedTrainConfig,
    guided_batches,
    guided_grid,
    open_guided_run,
    refuse_guidance,
)
from guided_diffusion.training.run import grid_path, open_run, run_training


def main() -> int:
    overrides = parse_flags(
        make_parser(__doc__, GuidedTrainConfig, GuidedConfig, DiffusionConfig, ReadingConfig)
    )
    guided = overrides.get("segmentation_guided", False)
    if not guided:
        refuse_guidance(overrides)
    dist_util.setup_dist()
    if overrides.get("dry_run"):
        print(dry_run(overrides, GuidedConfig if guided else ModelConfig))
        return 0
    with dist_util.failure_guard():
        run = open_guided_run(overrides) if guided else open_run(overrides)
        diffusion = run.diffusion.build()
        shape = (run.model.in_channels, run.model.image_size, run.model.image_size)

        def sample_grid(network, step: int) -> None:
            if guided:
                grid = guided_grid(run, network, diffusion)
                save_grid(grid_path(run.folder, step), grid, columns=len(grid) // 3)
                return
            classes = run.some_classes(16)
            images = preview_images(network, diffusion, shape, 16, dist_util.dev(), classes)
            save_grid(grid_path(run.folder, step), images)

        loop = TrainLoop(
            model=run.build(),
            diffusion=diffusion,
            data=partial(guided_batches, run) if guided else run.batches,
            schedule_sampler=create_named_schedule_sampler(run.train.schedule_sampler, diffusion),
            sample_fn=sample_grid,
            **run.loop_arguments(),
        )
        return run_training(loop, run)


if __name__ == "__main__":
    command(main)()
