"""Compare sampled images with real ones: figures of merit, and the nearest real images."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import make_parser, parse_flags
from guided_diffusion.sampling.config import EvaluateSamplesConfig


def main() -> int:
    parser = make_parser(__doc__, EvaluateSamplesConfig, ReadingConfig)
    parser.add_argument("samples", help=".npz file or folder of a sampling script, or a glob")
    parser.add_argument("reference", help="folder, glob or .npz file of the real images")
    overrides = parse_flags(parser)

    from guided_diffusion import dist_util
    from guided_diffusion.sampling.evaluation import evaluate

    evaluate(overrides.pop("samples"), overrides.pop("reference"), overrides, dist_util.dev())
    return 0


if __name__ == "__main__":
    command(main)()
