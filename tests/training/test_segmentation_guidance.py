"""Class maps that guide a diffusion network: the condition, training, sampling."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import draw_pairs
from PIL import Image
from sampling_util import DIFFUSION, NETWORK, write_trained

from guided_diffusion.images.files import split_folder
from guided_diffusion.networks.conditional import GuidedConfig, one_hot
from guided_diffusion.networks.trained import read_trained
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.sampling.mask_guidance import GuidedSampleConfig, guiding_masks
from guided_diffusion.training.guidance import ablated, guided_batches, open_guided_run

GUIDED = from_flags(
    GuidedConfig,
    {
        "segmentation_guided": True,
        "num_segmentation_classes": 3,
        "use_ablated_segmentations": True,
        "learn_sigma": False,
    },
    NETWORK,
)
FLAGS = (
    *("--image_size", 16, "--num_channels", 16, "--num_res_blocks", 1, "--num_heads", 2),
    *("--channel_mult", "1,2", "--attention_resolutions", "8", "--diffusion_steps", 50),
    *("--ema_rate", "0.9", "--batch_size", 2, "--log_interval", 100, "--sample_interval", 0),
)
GUIDE = ("--segmentation_guided", "True", "--num_segmentation_classes", 3)


@pytest.fixture
def model(tmp_path):
    diffusion = dataclasses.replace(DIFFUSION, learn_sigma=False)
    return write_trained(tmp_path / "run", GUIDED, diffusion, "segmentation_guided")


class TestCondition:
    def test_a_channel_for_each_class_but_the_background(self):
        masks = th.tensor([[[0, 1], [2, 255]]], dtype=th.uint8)
        expected = [[[0, 1], [0, 0]], [[0, 0], [1, 0]]]
        assert one_hot(masks, 3)[0].tolist() == expected

    def test_half_the_images_lose_from_one_to_all_classes(self):
        count, classes = 2000, 4
        condition = th.ones(count, classes, 2, 2, dtype=th.uint8)
        dropped = ablated(condition, 5, range(count))
        assert condition.all()  # the batch itself is left alone
        kept = dropped.amax(dim=(2, 3)).long()
        assert th.equal(kept, dropped.amin(dim=(2, 3)).long())  # whole channels
        shares = th.bincount(kept.sum(1), minlength=5) / count
        assert shares.tolist() == pytest.approx([1 / 8] * 4 + [1 / 2], abs=0.03)
        assert kept.float().mean(0).tolist() == pytest.approx([11 / 16] * 4, abs=0.04)

    def test_what_is_dropped_is_a_function_of_seed_and_number(self):
        condition = th.ones(6, 4, 1, 1, dtype=th.uint8)
        whole = ablated(condition, 5, range(10, 16))
        assert th.equal(whole[3:], ablated(condition[3:], 5, range(13, 16)))
        assert not th.equal(whole, ablated(condition, 6, range(10, 16)))

    def test_config_says_what_conditions(self):
        network = GUIDED.build()
        assert network.cond_channels == 2
        assert network.in_channels == 3
        assert network.out[2].out_channels == 1
        with pytest.raises(UserError, match="--num_segmentation_classes 1: count the classes"):
            dataclasses.replace(GUIDED, num_segmentation_classes=1).build()

    def test_layouts_of_folders(self, tmp_path):
        (tmp_path / "plain").mkdir()
        (tmp_path / "three" / "test").mkdir(parents=True)
        (tmp_path / "all" / "all" / "train").mkdir(parents=True)
        for name, split, found in (
            ("plain", "train", "plain"),
            ("three", "train", "three"),
            ("three", "test", "three/test"),
            ("all", "train", "all/all/train"),
        ):
            assert split_folder(str(tmp_path / name), split) == str(tmp_path / found)


class TestTraining:
    def test_train_resume_and_look(self, script, tmp_path, monkeypatch):
        for part in ("train", "test"):
            draw_pairs(tmp_path / part, 5, (16, 16))
            for kind, base in (("IMG", "DATA"), ("MASK", "SEG/all")):
                (tmp_path / base).mkdir(parents=True, exist_ok=True)
                (tmp_path / part / kind).rename(tmp_path / base / part)
        folders = ("--data_dir", tmp_path / "DATA", "--seg_dir", tmp_path / "SEG")
        flags = (*FLAGS, *GUIDE, *folders, "--use_ablated_segmentations", "True")
        for name, steps in (("whole", (3,)), ("halves", (2, 3))):
            monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / name))
            for most in steps:
                done = script("image_train.py", *flags, "--max_steps", most, "--sample_interval", 3)
                assert done.code == 0, done.err
        one, two = (
            checkpoint.load(str(tmp_path / name / "model000003.pt")) for name in ("whole", "halves")
        )
        assert all(th.equal(one[key], two[key]) for key in one)
        assert one["input_blocks.0.0.weight"][:, 1:].abs().max() > 0
        columns, rows = 2, 3
        picture = Image.open(tmp_path / "whole" / "samples_000003.png")
        assert picture.size == (columns * 18 + 2, rows * 18 + 2)
        config = json.loads((tmp_path / "whole" / "config.json").read_text())
        assert config["kind"] == "segmentation_guided"
        assert config["model"]["num_segmentation_classes"] == 3
        assert config["model"]["in_channels"] == 1

    def test_the_condition_is_what_the_network_is_trained_with(self, script, split, monkeypatch):
        """Masks of other classes train other weights; the same masks the same."""
        weights = []
        for other in (False, True):
            monkeypatch.setenv("OPENAI_LOGDIR", f"run{other}")
            masks = split / "TRAIN" / "MASK"
            if other:
                for path in masks.iterdir():
                    Image.fromarray(2 - np.asarray(Image.open(path))).save(path)
            flags = (*FLAGS, *GUIDE, "--max_steps", 2, "--seg_dir", masks)
            done = script("image_train.py", *flags, "--data_dir", split / "TRAIN" / "IMG")
            assert done.code == 0, done.err
            weights.append(checkpoint.load(f"run{other}/model000002.pt"))
        first = "input_blocks.0.0.weight"
        assert not th.equal(weights[0][first], weights[1][first])

    def test_what_would_start_from_random_weights_is_refused(self, script, split, monkeypatch):
        init = write_trained(split.parent / "plain")
        weights = th.load(init, weights_only=True)
        first = "input_blocks.0.0.weight"
        th.save({**weights, first: weights[first].repeat(1, 4, 1, 1)}, init)
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        folders = ("--data_dir", split / "TRAIN" / "IMG", "--seg_dir", split / "TRAIN" / "MASK")
        flags = (*folders, *GUIDE, *FLAGS[-6:], "--init_checkpoint", init, "--max_steps", 1)
        done = script("image_train.py", *flags)
        assert done.code == 2
        assert f"{first}, would start from random weights" in done.err

    @pytest.mark.parametrize("swap", ["1:2", "", "none"])
    def test_mirrored_masks_exchange_the_sides(self, script, split, monkeypatch, swap):
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        given = {"data_dir": str(split / "TRAIN/IMG"), "seg_dir": str(split / "TRAIN/MASK")}
        given |= {"segmentation_guided": True, "num_segmentation_classes": 3, "batch_size": 3}
        given |= {"image_size": 16, "channel_mult": "1,2", "num_channels": 32, "in_channels": 1}
        given |= {"random_flip": True, "flip_swap": swap}
        run = open_guided_run(given)
        logged = Path("run/log.txt").read_text()
        assert ("exchange left and right with --flip_swap" in logged) == (not swap)
        plain = {}
        for path in (split / "TRAIN/IMG").iterdir():
            mask = np.asarray(Image.open(split / "TRAIN/MASK" / path.name))[:, 2:18]
            plain[np.asarray(Image.open(path))[:, 2:18].tobytes()] = mask
        turned = 0
        for images, arguments in itertools.islice(guided_batches(run, 0), 4):
            pixels = ((images[:, 0] + 1) * 127.5).round().to(th.uint8).numpy()
            for image, condition in zip(pixels, arguments["cond"].numpy()):
                mirrored = image.tobytes() not in plain
                turned += mirrored
                mask = plain[(image[:, ::-1] if mirrored else image).tobytes()]
                own = np.stack([mask == 1, mask == 2])
                if mirrored:
                    own = own[:, :, ::-1][:: -1 if swap == "1:2" else 1]
                assert np.array_equal(condition, own)
        assert 0 < turned < 12

    def test_begin_from_a_network_without_condition(self, script, split, monkeypatch, tmp_path):
        init = write_trained(tmp_path / "plain")  # learns variances, as --init_checkpoint says
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        folders = ("--data_dir", split / "TRAIN" / "IMG", "--seg_dir", split / "TRAIN" / "MASK")
        flags = (*folders, *GUIDE, *FLAGS[-6:], "--ema_rate", "0.9", "--init_checkpoint", init)
        done = script("image_train.py", *flags, "--max_steps", 1, "--save_initial", "True")
        assert done.code == 0, done.err
        assert "fresh: 0; dropped: 0" in done.err
        theirs = checkpoint.load(str(init))
        ours = checkpoint.load("run/model000000.pt")
        first = "input_blocks.0.0.weight"
        assert all(th.equal(ours[key], theirs[key]) for key in theirs if key != first)
        assert th.equal(ours[first][:, :1], theirs[first])
        assert not ours[first][:, 1:].any()
        done = script("image_train.py", *flags, "--num_channels", 32, "--resume_checkpoint", "none")
        assert done.code == 2
        monkeypatch.setenv("OPENAI_LOGDIR", "run2")
        done = script("image_train.py", *flags, "--num_channels", 32)
        assert done.code == 2
        assert "--num_channels 32 contradicts config.json" in done.err

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (GUIDE, "--seg_dir is missing"),
            ((*GUIDE[:2], "--seg_dir", "MASK"), "--num_segmentation_classes 0: count"),
            ((*GUIDE[:3], 2, "--seg_dir", "MASK"), "holds the values {0, 1, 2}; 2 classes"),
            ((*GUIDE, "--flip_swap", "1:9", "--seg_dir", "MASK"), "--flip_swap names class 9"),
            (("--flip_swap", "1:2"), "--flip_swap requires --segmentation_guided True"),
            (("--seg_dir", "MASK"), "--seg_dir requires --segmentation_guided True"),
            ((*GUIDE, "--seg_dir", "OTHER"), "differ in size"),
        ],
    )
    def test_what_is_wrong_is_said_before_the_run(self, script, split, monkeypatch, flags, said):
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        base = split / "TRAIN"
        (base / "OTHER").mkdir()
        for path in (base / "MASK").iterdir():
            Image.new("L", (5, 5)).save(base / "OTHER" / path.name)
        flags = [base / f if f in ("MASK", "OTHER") else f for f in flags]
        flags += ["--max_steps", 1, "--data_dir", base / "IMG"]
        done = script("image_train.py", *FLAGS, *flags)
        assert done.code == 2
        assert said in done.err
        assert not (split.parent / "run").exists()


class TestSampling:
    def sample(self, script, model, *flags):
        done = script("image_sample.py", "--model_path", model, "--steps", 3, *flags)
        assert done.code == 0, done.err
        return done

    @staticmethod
    def images(folder):
        return {p.stem: np.asarray(Image.open(p)) for p in sorted((folder / "IMG").iterdir())}

    @pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m", "heun", "unipc"])
    def test_every_sampler_makes_an_image_for_every_mask(self, script, model, split, sampler):
        masks = ("--seg_dir", split / "TRAIN" / "MASK", "--out_dir", "out")
        flags = ("--timestep_respacing", "3") if sampler == "ddpm" else ()
        self.sample(script, model, *masks, "--sampler", sampler, *flags)
        out = split.parent / "out"
        names = ["r0.png", "r1.png", "r2.png"]
        for part in ("IMG", "MASK"):
            assert sorted(path.name for path in (out / part).iterdir()) == names
        for name in names:
            assert Image.open(out / "IMG" / name).size == (16, 16)
            guide = np.asarray(Image.open(out / "MASK" / name))
            own = np.asarray(Image.open(split / "TRAIN" / "MASK" / name))
            assert np.array_equal(guide, own[:, 2:18])  # 16 x 20, cropped as images are

    def test_images_do_not_depend_on_the_batch_and_interrupted_runs_go_on(
        self, script, model, split
    ):
        flags = ("--seg_dir", split / "TRAIN" / "MASK", "--samples_per_mask", 2, "--use_ddim")
        self.sample(script, model, *flags, "--out_dir", "one")
        self.sample(script, model, *flags, "--out_dir", "two", "--batch_size", 4)
        one, two = (self.images(split.parent / name) for name in ("one", "two"))
        assert list(one) == [f"r{i}_{j}" for i in range(3) for j in range(2)]
        assert all(np.array_equal(one[name], two[name]) for name in one)
        assert not np.array_equal(one["r0_0"], one["r0_1"])
        (split.parent / "one" / "IMG" / "r1_1.png").unlink()
        done = self.sample(script, model, *flags, "--out_dir", "one")
        assert "5 are there already" in done.err
        assert np.array_equal(self.images(split.parent / "one")["r1_1"], two["r1_1"])

    def test_the_mask_the_open_classes_and_the_scale_decide_the_image(self, script, model, split):
        base = ("--seg_dir", split / "TRAIN" / "MASK", "--sampler", "dpm++2m", "--num_samples", 1)
        out = split.parent
        for name, flags in (
            ("plain", ()),
            ("open", ("--ablate_classes", "1")),
            ("none", ("--ablate_classes", "1,2")),
            ("scaled", ("--guidance_scale", 3)),
        ):
            self.sample(script, model, *base, *flags, "--out_dir", name)
        self.sample(script, model, *base[2:], "--out_dir", "unguided")
        images = {n: self.images(out / n)["r0"] for n in ("plain", "open", "none", "scaled")}
        assert len({image.tobytes() for image in images.values()}) == 4
        assert set(np.unique(Image.open(out / "open" / "MASK" / "r0.png"))) == {0, 2}
        unguided = np.asarray(Image.open(out / "unguided" / "png" / "000000.png"))
        assert np.array_equal(unguided, images["none"])  # all classes open: no guidance

    def test_a_folder_of_other_images_is_left_alone(self, script, model, split):
        flags = ("--seg_dir", split / "VAL" / "MASK", "--steps", 3)
        before = self.images(split / "TRAIN")
        done = script(
            "image_sample.py", "--model_path", model, *flags, "--out_dir", split / "TRAIN"
        )
        assert done.code == 2
        assert "images of another command" in done.err
        after = self.images(split / "TRAIN")
        assert all(np.array_equal(before[name], after[name]) for name in before)

    def test_what_a_network_cannot_do_is_said(self, script, tmp_path, split):
        masks = str(split / "TRAIN" / "MASK")
        plain = read_trained(str(write_trained(tmp_path / "plain")), {})
        with pytest.raises(UserError, match="trained without --segmentation_guided True"):
            guiding_masks(GuidedSampleConfig(seg_dir=masks), plain)
        done = script("image_sample.py", "--model_path", plain.path, *GUIDE)
        assert "trained without --segmentation_guided True" in done.err
        whole = dataclasses.replace(GUIDED, use_ablated_segmentations=False)
        path = write_trained(tmp_path / "whole", whole, kind="segmentation_guided")
        whole = read_trained(str(path), {}, "segmentation_guided")
        assert guiding_masks(GuidedSampleConfig(seg_dir=masks), whole).names == ("r0", "r1", "r2")
        for settings in (
            GuidedSampleConfig(),
            GuidedSampleConfig(seg_dir=masks, ablate_classes="1"),
        ):
            with pytest.raises(UserError, match="trained without --use_ablated_segmentations"):
                guiding_masks(settings, whole)
        with pytest.raises(UserError, match="--ablate_classes 3: expected numbers from 1 to 2"):
            guiding_masks(GuidedSampleConfig(seg_dir=masks, ablate_classes="3"), whole)
        Image.fromarray(np.full((4, 4), 3, np.uint8)).save(split / "TRAIN" / "MASK" / "bad.png")
        with pytest.raises(UserError, match=r"bad\.png holds the values \{3\}; 3 classes"):
            guiding_masks(GuidedSampleConfig(seg_dir=masks), whole)
