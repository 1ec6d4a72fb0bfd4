"""Train a diffusion network that sharpens small images."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed
import torch as th
import torch.nn.functional as F

from guided_diffusion import dist_util
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig, SuperResConfig
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import make_parser, parse_flags
from guided_diffusion.sampling.images import preview_images, save_grid
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.run import TrainConfig, grid_path, open_run, run_training
from guided_diffusion.training.super_res import with_low_res


def main() -> int:
    overrides = parse_flags(
        make_parser(__doc__, TrainConfig, SuperResConfig, DiffusionConfig, ReadingConfig)
    )
    dist_util.setup_dist()
    with dist_util.failure_guard():
        run = open_run(overrides, "super_res", SuperResConfig)
        device, size = dist_util.dev(), run.model.large_size
        diffusion = run.diffusion.build()

        def batches(step: int):
            return with_low_res(run.batches(step), run.model.small_size)

        def sample_grid(network, step: int) -> None:
            """A column an image: enlarged, sharpened, true."""
            images, cond = next(batches(0))
            images = images[:8].to(device)
            cond = {name: value[:8].to(device) for name, value in cond.items()}
            sharpened = preview_images(
                network, diffusion, images.shape[1:], len(images), device, cond
            )
            enlarged = F.interpolate(cond["low_res"], size, mode="bilinear")
            grid = th.cat([enlarged, sharpened, images])
            save_grid(grid_path(run.folder, step), grid, columns=len(images))

        loop = TrainLoop(
            model=run.model.build().to(device),
            diffusion=diffusion,
            data=batches,
            schedule_sampler=create_named_schedule_sampler(run.train.schedule_sampler, diffusion),
            sample_fn=sample_grid,
            **run.loop_arguments(),
        )
        return run_training(loop, run)


if __name__ == "__main__":
    command(main)()
