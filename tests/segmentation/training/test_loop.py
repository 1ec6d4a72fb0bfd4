"""The training loop of fine-tuning: microbatches, and which network is the best."""

from pathlib import Path

import numpy as np
import pytest
import torch as th
from finetuning_util import folders
from golden_util import fill_parameters
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.runtime.command_line.parsing import parse_flags
from guided_diffusion.segmentation.model_file import load_model
from guided_diffusion.segmentation.training import losses
from guided_diffusion.segmentation.training.config import finetune_flags
from guided_diffusion.segmentation.training.dataset import LabelledImages
from guided_diffusion.segmentation.training.finetune import prepare
from guided_diffusion.segmentation.training.loop import Finetuner


@pytest.fixture
def finetuner(script, pretrained, split):
    """Prepares a fine-tuning of the given flags, in full precision."""

    def prepare_with(*flags):
        argv = map(str, [pretrained, *folders(split), "--augmentation", "none", *flags])
        found = prepare(parse_flags(finetune_flags(), [*argv, "--resume_checkpoint", "none"]))
        logger.reset()
        return found

    return prepare_with


class TestMicrobatches:
    """Images that show unlike classes and unlike amounts of padding."""

    masks = th.tensor(np.random.default_rng(0).choice([0, 1, 2, IGNORE], (5, 16, 16)))
    masks[0] = IGNORE
    masks[1, :12] = IGNORE
    masks[2, masks[2] == 2] = 0
    images = th.randn(5, 1, 16, 16, generator=th.Generator().manual_seed(0)).clamp(-1, 1)

    def gradients(self, tuner):
        fill_parameters(tuner.model)
        tuner._accumulate_labelled(0, self.images, self.masks)
        assert logger.getkvs()["loss"] > 0.5
        return {n: p.grad.clone() for n, p in tuner.model.named_parameters()}

    @pytest.mark.parametrize("loss", losses.LOSSES)
    def test_their_gradients_are_those_of_the_batch(self, finetuner, folder, loss):
        flags = ["--batch_size", 5, "--loss", loss, "--class_weighting", "inverse"]
        whole = self.gradients(finetuner(*flags))
        logged = logger.dumpkvs()["loss"]
        largest = max(float(grad.abs().max()) for grad in whole.values())
        for microbatch in (1, 2, 3, 5):
            parts = self.gradients(finetuner(*flags, "--microbatch", microbatch))
            assert logger.dumpkvs()["loss"] == pytest.approx(logged, rel=1e-5)
            for name, grad in whole.items():
                th.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-5 * largest)

    def test_validation_does_not_depend_on_them(self, finetuner, split):
        found = []
        for microbatch in (-1, 1, 3):
            tuner = finetuner("--batch_size", 5, "--microbatch", microbatch)
            data = LabelledImages(("a",) * 5, normalized(self.images), list(numpy_u8(self.masks)))
            fill_parameters(tuner.model)
            confusion, loss = tuner._evaluate(data)
            found.append((confusion.tolist(), pytest.approx(loss, rel=1e-5)))
        assert found[0] == found[1] == found[2]

    def test_running_statistics_see_each_image_once(self, finetuner, folder):
        tuner = finetuner("--batch_size", 5, "--microbatch", 2)
        tuner.model.out.insert(1, th.nn.BatchNorm2d(32))
        tuner.model.train()
        tuner._accumulate_labelled(0, self.images, self.masks)
        assert tuner.model.out[1].num_batches_tracked == 3


def normalized(images):
    return list(((images.movedim(1, -1) + 1) * 127.5).round().to(th.uint8).numpy())


def numpy_u8(masks):
    return masks.numpy().astype(np.uint8)


