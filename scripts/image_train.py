"""Pretrain a diffusion network on unlabelled images."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.errors import command
from guided_diffusion.flags import given_flags, make_parser
from guided_diffusion.reading import ReadingConfig
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.run_setup import TrainConfig, grid_path, open_run, run_training
from guided_diffusion.sampling import sample_images, save_grid
from guided_diffusion.script_util import DiffusionConfig, ModelConfig
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
            images = sample_images(
                network,
                diffusion,
                shape,
                range(16),
                # noise at every step corrects the errors of a network that has not learnt much yet
                steps=min(20, diffusion.num_timesteps),
                eta=1.0,
                device=dist_util.dev(),
                model_kwargs=run.some_classes(16),
            )
            save_grid(grid_path(run.folder, step), images)

        loop = TrainLoop(
            model=model,
            diffusion=diffusion,
            data=run.batches,
            schedule_sampler=create_named_schedule_sampler(run.train.schedule_sampler, diffusion),
            sample_fn=sample_grid,
            **run.loop_arguments(),
        )
        return run_training(loop, run)


if __name__ == "__main__":
    command(main)()
