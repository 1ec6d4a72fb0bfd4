"""Super-resolution: the condition, training, resuming, sampling."""

import dataclasses
import json

import numpy as np
import pytest
import torch as th
from PIL import Image
from sampling_util import CLASSES, arrays, write_shapes, write_trained
from sampling_util import NETWORK as IMAGE_NETWORK

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig, SuperResConfig
from guided_diffusion.runtime.command_line.flags import from_mapping
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.sampling.super_res import load_base_samples
from guided_diffusion.training.super_res import with_low_res

NETWORK = from_mapping(
    SuperResConfig,
    {**vars(IMAGE_NETWORK), "learn_sigma": False, "large_size": 16, "small_size": 8},
)
DIFFUSION = DiffusionConfig(diffusion_steps=50)
FLAGS = (
    *("--large_size", 16, "--small_size", 8, "--num_channels", 16, "--num_res_blocks", 1),
    *("--num_heads", 2, "--channel_mult", "1,2", "--attention_resolutions", "8"),
    *("--diffusion_steps", 50, "--ema_rate", "0.9", "--batch_size", 4, "--log_interval", 100),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def write_base(path, size=8, channels=1, labels=None):
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, channels), np.uint8)
    np.savez(path, images, *([] if labels is None else [np.array(labels)]))
    return path


class TestTheCondition:
    def test_it_is_the_image_averaged_down(self):
        images = th.arange(32.0).reshape(2, 1, 4, 4)
        ((same, cond),) = with_low_res(iter([(images, {"y": th.tensor([1, 0])})]), 2)
        assert th.equal(same, images)
        assert cond["y"].tolist() == [1, 0]
        assert cond["low_res"][0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]

    def test_small_images_from_an_npz_file(self, tmp_path):
        path = write_base(tmp_path / "small.npz", labels=[1, 0, 1])
        images, labels = load_base_samples(str(path), ReadingConfig(16, 1), 8, CLASSES)
        assert images.shape == (3, 1, 8, 8)
        assert labels == [1, 0, 1]
        pixels = arrays(path)["arr_0"][1, :, :, 0]
        assert np.allclose((images[1, 0].numpy() + 1) * 127.5, pixels, atol=1e-4)

    def test_small_images_from_a_folder(self, shapes):
        images, labels = load_base_samples(str(shapes), ReadingConfig(16, 1), 8, CLASSES)
        assert images.shape == (8, 1, 8, 8)
        assert labels == [0, 0, 0, 0, 1, 1, 1, 1]
        assert load_base_samples(str(shapes), ReadingConfig(16, 1), 8, ("bar",))[1] is None

    @pytest.mark.parametrize(("size", "channels", "found"), [(4, 1, "4x4x1"), (8, 3, "8x8x3")])
    def test_they_must_be_what_the_network_takes(self, tmp_path, size, channels, found):
        path = write_base(tmp_path / "small.npz", size, channels)
        with pytest.raises(UserError, match=f"images are {found}, the network takes 8x8x1"):
            load_base_samples(str(path), ReadingConfig(16, 1), 8, ())

    def test_there_must_be_some(self, tmp_path):
        with pytest.raises(UserError, match="--base_samples is missing"):
            load_base_samples("", ReadingConfig(16, 1), 8, ())
        (tmp_path / "x.npz").write_bytes(b"no archive")
        with pytest.raises(UserError, match=r"x\.npz is not an \.npz file"):
            load_base_samples(str(tmp_path / "x.npz"), ReadingConfig(16, 1), 8, ())


class TestConfig:
    def test_sizes_that_make_no_sense(self):
        with pytest.raises(UserError, match="--small_size 32 and --large_size 16"):
            SuperResConfig(large_size=16, small_size=32)

    def test_large_networks_have_six_levels(self):
        assert SuperResConfig().mult() == (1, 1, 2, 2, 4, 4)
        assert SuperResConfig(large_size=512, small_size=128).mult() == (1, 1, 2, 2, 4, 4)
        assert dataclasses.replace(NETWORK, channel_mult="").mult() == (1, 2, 2, 2)


