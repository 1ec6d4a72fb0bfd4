"""Segment radiographs: masks, colours, overlays and areas, each at the radiograph's own size.

predict.py MODEL INPUT [OUTPUT]                 INPUT: radiograph, folder, or glob in quotes
predict.py -m MODEL -i FILE FILE ... -o OUTPUT  the same with flags
predict.py A.pth,B.pth INPUT OUTPUT             the mean of several models
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.memory import keep_freed_memory
from guided_diffusion.segmentation.annotations.writing.config import ExportConfig
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.inference.config import LabelNextConfig, PredictConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(
        __doc__, PredictConfig, AveragingConfig, ExportConfig, LabelNextConfig, ProcessConfig
    )
    flags.add_argument(
        "arguments",
        nargs="*",
        metavar="MODEL INPUT [OUTPUT]",
        help="model file of finetune.py; radiograph, folder or glob in quotes; folder for the "
        "results (default: results)",
    )
    return flags


def main() -> int:
    keep_freed_memory()
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.inference.job import predict

    arguments = overrides.pop("arguments", [])
    averaging = from_flags(AveragingConfig, overrides)
    exporting = from_flags(ExportConfig, overrides)
    correcting = from_flags(LabelNextConfig, overrides)
    config = from_flags(PredictConfig, overrides)
    return predict(config, averaging, exporting, correcting, arguments)


if __name__ == "__main__":
    command(main)()
