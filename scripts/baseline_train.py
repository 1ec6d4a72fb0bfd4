"""Train a baseline to compare with fine-tuning, on the same images and by the same training loop.

The baselines are segmentation_models_pytorch's U-Net, a U-Net from random weights, and a pixel
classifier on frozen features. Their files work with predict.py and evaluate.py.
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.parsing import CommandParser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.training.config import baseline_flags


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return baseline_flags(__doc__)


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.training.baselines import prepare
    from guided_diffusion.segmentation.training.job import require_one_process, train

    require_one_process()
    return train(prepare(overrides))


if __name__ == "__main__":
    command(main)()
