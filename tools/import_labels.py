"""Turn annotations of LabelMe, CVAT, Label Studio and others into images and index masks.

import_labels.py SOURCE OUTPUT   OUTPUT/IMG, OUTPUT/MASK, OUTPUT/categories.json, OUTPUT/import.json
import_labels.py SOURCE --into Split/TRAIN   joins them to those there, without touching Split/VAL
"""

import _path  # noqa: F401 - makes the package importable without installing it

from guided_diffusion.preparation.config import ImportConfig
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.instead import add_instead
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import MessagesConfig, begin
from guided_diffusion.runtime.errors import command


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, ImportConfig, MessagesConfig)
    flags.add_argument("source", help="file or folder that the annotation tool exported")
    flags.add_argument("output", nargs="?", help="folder for the results, new or empty; or --into")
    add_instead(flags, "output", "-o", "--output")
    return flags


def main() -> None:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.preparation.importing.job import import_labels

    output = overrides.get("output", "")
    import_labels(overrides["source"], output, from_flags(ImportConfig, overrides))


if __name__ == "__main__":
    command(main)()
