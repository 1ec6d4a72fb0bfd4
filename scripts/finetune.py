"""Turn a pretrained diffusion network into a segmentation network, from a few labelled images."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import parse_flags
from guided_diffusion.segmentation.training.setup import make_flags, prepare_given, train

if __name__ == "__main__":
    command(lambda: train(prepare_given, parse_flags(make_flags(__doc__))))()
