"""Do guided images show what their masks say? Segment them and compare.

evaluate_guidance.py MODEL FOLDER    FOLDER: output of image_sample.py --seg_dir
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.instead import add_instead
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.evaluation.config import GuidanceConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, GuidanceConfig, ProcessConfig)
    flags.add_argument("model", help="segmentation model, such as segm.pth; several, with commas")
    flags.add_argument("folder", help="guided images: holds IMG and MASK")
    add_instead(flags, "model", "--model", "--checkpoint", "-m")
    return flags


def main() -> None:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.evaluation.faithfulness import evaluate_guidance

    config = from_flags(GuidanceConfig, overrides)
    evaluate_guidance(config, overrides["model"], overrides["folder"])


if __name__ == "__main__":
    command(main)()
