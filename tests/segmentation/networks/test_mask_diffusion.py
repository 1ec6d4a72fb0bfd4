"""The diffusion that draws masks: what is diffused, drawing, training, the model file."""

import dataclasses
import json

import numpy as np
import pytest
import torch as th
from conftest import draw_pairs
from mask_diffusion_util import build, config_of
from PIL import Image
from sampling_util import DIFFUSION, write_trained

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.model_file import load_model, save_model
from guided_diffusion.segmentation.networks.mask_diffusion import (
    decode,
    describe,
    encode,
)
from guided_diffusion.segmentation.training.mask_training import prepare

FLAGS = (
    *("--image_size", 16, "--num_channels", 16, "--num_res_blocks", 1, "--num_heads", 2),
    *("--channel_mult", "1,2", "--attention_resolutions", "8", "--diffusion_steps", 50),
    *("--ema_rate", "0.9", "--batch_size", 4, "--log_interval", 100),
)


def images(count=2, size=(16, 16)):
    return th.from_numpy(np.random.default_rng(0).uniform(-1, 1, (count, 1, *size))).float()


class TestWhatIsDiffused:
    def test_one_channel_a_class(self):
        masks = th.tensor([[[0, 1, 2], [2, 0, 255]]], dtype=th.uint8)
        x = encode(masks, 3)
        assert x.shape == (1, 3, 2, 3)
        assert x.unique().tolist() == [-1, 1]
        assert x.argmax(1).tolist() == [[[0, 1, 2], [2, 0, 0]]]  # no class: background

    def test_one_channel_is_enough_for_two_classes(self):
        x = encode(th.tensor([[[0, 1, 255]]]), 2)
        assert x.tolist() == [[[[-1, 1, -1]]]]
        assert decode(x).argmax(1).tolist() == [[[0, 1, 0]]]

    @pytest.mark.parametrize("classes", [2, 3, 7])
    def test_decoding_gives_probabilities(self, classes):
        masks = th.randint(classes, (2, 4, 5), generator=th.Generator().manual_seed(0))
        exact = decode(encode(masks, classes))
        assert th.equal(exact.argmax(1), masks)
        assert exact.amax(1).min() > 0.9999
        noise = th.randn(2, 1 if classes == 2 else classes, 4, 5)
        shares = decode(noise)
        assert shares.shape == (2, classes, 4, 5)
        assert shares.min() > 0
        assert th.allclose(shares.sum(1), th.ones(2, 4, 5))

    @pytest.mark.parametrize("classes", [2, 3])
    def test_decoding_is_the_posterior_of_a_normal_error(self, classes):
        masks = th.arange(classes)[:, None, None]  # each class's own map, of one pixel
        maps = encode(masks, classes).flatten(1)
        drawn = th.tensor([-0.3, 0.2, -0.9])[: maps.shape[1]]
        distance = (drawn - maps).square().sum(1)
        expected = (-distance / (2 * 0.4**2)).softmax(0)
        assert th.allclose(decode(drawn[None, :, None, None]).flatten(), expected)

    def test_the_highest_channel_wins_though_none_comes_near_one(self):
        drawn = th.tensor([-1.0, -0.95, -0.9])[None, :, None, None]
        assert decode(drawn).argmax(1).item() == 2


class TestDrawing:
    def test_masks_depend_on_radiograph_seed_and_number_alone(self):
        model, x = build(num_samples=3), images(3)
        draws = model.draws(x)
        assert draws.shape == (3, 3, 3, 16, 16)
        slope = 2 / 0.4**2  # of the probabilities' logarithms in what is drawn
        assert th.allclose(model.draws(x[1:2]), draws[:, 1:2], atol=1e-5 * slope)
        assert not th.allclose(draws[0], draws[1], atol=0.01)
        assert not th.allclose(draws[0, 0], draws[0, 1], atol=0.01)
        model.num_samples = 2
        assert th.equal(model.draws(x), draws[:2])
        model.seed = 1
        assert not th.allclose(model.draws(x), draws[:2], atol=0.01)

    @pytest.mark.parametrize("sampler", ["ddim", "heun", "unipc"])
    def test_forward_is_the_logarithm_of_their_mean(self, sampler):
        model, x = build(num_samples=2, sampler=sampler), images(size=(9, 14))
        scores = model(x)
        assert scores.shape == (2, 3, 9, 14)
        assert th.allclose(scores.softmax(1), model.draws(x).mean(0), atol=1e-5)

    def test_the_model_file_holds_all_of_it(self, tmp_path):
        model, path = build(2, num_samples=2), str(tmp_path / "segm.pth")
        config = describe(config_of(2), DIFFUSION, ReadingConfig(16, 1), generic_categories(2))
        save_model(path, config, model.state_dict())
        loaded, read, _ = load_model(path)
        assert read.kind == "mask_diffusion"
        loaded.num_samples, loaded.steps = 2, 4
        assert th.equal(loaded(images()), model(images()))


