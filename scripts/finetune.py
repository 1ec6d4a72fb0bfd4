"""Turn a pretrained diffusion network into a segmentation network, using a few labelled images."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.parsing import CommandParser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.training.config import finetune_flags


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return finetune_flags(__doc__)


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.training.finetune import prepare
    from guided_diffusion.segmentation.training.job import require_one_process, train

    require_one_process()
    return train(prepare(overrides))


if __name__ == "__main__":
    command(main)()
