"""Sample images from a pretrained diffusion network, unguided or guided by masks."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.networks.checkpoint_flags import (
    IN_SHAPES,
    OF_TRAINING,
    network_part,
    process_part,
)
from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.sampling.config import GuidedSampleConfig

# of networks that masks guide, which always have a config.json
GUIDED_FLAGS = ("segmentation_guided", "num_segmentation_classes", "use_ablated_segmentations")


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return make_parser(
        __doc__,
        GuidedSampleConfig,
        network_part(GuidedConfig, [*IN_SHAPES, *OF_TRAINING, *GUIDED_FLAGS]),
        process_part(basic=["timestep_respacing"]),
        ProcessConfig,
    )


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion import dist_util
    from guided_diffusion.sampling.mask_guidance import image_job

    dist_util.setup_dist()
    with dist_util.failure_guard():
        return image_job(overrides).run()


if __name__ == "__main__":
    command(main)()