class TestTraining:
    def train(self, script, split, *flags, **env):
        folders = [split / part / kind for part in ("TRAIN", "VAL") for kind in ("IMG", "MASK")]
        done = script("mask_diffusion_train.py", *folders, *FLAGS, *flags)
        assert done.code == 0, done.err
        return done

    def test_train_resume_look_and_predict(self, script, split, monkeypatch, tmp_path):
        for name, steps in (("whole", (3,)), ("halves", (2, 3))):
            monkeypatch.setenv("OPENAI_LOGDIR", name)
            for most in steps:
                done = self.train(script, split, "--max_steps", most, "--sample_interval", 3)
        assert "step 3: mean Dice of the foreground" in done.err
        one, two = (checkpoint.load(f"{name}/model000003.pt") for name in ("whole", "halves"))
        assert all(th.equal(one[key], two[key]) for key in one)
        config = json.loads((tmp_path / "whole" / "config.json").read_text())
        assert config["kind"] == "mask_diffusion"
        assert config["model"]["num_segmentation_classes"] == 3
        columns, rows = 5, 2
        picture = Image.open(tmp_path / "whole" / "samples_000003.png")
        assert picture.size == (columns * 18 + 2, rows * 18 + 2)
        model = load_model("whole/segm.pth")[0]
        averaged = checkpoint.load("whole/ema_0.9_000003.pt")
        assert all(th.equal(model.network.state_dict()[key], averaged[key]) for key in averaged)
        done = script("predict.py", "whole/segm.pth", split / "VAL" / "IMG", "out")
        assert done.code == 0, done.err
        assert Image.open(tmp_path / "out" / "MASK" / "r0.png").size == (20, 16)
        val = (split / "VAL" / "IMG", split / "VAL" / "MASK")
        done = script("evaluate.py", *val, "--model", "whole/segm.pth")
        assert done.code == 0, done.err
        done = script("image_sample.py", "--model_path", "whole/model000003.pt")
        assert done.code == 2
        assert "it is for scripts/predict.py" in done.err

    def test_it_learns_what_the_radiograph_shows(self, script, tmp_path, monkeypatch):
        draw_pairs(tmp_path / "Split" / "TRAIN", 24, (16, 16))
        draw_pairs(tmp_path / "Split" / "VAL", 6, (16, 16), seed=1)
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        flags = ("--max_steps", 60, "--lr", 4e-3, "--batch_size", 8)
        flags += ("--augmentation", "none", "--sample_interval", 60)
        done = self.train(script, tmp_path / "Split", *flags)
        dice = float(done.err.split("mean Dice of the foreground ")[1].split()[0])
        assert dice > 0.8

    @pytest.mark.parametrize(("before", "now"), [("crop", "pad"), ("squash", "squash")])
    def test_begin_from_a_network_that_has_seen_radiographs(
        self, script, split, monkeypatch, tmp_path, before, now
    ):
        init = write_trained(tmp_path / "plain")
        stored = checkpoint.read_config(str(init))
        stored["reading"]["resize"] = before
        checkpoint.write_config(str(init.parent), stored)
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        folders = (split / "TRAIN" / "IMG", split / "TRAIN" / "MASK")
        flags = ("--init_checkpoint", init, "--max_steps", 1, "--save_initial", "True")
        done = script("mask_diffusion_train.py", *folders, *flags, "--ema_rate", "0.9")
        assert done.code == 0, done.err
        assert "fresh: 2 (out.2); dropped: 2 (out.2)" in done.err
        theirs = checkpoint.load(str(init))
        ours = checkpoint.load("run/model000000.pt")
        first = "input_blocks.0.0.weight"
        assert th.equal(ours[first][:, 3:], theirs[first])
        assert not ours[first][:, :3].any()
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["diffusion"]["diffusion_steps"] == DIFFUSION.diffusion_steps
        assert config["reading"]["resize"] == now

    def test_masks_in_black_and_white_and_pictures_of_the_process(
        self, script, split, monkeypatch, tmp_path
    ):
        for path in split.rglob("MASK/*.png"):
            grey = np.asarray(Image.open(path))
            Image.fromarray(np.array([0, 200, 255], np.uint8)[grey]).save(path)
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        flags = ("--max_steps", 1, "--sample_interval", 1, "--visualize_process", "True")
        self.train(script, split, *flags, "--mask_threshold", 220, "--weights_save", "m/my.pth")
        model, config, _ = load_model("m/my.pth")
        assert len(config.categories) == 2
        assert model.network.out[2].out_channels == 1
        strip = Image.open(tmp_path / "m" / "my_logs" / "process_000001.png")
        assert strip.size[0] > 2 * strip.size[1]
        assert Image.open(tmp_path / "m" / "my_logs" / "process_000001.gif").n_frames == 16

    def test_the_threshold_decides_the_class(self, monkeypatch, tmp_path):
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
        draw_pairs(tmp_path, 1, (16, 16))
        values = np.tile(np.array([0, 150, 151, 255], np.uint8), (16, 4))
        Image.fromarray(values).save(tmp_path / "MASK" / "r0.png")
        overrides = {
            "image_size": 16,
            "mask_threshold": 150,
            "channel_mult": "1,2",
            "num_channels": 32,
        }
        overrides |= {"train_img": str(tmp_path / "IMG"), "train_mask": str(tmp_path / "MASK")}
        run = prepare(overrides)
        assert np.array_equal(run.train.masks[0], values > 150)
        values = np.where(values > 150, 255, 0).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / "MASK" / "r0.png")
        run = prepare({**overrides, "binary": True, "mask_threshold": -1})
        assert np.array_equal(run.train.masks[0], values > 0)

    def test_batches_are_a_function_of_seed_and_step(self, split, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        overrides = {"image_size": 16, "channel_mult": "1,2", "num_channels": 32, "batch_size": 4}
        overrides["train_img"], overrides["train_mask"] = (
            str(split / "TRAIN" / kind) for kind in ("IMG", "MASK")
        )
        run = prepare(overrides)
        batches = run.batches(0)
        seen = [next(batches) for _ in range(3)]
        later, cond = next(run.batches(2))
        assert th.equal(later, seen[2][0])
        assert th.equal(cond["cond"], seen[2][1]["cond"])
        assert not th.equal(seen[0][1]["cond"], seen[1][1]["cond"])
        assert later.shape == (4, 3, 16, 16)
        assert cond["cond"].shape == (4, 1, 16, 16)
        train = dataclasses.replace(run.diffusion_run.train, seed=1)
        reseeded = dataclasses.replace(run.diffusion_run, train=train)
        other = dataclasses.replace(run, diffusion_run=reseeded)
        assert not th.equal(next(other.batches(2))[1]["cond"], cond["cond"])

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--num_segmentation_classes", 2), "holds the values {0, 1, 2}; 2 classes allow"),
            (("--random_flip", "True"), "--random_flip has no effect here: --flip mirrors"),
            (("--mask_threshold", 9, "--out_channels", 3), "--mask_threshold makes two classes"),
            (("--flip_swap", "1"), "--flip_swap 1: expected pairs"),
        ],
    )
    def test_what_is_wrong_is_said_before_the_run(self, script, split, monkeypatch, flags, said):
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        folders = (split / "TRAIN" / "IMG", split / "TRAIN" / "MASK")
        done = script("mask_diffusion_train.py", *folders, *FLAGS, *flags, "--max_steps", 1)
        assert done.code == 2
        assert said in done.err
        assert not (split.parent / "run").exists()
