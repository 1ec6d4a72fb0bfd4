"""Look at a data set, check and mend it, divide it into TRAIN and VAL, or make a sample of one.

prepare_data.py --action analyze      what it is like, and which settings follow
prepare_data.py --action validate     what a training run would refuse or regret; --fix-issues
prepare_data.py --action organize     Split/TRAIN/{IMG,MASK} and Split/VAL/{IMG,MASK}
prepare_data.py --action create-sample  synthetic bitewings with exact masks
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.preparation.job import PrepareConfig, run
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import make_parser, parse_flags


def main() -> int:
    parser = make_parser(__doc__.splitlines()[0], PrepareConfig)
    return run(parse_flags(parser))


if __name__ == "__main__":
    command(main)()
