"""How good is which method with how few labels: methods x numbers of images x seeds, in one table.

Runs are trained one after the other; a killed command goes on where it stopped. The output folder
gets table.md, table.csv, runs.csv (a row a run), curves.png and commands.sh (to repeat each run).
"""

import os

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.runtime.flags import from_flags, make_parser, parse_flags
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.segmentation.evaluation.label_efficiency import (
    LabelEfficiency,
    LabelEfficiencyConfig,
    parse_methods,
    parse_variants,
)


def main() -> int:
    parser = make_parser(__doc__, LabelEfficiencyConfig)
    parser.add_argument(
        "--method",
        action="append",
        metavar="'NAME: FLAGS'",
        help="define a method: flags of finetune.py, or baseline_train.py and its flags",
    )
    parser.add_argument(
        "--variant",
        action="append",
        metavar="'NAME: FLAGS'",
        help="evaluate every network a second time: flags of evaluate.py, such as --tta shifts",
    )
    parser.add_argument("train_img", help="folder of radiographs to draw from")
    parser.add_argument("train_mask", help="folder of their masks")
    parser.add_argument("test_img", nargs="?", help="folder of radiographs to evaluate on")
    parser.add_argument("test_mask", nargs="?", help="folder of their masks")
    overrides = parse_flags(parser)
    settings = from_flags(LabelEfficiencyConfig, overrides)
    if ("test_img" in overrides) != ("test_mask" in overrides):
        raise UserError("TEST_IMG is given without TEST_MASK: give both folders or --folds")
    test = (overrides["test_img"], overrides["test_mask"]) if "test_img" in overrides else None
    dist_util.setup_dist()
    comparison = LabelEfficiency(
        settings,
        parse_methods(settings.methods, overrides.get("method", ())),
        (overrides["train_img"], overrides["train_mask"]),
        test,
        parse_variants(overrides.get("variant", ())),
    )
    stopped_by = comparison.run_all()
    if stopped_by:
        print(f"stopped by {stopped_by}: the same command goes on from here")
        return EXIT_STOPPED
    with open(os.path.join(settings.output, "table.md")) as file:
        print(file.read())
    return 0


if __name__ == "__main__":
    command(main)()
