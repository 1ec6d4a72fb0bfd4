"""Turn a pretrained diffusion network into a segmentation network, using a few labelled images."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import parse_flags
from guided_diffusion.segmentation.training.config import finetune_flags


def main() -> int:
    overrides = parse_flags(finetune_flags(__doc__))

    from guided_diffusion.segmentation.training.finetune import prepare
    from guided_diffusion.segmentation.training.job import require_one_process, train

    require_one_process()
    return train(prepare(overrides))


if __name__ == "__main__":
    command(main)()
