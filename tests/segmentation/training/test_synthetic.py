"""Learning from synthetic pairs beside the labelled images."""

import signal

import pytest
import torch as th
from conftest import draw_pairs
from finetuning_util import folders

from guided_diffusion.images.masks import MaskRule
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.segmentation.training import loop
from guided_diffusion.segmentation.training.augment import Augmentation
from guided_diffusion.segmentation.training.dataset import load_labelled, training_batches
from guided_diffusion.segmentation.training.learning import LearningConfig

READING = ReadingConfig(32, 1, "pad")


def test_runs_with_everything_on_go_on_exactly(script, pretrained, split, tmp_path, monkeypatch):
    argv = [pretrained, *folders(split), "--steps", 6, "--lr", 1e-3, "--dropout", 0.1]
    argv += ["--ema_rate", 0.9, "--layer_decay", 0.8, "--head_lr_scale", 3, "--weight_decay", 0.1]
    argv += ["--timestep_range", "0,9", "--noise_at_timestep", "--augmentation", "strong"]
    argv += ["--synthetic_dir", tmp_path / "more", "--microbatch", 2]
    draw_pairs(tmp_path / "more", 5, seed=7)
    ended = script("finetune.py", *argv, "--weights_save", "whole/segm.pth")
    assert ended.code == 0, ended.err
    assert "5 synthetic images" in ended.err

    train = loop.Finetuner._train_epoch

    def stopped_early(self, batches):
        train(self, batches)
        if self.epoch == 0:
            signal.raise_signal(signal.SIGTERM)

    argv += ["--weights_save", "parts/segm.pth"]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Finetuner, "_train_epoch", stopped_early)
        assert script("finetune.py", *argv).code == EXIT_STOPPED
    ended = script("finetune.py", *argv)
    assert ended.code == 0, ended.err
    assert "resuming after epoch 1" in ended.err
    for name in ("segm.pth", "segm_last.pth"):
        one, other = (th.load(f"{f}/{name}", weights_only=True) for f in ("whole", "parts"))
        assert one["best"] == other["best"]
        for part in ("state_dict", *(["ema"] if "last" in name else [])):
            assert all(th.equal(one[part][k], other[part][k]) for k in one[part])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.6])
def test_synthetic_images_are_that_share_and_labelled_ones_still_come_round(tmp_path, share):
    draw_pairs(tmp_path / "few", 3)
    draw_pairs(tmp_path / "many", 8, seed=4)
    few, many = (
        load_labelled(str(tmp_path / n / "IMG"), str(tmp_path / n / "MASK"), READING, MaskRule(3))
        for n in ("few", "many")
    )
    known = [image.tobytes() for image in (*few.images, *many.images)]

    def drawn(step, count):
        batches = training_batches(few, 4, Augmentation("none"), 0, step, many, share)
        images = th.cat([next(batches)[0] for _ in range(count)])
        pixels = images.add(1).mul(127.5).round().to(th.uint8).movedim(1, -1).numpy()
        return [known.index(image.tobytes()) for image in pixels]

    found = drawn(0, 15)
    labelled = [i for i in found if i < 3]
    assert len(found) - len(labelled) == round(60 * share)
    assert all(set(labelled[i : i + 3]) == {0, 1, 2} for i in range(0, len(labelled) - 2, 3))
    assert drawn(7, 3) == found[28:40]


def test_an_epoch_sees_every_labelled_image_beside_the_synthetic_ones():
    settings = LearningConfig(epochs=2, synthetic_dir="some", synthetic_weight=0.75)
    assert settings.length(6) == (2, 12, 24)
