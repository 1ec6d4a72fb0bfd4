"""Sample images from a diffusion network that a classifier guides to their classes."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.networks.checkpoint_flags import (
    IN_SHAPES,
    OF_TRAINING,
    network_part,
    process_part,
)
from guided_diffusion.networks.config import ClassifierConfig, ModelConfig
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.sampling.config import ClassifierSampleConfig

# of the diffusion network; a classifier's shapes tell neither
SHAPES = [name for name in IN_SHAPES if name not in ("in_channels", "num_classes")]


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return make_parser(
        __doc__,
        ClassifierSampleConfig,
        network_part(ModelConfig, [*SHAPES, *OF_TRAINING]),
        process_part(),
        network_part(ClassifierConfig, title="Classifier"),
        ProcessConfig,
    )


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion import dist_util
    from guided_diffusion.sampling.classifier_guidance import classifier_job

    dist_util.setup_dist()
    with dist_util.failure_guard():
        return classifier_job(overrides).run()


if __name__ == "__main__":
    command(main)()
