"""Compare sampled images with real ones: figures of merit, and the nearest real images."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.command_line.parsing import (
    CommandParser,
    Part,
    make_parser,
    parse_flags,
)
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.sampling.config import EvaluateSamplesConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(
        __doc__,
        EvaluateSamplesConfig,
        Part(ReadingConfig, "as the samples' network read", ignored=["image_size", "in_channels"]),
        ProcessConfig,
    )
    flags.add_argument("samples", help=".npz file or folder of a sampling script, or a glob")
    flags.add_argument("reference", help="folder, glob or .npz file of the real images")
    return flags


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion import dist_util
    from guided_diffusion.sampling.evaluation import evaluate

    evaluate(
        overrides.pop("samples"), overrides.pop("reference"), overrides, dist_util.open_device()
    )
    return 0


if __name__ == "__main__":
    command(main)()
