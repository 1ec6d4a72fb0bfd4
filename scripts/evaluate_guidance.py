"""Do guided images show what their masks say? Segment them and compare.

evaluate_guidance.py MODEL FOLDER    FOLDER is what image_sample.py --seg_dir wrote
"""

from dataclasses import dataclass

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags
from guided_diffusion.segmentation.evaluation.faithfulness import GuidedImages, look
from guided_diffusion.segmentation.evaluation.scoring import prepare_output
from guided_diffusion.segmentation.evaluation.text import table
from guided_diffusion.segmentation.inference.predictor import load_predictor


@dataclass(frozen=True)
class GuidanceConfig:
    """Evaluation."""

    TITLE = "Evaluation"

    output: str = flag("", "folder for tables and pictures; '': FOLDER/faithfulness", "-o")
    device: str = flag("", "where to predict, such as cpu or cuda:1; '': a GPU if there is one")


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], GuidanceConfig)
    parser.add_argument("model", help="segmentation model, such as segm.pth; or several, by commas")
    parser.add_argument("folder", help="guided images: holds IMG and MASK")
    overrides = parse_flags(parser)
    config = from_flags(GuidanceConfig, overrides)
    source = GuidedImages.in_folder(overrides["folder"])
    predictor = load_predictor(overrides["model"], config.device or None)
    output = config.output or f"{overrides['folder']}/faithfulness"
    prepare_output(output)
    result = look(predictor, source)
    print(table(result.evaluation))
    if source.left_open:
        names = ", ".join(predictor.categories[i].name for i in source.left_open)
        print(f"left open in sampling, and not counted: {names}")
    print("\n".join(result.lines()))
    result.write(output, predictor)
    print(f"tables and pictures: {output}")


if __name__ == "__main__":
    command(main)()
