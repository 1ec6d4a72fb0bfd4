"""Analyse, validate and repair a data set, divide it, choose what to label of it, or generate one.

prepare_data.py --action analyze        statistics, and the settings they suggest
prepare_data.py --action validate       faults, exit code 1 if there are any; --fix-issues
                                        writes a repaired copy, exit code 1 if some are left in it
prepare_data.py --action organize       Split/TRAIN/{IMG,MASK} and Split/VAL/{IMG,MASK}
prepare_data.py --action select         which radiographs to label first
prepare_data.py --action create-sample  synthetic bitewings with exact masks
"""

import _path  # noqa: F401 - makes the package importable without installing it

from guided_diffusion.preparation.config import PrepareConfig
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return make_parser(__doc__, PrepareConfig, ProcessConfig)


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.preparation.job import run

    return run(overrides)


if __name__ == "__main__":
    command(main)()
