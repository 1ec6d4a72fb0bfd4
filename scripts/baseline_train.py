"""Train a network to compare with, by the loop that fine-tunes: smp's U-Net, a U-Net, features.

Its files are those of scripts/finetune.py, and predict.py and evaluate.py take them alike.
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import parse_flags
from guided_diffusion.segmentation.training.baselines import make_flags, prepare_given
from guided_diffusion.segmentation.training.setup import train

if __name__ == "__main__":
    command(lambda: train(prepare_given, parse_flags(make_flags(__doc__))))()
