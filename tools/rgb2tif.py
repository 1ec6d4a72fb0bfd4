"""Turn masks drawn in colours into masks of class indices, by the colours of categories.json."""

import _path  # noqa: F401 - makes the package importable without installing it

from guided_diffusion.preparation.config import ConvertConfig
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.instead import add_instead
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import MessagesConfig, begin
from guided_diffusion.runtime.errors import command


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, ConvertConfig, MessagesConfig)
    flags.add_argument("input", help="a colour mask, or a folder of them with its sub-folders")
    flags.add_argument("output", help="index mask to write, or the folder for them")
    add_instead(flags, "output", "-o", "--output")
    return flags


def main() -> None:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.preparation.convert import convert

    convert(overrides["input"], overrides["output"], from_flags(ConvertConfig, overrides))


if __name__ == "__main__":
    command(main)()
