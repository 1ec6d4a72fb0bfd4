"""Probe the checkpoints of a pretraining run: when did it stop improving segmentation?

A linear classifier of pixels is fitted to each checkpoint's features of the images in SPLIT/TRAIN
and evaluated on SPLIT/VAL; probe.json and probe.png get the curve. Rerun it for new checkpoints.
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.evaluation.probe_config import ProbeConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, ProbeConfig, ProcessConfig)
    flags.add_argument("run", metavar="RUN_FOLDER", help="folder of a pretraining run")
    flags.add_argument(
        "split", metavar="SPLIT", help="folder of TRAIN/IMG, TRAIN/MASK, VAL/IMG and VAL/MASK"
    )
    return flags


def main() -> None:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.evaluation.probing import probe_run

    probe_run(from_flags(ProbeConfig, overrides), overrides["run"], overrides["split"])


if __name__ == "__main__":
    command(main)()
