"""Play the loop of predicting, correcting and learning again, with masks that are known.

Fine-tunes on a few images of TRAIN, lets the network choose the next ones, adds their true masks,
and so on; Dice on VAL over the number of labelled images, for several rules of choosing. Rerun a
stopped command to resume. The output folder gets table.md, table.csv, rounds.csv (the rules side by
side, a row per seed and round), runs.csv (a row per run), curves.png and commands.sh (to repeat
each run).
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.evaluation.config import LoopConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, LoopConfig, ProcessConfig)
    flags.add_argument("train_img", help="folder of radiographs to choose among")
    flags.add_argument("train_mask", help="folder of their masks")
    flags.add_argument("val_img", help="folder of radiographs to evaluate on")
    flags.add_argument("val_mask", help="folder of their masks")
    return flags


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.evaluation.simulate_loop import simulate_loop

    return simulate_loop(
        from_flags(LoopConfig, overrides),
        (overrides["train_img"], overrides["train_mask"]),
        (overrides["val_img"], overrides["val_mask"]),
    )


if __name__ == "__main__":
    command(main)()
