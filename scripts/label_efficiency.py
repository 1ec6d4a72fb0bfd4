"""Compare methods x numbers of labelled images x seeds, in one table.

On a CPU several runs are made at a time; rerun a stopped command to resume. The output folder gets
table.md, table.csv, runs.csv (one row per run), curves.png and commands.sh (to repeat each run).
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.evaluation.config import LabelEfficiencyConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, LabelEfficiencyConfig, ProcessConfig)
    flags.add_argument(
        "--method",
        action="append",
        metavar="'NAME: FLAGS'",
        help="define a method: flags of finetune.py, another training script and its flags, or the"
        " union of methods, 'NAME: METHOD + METHOD'",
    )
    flags.add_argument(
        "--variant",
        action="append",
        metavar="'NAME: FLAGS'",
        help="evaluate every network a second time: flags of evaluate.py, such as --tta shifts",
    )
    flags.add_argument("train_img", help="folder of radiographs to draw from")
    flags.add_argument("train_mask", help="folder of their masks")
    flags.add_argument("test_img", nargs="?", help="folder of radiographs to evaluate on")
    flags.add_argument("test_mask", nargs="?", help="folder of their masks")
    return flags


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.evaluation.label_efficiency import label_efficiency

    return label_efficiency(
        from_flags(LabelEfficiencyConfig, overrides),
        (overrides["train_img"], overrides["train_mask"]),
        (overrides.get("test_img"), overrides.get("test_mask")),
        overrides.get("method", ()),
        overrides.get("variant", ()),
    )


if __name__ == "__main__":
    command(main)()
