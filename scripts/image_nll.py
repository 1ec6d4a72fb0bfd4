"""Measure the likelihood of images under a diffusion network, in bits per dimension."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.networks.checkpoint_flags import (
    IN_SHAPES,
    OF_TRAINING,
    network_part,
    process_part,
)
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.sampling.config import LikelihoodConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return make_parser(
        __doc__,
        LikelihoodConfig,
        network_part(ModelConfig, [*IN_SHAPES, *OF_TRAINING]),
        process_part(),
        ProcessConfig,
    )


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion import dist_util
    from guided_diffusion.networks.trained import read_trained
    from guided_diffusion.sampling.likelihood import measure_likelihood

    dist_util.setup_dist()
    with dist_util.failure_guard():
        settings = from_flags(LikelihoodConfig, overrides)
        measure_likelihood(settings, read_trained(settings.model_path, overrides))
        return 0


if __name__ == "__main__":
    command(main)()
