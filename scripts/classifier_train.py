"""Train a classifier of noised images, which guides a diffusion network towards a class."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import ClassifierConfig, DiffusionConfig
from guided_diffusion.runtime.command_line.parsing import (
    CommandParser,
    Part,
    make_parser,
    parse_flags,
)
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.training.config import ClassifierTrainConfig, RunFolderConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return make_parser(
        __doc__,
        ClassifierTrainConfig,
        ClassifierConfig,
        Part(
            DiffusionConfig,
            ignored=["learn_sigma", "predict_xstart", "use_kl", "rescale_learned_sigmas"],
        ),
        ReadingConfig,
        RunFolderConfig,
        ProcessConfig,
    )


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion import dist_util
    from guided_diffusion.training.classifier import train

    dist_util.setup_dist()
    with dist_util.failure_guard():
        return train(overrides)


if __name__ == "__main__":
    command(main)()
