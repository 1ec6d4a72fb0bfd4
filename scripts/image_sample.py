"""Sample images from a pretrained diffusion network, unguided or guided by masks."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.runtime.command_line import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.process_flags import ProcessConfig, begin
from guided_diffusion.sampling.config import GuidedSampleConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return make_parser(__doc__, GuidedSampleConfig, GuidedConfig, DiffusionConfig, ProcessConfig)


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion import dist_util
    from guided_diffusion.sampling.mask_guidance import image_job

    dist_util.setup_dist()
    with dist_util.failure_guard():
        return image_job(overrides).run()


if __name__ == "__main__":
    command(main)()
