"""Train a diffusion that draws the masks of radiographs, for predict.py to segment with."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.conditional import MaskDiffusionConfig
from guided_diffusion.errors import UserError, command
from guided_diffusion.flags import given_flags, make_parser
from guided_diffusion.reading import ReadingConfig
from guided_diffusion.run_setup import run_training
from guided_diffusion.script_util import DiffusionConfig
from guided_diffusion.segmentation.mask_training import MaskTrainConfig, open_mask_run


def main() -> int:
    parser = make_parser(
        __doc__, MaskTrainConfig, MaskDiffusionConfig, DiffusionConfig, ReadingConfig
    )
    parser.add_argument("train_img", help="folder of radiographs")
    parser.add_argument("train_mask", help="folder of their masks")
    parser.add_argument("val_img", nargs="?", help="folder of radiographs to look at and score")
    parser.add_argument("val_mask", nargs="?", help="folder of their masks")
    given = given_flags(parser)
    if ("val_img" in given) != ("val_mask" in given):
        raise UserError("VAL_IMG is given without VAL_MASK: give both folders or neither")
    train = (given["train_img"], given["train_mask"])
    val = (given["val_img"], given["val_mask"]) if "val_img" in given else None
    dist_util.setup_dist()
    with dist_util.failure_guard():
        masks = open_mask_run(train, val, given)
        code = run_training(masks.loop(), masks.run)
        if dist_util.is_main():
            print(f"segmentation model: {masks.model_path}")
        return code


if __name__ == "__main__":
    command(main)()
