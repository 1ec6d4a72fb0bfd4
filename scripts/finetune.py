"""Turn a pretrained diffusion network into a segmentation network, from a few labelled images."""

import os

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import UserError, command
from guided_diffusion.flags import given_flags, make_parser
from guided_diffusion.reading import ReadingConfig
from guided_diffusion.run_setup import TrainConfig
from guided_diffusion.script_util import DiffusionConfig, ModelConfig
from guided_diffusion.segmentation.finetune import FinetuneConfig
from guided_diffusion.segmentation.setup import prepare
from guided_diffusion.signals import EXIT_STOPPED


def main() -> int:
    parser = make_parser(
        __doc__, FinetuneConfig, ReadingConfig, ModelConfig, DiffusionConfig, TrainConfig
    )
    parser.add_argument("checkpoint", help="pretrained network: model*.pt or ema_*.pt")
    parser.add_argument("train_img", help="folder of radiographs")
    parser.add_argument("train_mask", help="folder of their masks")
    parser.add_argument("val_img", nargs="?", help="folder of radiographs to validate on")
    parser.add_argument("val_mask", nargs="?", help="folder of their masks")
    given = given_flags(parser)
    if ("val_img" in given) != ("val_mask" in given):
        raise UserError("VAL_IMG is given without VAL_MASK: give both folders or neither")
    dist_util.setup_dist()
    if dist_util.world_size() > 1:
        raise UserError("fine-tuning a few images runs in one process: start it without a launcher")
    val = (given["val_img"], given["val_mask"]) if "val_img" in given else None
    finetuner = prepare(given["checkpoint"], (given["train_img"], given["train_mask"]), val, given)
    if finetuner is None:
        print("this run is complete: nothing to do")
        return 0
    finetuner.run()
    saved = finetuner.settings.weights_save
    if finetuner.stopped_by:
        logger.log(f"stopped by {finetuner.stopped_by}: the same command goes on from here")
        return EXIT_STOPPED
    best = finetuner.best
    if val:
        logger.log(
            f"best network: epoch {best['epoch']}, mean IoU {best['mean_iou']:.4f},"
            f" mean Dice {best['mean_dice']:.4f} of the foreground"
        )
    logger.log(f"saved {saved}; curves in {os.path.join(finetuner.folder, 'curves.png')}")
    return 0


if __name__ == "__main__":
    command(main)()
