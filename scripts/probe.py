"""Probe the checkpoints of a pretraining run: when did it stop improving segmentation?

A linear classifier of pixels is fitted to each checkpoint's features of the images in SPLIT/TRAIN
and evaluated on SPLIT/VAL; probe.json and probe.png get the curve. Rerun it for new checkpoints.
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import from_flags, make_parser, parse_flags
from guided_diffusion.segmentation.evaluation.probe_config import ProbeConfig


def main() -> None:
    parser = make_parser(__doc__, ProbeConfig)
    parser.add_argument("run", metavar="RUN_FOLDER", help="folder of a pretraining run")
    parser.add_argument(
        "split", metavar="SPLIT", help="folder of TRAIN/IMG, TRAIN/MASK, VAL/IMG and VAL/MASK"
    )
    overrides = parse_flags(parser, intermixed=True)

    from guided_diffusion.segmentation.evaluation.probing import probe_run

    probe_run(from_flags(ProbeConfig, overrides), overrides["run"], overrides["split"])


if __name__ == "__main__":
    command(main)()