class TestChoice:
    """Which network is the best."""

    @staticmethod
    def best_epoch(tuner, *epochs):
        """:param epochs: per epoch, the pixels of class 1 found of 10, and the loss."""
        results = iter(epochs)

        def evaluate(data):
            found, loss = next(results)
            return np.array([[50, 0, 0], [10 - found, found, 0], [0, 0, 0]]), loss

        tuner._evaluate = evaluate
        for _ in epochs:
            tuner.epoch += 1
            tuner._validate()
        return tuner.best["epoch"]

    def test_the_first_of_equal_scores_but_the_least_loss_while_nothing_is_found(
        self, finetuner, folder
    ):
        nan, inf = float("nan"), float("inf")
        choose = self.best_epoch
        assert choose(finetuner(), (1, 1.0), (5, 3.0), (5, 2.0), (4, 1.0)) == 2
        assert choose(finetuner(), (0, 3.0), (0, 2.0), (0, 2.5)) == 2
        assert choose(finetuner(), (0, 1.0), (1, 2.0), (0, 0.5)) == 2
        assert choose(finetuner(), (0, nan), (1, 2.0), (9, nan), (9, inf)) == 2

    def test_a_class_that_no_mask_shows_does_not_count(self, finetuner, folder):
        tuner = finetuner()
        tuner._evaluate = lambda data: (np.array([[40, 0, 1], [0, 10, 0], [0, 0, 0]]), 1.0)
        tuner._validate()
        assert tuner.best["mean_iou"] == 1
        assert np.isnan(tuner.best["iou"][2])

    def test_without_a_finite_loss_nothing_is_saved(self, script, pretrained, split, monkeypatch):
        def evaluate(self, data):
            return np.eye(3, dtype=int), float("nan")

        monkeypatch.setattr(Finetuner, "_evaluate", evaluate)
        ended = script("finetune.py", pretrained, *folders(split), "--epochs", 2)
        assert ended.code == 2
        assert "never finite" in ended.err
        assert not Path("segm.pth").exists()


def blacken(folder, *names):
    for path in folder.iterdir():
        if not names or path.stem in names:
            mask = np.asarray(Image.open(path))
            Image.fromarray(np.zeros_like(mask)).save(path)


@pytest.mark.parametrize("part", ["TRAIN", "VAL"])
@pytest.mark.parametrize("command", ["finetune.py", "mask_diffusion_train.py"])
def test_masks_without_foreground_are_refused(script, pretrained, split, part, command):
    blacken(split / part / "MASK")
    first = [pretrained] if command == "finetune.py" else []
    flags = ["--out_channels", 3, "--weights_save", "out/segm.pth"]
    ended = script(command, *first, *folders(split), *flags)
    assert ended.code == 2
    assert f"{part}/MASK: the masks (r0, r1" in ended.err
    assert "show no class but the background" in ended.err
    assert ended.err.count("\n") == 1
    assert not Path("out").exists()


def test_a_class_absent_from_validation_is_named(script, pretrained, split):
    for path in (split / "VAL/MASK").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(path)
    argv = [pretrained, *folders(split), "--epochs", 1, "--out_channels", 3]
    ended = script("finetune.py", *argv)
    assert ended.code == 0, ended.err
    assert "absent from all validation masks, so not in the mean scores: class 2" in ended.err
    assert "cannot be learnt" not in ended.err


def test_a_mask_without_a_class_of_the_others_is_named(script, pretrained, split):
    path = split / "TRAIN/MASK/r1.png"
    mask = np.asarray(Image.open(path))
    Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(path)
    argv = [pretrained, *folders(split)[:2], "--epochs", 1, "--out_channels", 3]
    ended = script("finetune.py", *argv)
    assert ended.code == 0, ended.err
    assert "classes missing from some masks: class 2 (from r1). If they can be seen" in ended.err
    unknown = ("--absent_classes", "unknown", "--weights_save", "unknown.pth")
    assert script("finetune.py", *argv, *unknown).code == 0
    one, other = (load_model(name)[0].state_dict() for name in ("segm.pth", "unknown.pth"))
    assert not all(th.equal(one[name], other[name]) for name in one)


def test_images_held_out_need_foreground(script, split):
    pytest.importorskip("segmentation_models_pytorch")
    blacken(split / "TRAIN/MASK", "r0", "r1")
    argv = [*folders(split)[:2], "--out_channels", 3, "--validation", 34, "--steps", 1]
    ended = [script("baseline_train.py", *argv, "--seed", seed) for seed in range(4)]
    assert {e.code for e in ended} == {2}
    assert all("show no class but the background" in e.err for e in ended)
