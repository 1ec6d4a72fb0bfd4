"""Train a diffusion model that generates masks of radiographs; predict.py segments with it."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.command_line.parsing import CommandParser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.training.config import mask_diffusion_flags


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return mask_diffusion_flags(__doc__)


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion import dist_util
    from guided_diffusion.segmentation.training.mask_training import prepare

    dist_util.setup_dist()
    with dist_util.failure_guard():
        training = prepare(overrides)
        code = training.run()
        if dist_util.is_main():
            print(f"segmentation model: {training.model_path}")
        return code


if __name__ == "__main__":
    command(main)()
