"""Sharpen small images with a super-resolution network."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.networks.checkpoint_flags import (
    OF_TRAINING,
    network_part,
    process_part,
)
from guided_diffusion.networks.config import SuperResConfig
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.sampling.config import SuperResSampleConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return make_parser(
        __doc__,
        SuperResSampleConfig,
        network_part(SuperResConfig, ["in_channels", *OF_TRAINING]),
        process_part(),
        ProcessConfig,
    )


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion import dist_util
    from guided_diffusion.sampling.super_res import super_res_job

    dist_util.setup_dist()
    with dist_util.failure_guard():
        return super_res_job(overrides).run()


if __name__ == "__main__":
    command(main)()
