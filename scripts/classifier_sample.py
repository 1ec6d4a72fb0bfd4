"""Sample images from a diffusion network that a classifier guides to their classes."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.networks.config import (
    FROM_CHECKPOINT,
    IN_SHAPES,
    OF_TRAINING,
    READ,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
)
from guided_diffusion.runtime.command_line import CommandParser, Part, make_parser, parse_flags
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.process_flags import ProcessConfig, begin
from guided_diffusion.sampling.config import ClassifierSampleConfig

# of the diffusion network; a classifier's shapes tell neither
SHAPES = [name for name in IN_SHAPES if name not in ("in_channels", "num_classes")]


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return make_parser(
        __doc__,
        ClassifierSampleConfig,
        Part(
            ModelConfig,
            FROM_CHECKPOINT,
            title=f"Network {READ}",
            ignored=[*SHAPES, *OF_TRAINING],
        ),
        Part(
            DiffusionConfig,
            FROM_CHECKPOINT,
            title=f"Diffusion process {READ}",
            ignored=OF_TRAINING,
        ),
        Part(ClassifierConfig, FROM_CHECKPOINT, title=f"Classifier {READ}"),
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