class TestScripts:
    def test_train_resume_and_look(self, script, shapes, tmp_path, monkeypatch):
        for name, steps in (("whole", (4,)), ("halves", (2, 4))):
            monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / name))
            for most in steps:
                flags = (*FLAGS, "--max_steps", most, "--sample_interval", 4)
                done = script("super_res_train.py", "--data_dir", shapes, *flags)
                assert done.code == 0, done.err
        one, two = (
            checkpoint.load(str(tmp_path / name / "model000004.pt")) for name in ("whole", "halves")
        )
        assert all(th.equal(one[key], two[key]) for key in one)
        assert Image.open(tmp_path / "whole" / "samples_000004.png").size == (
            4 * 18 + 2,
            3 * 18 + 2,
        )
        config = json.loads((tmp_path / "whole" / "config.json").read_text())
        assert config["kind"] == "super_res"
        assert (config["model"]["large_size"], config["model"]["in_channels"]) == (16, 1)
        done = script("image_train.py", "--data_dir", shapes, "--image_size", 16)
        assert done.code == 2
        assert "super_res, not diffusion" in done.err

    def test_small_images_are_sharpened_in_turn(self, script, tmp_path):
        model = write_trained(tmp_path / "run", NETWORK, DIFFUSION, "super_res")
        flags = ["--model_path", model, "--num_samples", 5, "--sampler", "unipc", "--steps", 3]
        small = write_base(tmp_path / "small.npz")
        done = script("super_res_sample.py", *flags, "--base_samples", small)
        assert done.code == 0, done.err
        (file,) = (model.parent / "samples").glob("*/*.npz")
        sharp = arrays(file)["arr_0"]
        assert sharp.shape == (5, 16, 16, 1)
        images = arrays(small)["arr_0"]
        np.savez(tmp_path / "other.npz", 255 - images)
        flags += ["--base_samples", tmp_path / "other.npz", "--batch_size", 2]
        assert script("super_res_sample.py", *flags).code == 0
        files = sorted((model.parent / "samples").glob("*/*.npz"))
        assert len(files) == 2  # other small images, other folder
        assert not np.array_equal(arrays(files[1])["arr_0"], sharp)

    def test_labels_come_with_the_small_images(self, script, tmp_path):
        conditional = dataclasses.replace(NETWORK, class_cond=True, num_classes=2)
        model = write_trained(tmp_path / "run", conditional, DIFFUSION, "super_res", CLASSES)
        small = write_base(tmp_path / "small.npz", labels=[1, 1, 0])
        flags = ["--model_path", model, "--num_samples", 4, "--steps", 2, "--base_samples", small]
        for out, more, expected in (
            ("a", (), [1, 1, 0, 1]),
            ("b", ("--class_labels", "ball"), [0, 0, 0, 0]),
        ):
            done = script("super_res_sample.py", *flags, *more, "--out_dir", tmp_path / out)
            assert done.code == 0, done.err
            found = arrays(tmp_path / out / "samples_4x16x16x1.npz")
            assert found["arr_1"].tolist() == expected

    def test_a_checkpoint_without_config_is_described_by_flags(self, script, tmp_path):
        model = write_trained(tmp_path / "run", NETWORK, DIFFUSION, "super_res", config=False)
        small = write_base(tmp_path / "small.npz")
        flags = ["--model_path", model, "--num_samples", 1, "--steps", 2, "--base_samples", small]
        described = FLAGS[:14]
        done = script("super_res_sample.py", *flags, *described, "--diffusion_steps", 50)
        assert done.code == 0, done.err
        done = script("super_res_sample.py", *flags, *described, "--num_channels", 32)
        assert done.code == 2
        assert "does not fit the network that its config.json or the flags describe" in done.err
