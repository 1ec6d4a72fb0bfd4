"""Serve a local web page that segments radiographs: upload a file, view and download the result.

serve.py MODEL                  or several models, with commas: their mean
serve.py MODEL --save_dir DIR   also correct masks with a brush, and save them for finetune.py
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.instead import add_instead
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.inference.config import ServeConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, ServeConfig, AveragingConfig, ProcessConfig)
    flags.add_argument("model", help="model file of finetune.py")
    add_instead(flags, "model", "--model", "--checkpoint", "-m")
    return flags


def main() -> None:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.inference.serve import serve

    averaging = from_flags(AveragingConfig, overrides)
    serve(from_flags(ServeConfig, overrides), averaging, overrides["model"])


if __name__ == "__main__":
    command(main)()
