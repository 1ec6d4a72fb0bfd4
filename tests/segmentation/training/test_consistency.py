"""Learning from radiographs without masks, and from synthetic pairs."""

import csv
import math
import signal

import numpy as np
import pytest
import torch as th
from conftest import draw_pairs
from finetuning_util import folders

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.masks import MaskRule
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.segmentation.training import loop
from guided_diffusion.segmentation.training.augment import Augmentation
from guided_diffusion.segmentation.training.consistency import (
    Consistency,
    consistency_loss,
    load_unlabelled,
)
from guided_diffusion.segmentation.training.dataset import load_labelled, training_batches
from guided_diffusion.segmentation.training.learning import LearningConfig

READING = ReadingConfig(32, 1, "pad")


@pytest.fixture
def unlabelled(tmp_path):
    draw_pairs(tmp_path / "more", 5, seed=7)
    return tmp_path / "more" / "IMG"


def consistency(folder, reading=READING, **settings):
    defaults = {"batch_size": 3, "confidence": 0.8, "weight": 2.0, "ramp": 10, "seed": 0}
    return Consistency(load_unlabelled(str(folder), reading), **{**defaults, **settings})


class TestViews:
    def test_they_differ_in_grey_and_agree_in_place(self, unlabelled):
        found = consistency(unlabelled)
        unlike, alike = [], []
        for step in range(12):
            weak, strong, masks = found.views(step)
            assert weak.shape == strong.shape == (3, 1, 32, 32)
            assert masks.shape == (3, 32, 32)
            for one, other in zip(weak, strong):
                unlike.append(float((one - other).abs().mean()))
                alike.append(np.corrcoef(one.ravel(), other.ravel())[0, 1])
        assert np.mean(unlike) > 0.05
        assert np.median(alike) > 0.9

    def test_they_are_a_function_of_the_step(self, unlabelled):
        one, other = consistency(unlabelled), consistency(unlabelled)
        other.views(0)
        assert all(th.equal(a, b) for a, b in zip(one.views(4), other.views(4)))
        assert not th.equal(one.views(3)[1], one.views(4)[1])

    def test_the_padding_has_no_label(self, unlabelled):
        found = consistency(unlabelled, ReadingConfig(20, 1, "pad"))
        found.weak = found.strong = Augmentation("none")
        weak, _, masks = found.views(0)
        assert (masks == IGNORE).sum() == 3 * 4 * 20
        assert (weak[masks[:, None] == IGNORE] == -1).all()

    def test_native_size_is_seen_in_windows(self, unlabelled):
        weak, strong, _ = consistency(unlabelled, ReadingConfig(8, 1, "native")).views(0)
        assert weak.shape == strong.shape == (3, 1, 8, 8)


def test_the_teacher_labels_what_it_is_sure_of(unlabelled):
    found = consistency(unlabelled)
    scores = th.log(th.tensor([[0.85, 0.1, 0.05], [0.5, 0.4, 0.1], [0.05, 0.05, 0.9]]))
    scores = scores.T[None, :, :, None]
    masks = th.tensor([[[0], [0], [0]]])
    assert found.labels(scores, masks).flatten().tolist() == [0, IGNORE, 2]
    masks[0, 0] = IGNORE
    assert found.labels(scores, masks).flatten().tolist() == [IGNORE, IGNORE, 2]


def test_the_loss_counts_all_pixels_and_learns_from_the_sure_ones():
    scores = th.zeros(1, 2, 1, 4, requires_grad=True)
    loss = consistency_loss(scores, th.tensor([[[1, IGNORE, IGNORE, IGNORE]]]))
    assert float(loss.detach()) == pytest.approx(math.log(2) / 4)
    loss.backward()
    assert (scores.grad[..., 0] != 0).all()
    assert (scores.grad[..., 1:] == 0).all()
    nothing = consistency_loss(scores, th.full((1, 1, 4), IGNORE))
    assert float(nothing.detach()) == 0


def test_the_weight_rises(unlabelled):
    found = consistency(unlabelled)
    assert found.weight(0) == pytest.approx(2 * math.exp(-5))
    assert found.weight(5) == pytest.approx(2 * math.exp(-5 / 4))
    assert found.weight(10) == found.weight(99) == 2
    assert consistency(unlabelled, ramp=0).weight(0) == 2


def test_runs_with_everything_on_go_on_exactly(
    script, pretrained, split, unlabelled, tmp_path, monkeypatch
):
    argv = [pretrained, *folders(split), "--steps", 6, "--lr", 1e-3, "--dropout", 0.1]
    argv += ["--ema_rate", 0.9, "--layer_decay", 0.8, "--head_lr_scale", 3, "--weight_decay", 0.1]
    argv += ["--timestep_range", "0,9", "--noise_at_timestep", "--augmentation", "strong"]
    argv += ["--unlabeled_dir", unlabelled, "--unlabeled_batch_size", 3, "--confidence", 0.4]
    argv += ["--unlabeled_method", "consistency"]
    argv += ["--synthetic_dir", unlabelled.parent, "--microbatch", 2, "--unlabeled_ramp", 0.5]
    ended = script("finetune.py", *argv, "--weights_save", "whole/segm.pth")
    assert ended.code == 0, ended.err
    assert "5 synthetic images" in ended.out
    assert "5 unlabelled images" in ended.out
    rows = list(csv.DictReader((tmp_path / "whole/segm_logs/progress.csv").open()))
    assert {"unlabeled_loss", "unlabeled_sure"} <= rows[0].keys()
    assert float(rows[-1]["unlabeled_sure"]) > 0

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
    assert "resuming after epoch 1" in ended.out
    for name in ("segm.pth", "segm_last.pth"):
        one, other = (th.load(f"{f}/{name}", weights_only=True) for f in ("whole", "parts"))
        assert one["best"] == other["best"]
        for part in ("state_dict", *(["ema"] if "last" in name else [])):
            assert all(th.equal(one[part][k], other[part][k]) for k in one[part])


def test_unlabelled_radiographs_change_the_network(script, pretrained, split, unlabelled):
    argv = [pretrained, *folders(split)[:2], "--steps", 2, "--unlabeled_method", "consistency"]
    argv += ["--ema_rate", 0.9]
    for name, flags in (("without", []), ("with", ["--unlabeled_dir", unlabelled])):
        more = ["--confidence", 0.3, "--unlabeled_ramp", 0, "--weights_save", f"{name}.pth"]
        ended = script("finetune.py", *argv, *flags, *more)
        assert ended.code == 0, ended.err
    one, other = (th.load(f"{n}.pth", weights_only=True)["state_dict"] for n in ("with", "without"))
    assert not all(th.equal(one[k], other[k]) for k in one)
    ended = script("finetune.py", *argv[:-2], "--ema_rate", 0, "--unlabeled_dir", unlabelled)
    assert ended.code == 2
    assert "--ema_rate" in ended.err


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
