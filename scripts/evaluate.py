"""Compare predicted masks with true ones: Dice, IoU and, if wanted, boundary distances.

evaluate.py PREDICTED_MASKS TRUE_MASKS       two folders paired by name, or two files
evaluate.py IMAGES TRUE_MASKS --model MODEL  predict first
"""

from dataclasses import dataclass

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.errors import UserError, command
from guided_diffusion.flags import flag, from_flags, given_flags, make_parser
from guided_diffusion.segmentation import evaluation


@dataclass(frozen=True)
class EvaluateConfig:
    """What to compare, and how"""

    model: str = flag("", "fine-tuned checkpoint to predict with", "-m")
    device: str = flag("", "where to predict, such as cpu or cuda:1; '': a GPU if there is one")
    output: str = flag("", "folder for metrics.json, per_image.csv and confusion.png", "-o")
    categories: str = flag("", "class table, a file like flags/categories.json")
    num_classes: int = flag(0, "number of classes; 0: as --categories, the model or the masks tell")
    binary: bool = flag(False, "join all foreground classes: any value but 0 is foreground")
    surface: bool = flag(False, "95 % Hausdorff and average surface distance (HD95, ASD)")
    spacing: str = flag("", "size of a pixel in mm, HEIGHT[,WIDTH], for files that do not tell")


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], EvaluateConfig)
    parser.usage = (
        "evaluate.py PREDICTED_MASKS TRUE_MASKS [flags]\n"
        "       evaluate.py IMAGES TRUE_MASKS --model MODEL [flags]"
    )
    parser.add_argument("first", metavar="PREDICTED_MASKS|IMAGES", help="a folder or a file")
    parser.add_argument("truths", metavar="TRUE_MASKS", help="a folder or a file")
    given = given_flags(parser)
    config = from_flags(EvaluateConfig, given)
    spacing = _parse_spacing(config.spacing)
    if config.output:
        evaluation.prepare_output(config.output)
    categories = evaluation.choose_categories(config.categories, config.num_classes or None)
    if config.model:
        from guided_diffusion.segmentation.predict import load_predictor

        predictor = load_predictor(config.model, config.device or None)
        if categories and len(categories) != len(predictor.categories):
            raise UserError(
                f"{config.model} predicts {len(predictor.categories)} classes, "
                f"not {len(categories)}; leave out --num_classes and --categories or correct them"
            )
        if not config.categories:
            categories = predictor.categories
        pairs = evaluation.predict_mask_pairs(
            predictor, given["first"], given["truths"], config.binary, spacing
        )
    else:
        pairs = evaluation.read_mask_pairs(
            given["first"],
            given["truths"],
            len(categories) if categories else None,
            config.binary,
            spacing,
        )
    result = evaluation.evaluate(pairs, categories, config.binary, config.surface)
    print(result.table())
    if categories is None and not config.binary:
        print(
            f"{len(result.categories)} classes, by the highest value in the masks; "
            "--categories or --num_classes say otherwise"
        )
    if config.output:
        for path, replaced in result.write(config.output).items():
            print(f"{'replaced' if replaced else 'written'}: {path}")


def _parse_spacing(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        sides = [float(side) for side in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or not all(0 < side < float("inf") for side in sides):
        raise UserError(f"--spacing {text}: give millimetres above 0, as HEIGHT or HEIGHT,WIDTH")
    return sides[0], sides[-1]


if __name__ == "__main__":
    command(main)()
