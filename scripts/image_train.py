"""Pretrain a diffusion network on unlabelled images."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import command
from guided_diffusion.flags import given_flags, make_parser
from guided_diffusion.image_datasets import load_data
from guided_diffusion.reading import ReadingConfig
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.run_setup import TrainConfig, grid_path, open_run
from guided_diffusion.sampling import sample_images, save_grid
from guided_diffusion.script_util import DiffusionConfig, ModelConfig
from guided_diffusion.signals import EXIT_STOPPED
from guided_diffusion.train_util import TrainLoop


def main() -> int:
    given = given_flags(
        make_parser(__doc__, TrainConfig, ModelConfig, DiffusionConfig, ReadingConfig)
    )
    dist_util.setup_dist()
    with dist_util.failure_guard():
        run = open_run(given)
        model = run.model.build().to(dist_util.dev())
        diffusion = run.diffusion.build()
        shape = (run.model.in_channels, run.model.image_size, run.model.image_size)

        def sample_grid(network, step: int) -> None:
            classes = (
                {"y": th.arange(16, device=dist_util.dev()) % run.model.num_classes}
                if run.model.class_cond
                else {}
            )
            images = sample_images(
                network, diffusion, shape, range(16), device=dist_util.dev(), model_kwargs=classes
            )
            save_grid(grid_path(run.folder, step), images)

        loop = TrainLoop(
            model=model,
            diffusion=diffusion,
            data=lambda step: load_data(**run.loader_arguments(), start_step=step),
            schedule_sampler=create_named_schedule_sampler(run.train.schedule_sampler, diffusion),
            sample_fn=sample_grid,
            **run.loop_arguments(),
        )
        loop.run_loop()
        if loop.stopped_by:
            logger.log(f"stopped by {loop.stopped_by}: the same command goes on from here")
        logger.log(f"run folder: {run.folder}")
        return EXIT_STOPPED if loop.stopped_by else 0


if __name__ == "__main__":
    command(main)()
