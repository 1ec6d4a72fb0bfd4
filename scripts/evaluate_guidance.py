"""Do guided images show what their masks say? Segment them and compare.

evaluate_guidance.py MODEL FOLDER    FOLDER: output of image_sample.py --seg_dir
"""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import from_flags, make_parser, parse_flags
from guided_diffusion.segmentation.evaluation.config import GuidanceConfig


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], GuidanceConfig)
    parser.add_argument("model", help="segmentation model, such as segm.pth; several, with commas")
    parser.add_argument("folder", help="guided images: holds IMG and MASK")
    overrides = parse_flags(parser)

    from guided_diffusion.segmentation.evaluation.faithfulness import evaluate_guidance

    config = from_flags(GuidanceConfig, overrides)
    evaluate_guidance(config, overrides["model"], overrides["folder"])


if __name__ == "__main__":
    command(main)()
