"""Compare predicted masks with true ones: Dice, IoU, boundary distances, calibration.

evaluate.py PREDICTED_MASKS TRUE_MASKS                two folders paired by name, or two files
evaluate.py IMAGES TRUE_MASKS --model MODEL           predict first
evaluate.py IMAGES TRUE_MASKS --compare A.pth B.pth   is B better than A?
evaluate.py TRUE_MASKS --compare MASKS_A MASKS_B      the same, for two folders of masks
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.evaluation.config import EvaluateConfig
from guided_diffusion.segmentation.inference.averaging import AveragingConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, EvaluateConfig, AveragingConfig, ProcessConfig)
    flags.add_argument(
        "arguments", nargs="*", metavar="PREDICTED_MASKS|IMAGES TRUE_MASKS", help="see above"
    )
    return flags


def main() -> None:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.evaluation.job import run

    arguments = overrides.pop("arguments", [])
    averaging = from_flags(AveragingConfig, overrides)
    run(from_flags(EvaluateConfig, overrides), averaging, arguments)


if __name__ == "__main__":
    command(main)()
