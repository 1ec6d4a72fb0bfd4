"""Train a classifier of noised images, which guides a diffusion network to a class."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.image_datasets import load_data
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import ClassifierConfig, DiffusionConfig
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import make_parser, parse_flags
from guided_diffusion.training.classifier import ClassifierLoop, ClassifierTrainConfig
from guided_diffusion.training.run import open_run, run_training


def main() -> int:
    overrides = parse_flags(
        make_parser(
            __doc__, ClassifierTrainConfig, ClassifierConfig, DiffusionConfig, ReadingConfig
        )
    )
    dist_util.setup_dist()
    with dist_util.failure_guard():
        run = open_run(overrides, "classifier", ClassifierConfig, ClassifierTrainConfig)
        diffusion = run.diffusion.build()

        def validation(start_step: int):
            arguments = {**run.loader_arguments(), "data_dir": run.train.val_data_dir}
            return load_data(**arguments, start_step=start_step)

        loop = ClassifierLoop(
            model=run.model.build().to(dist_util.dev()),
            diffusion=diffusion,
            data=run.batches,
            schedule_sampler=create_named_schedule_sampler(run.train.schedule_sampler, diffusion),
            noised=run.train.noised,
            validation=validation if run.train.val_data_dir else None,
            eval_interval=run.train.eval_interval,
            **run.loop_arguments(),
        )
        return run_training(loop, run)


if __name__ == "__main__":
    command(main)()
