"""scripts/image_sample.py as users run it."""

import json
import shutil

import numpy as np
import pytest
import torch as th
from PIL import Image
from process_util import Command, torchrun_environments
from sampling_util import DIFFUSION, NETWORK, QUICK, arrays, pictures, same, write_trained

from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.runtime import progress, rng
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.sampling.choices import choose_sampler
from guided_diffusion.sampling.config import (
    GuidedSampleConfig,
    said_of_defaults,
    sample_settings,
)
from guided_diffusion.sampling.images import to_uint8

HEADS = ("--num_heads", "2", "--use_new_attention_order", "False")


@pytest.fixture
def model(tmp_path):
    return write_trained(tmp_path / "run")


def test_the_checkpoint_alone_is_enough(script, model):
    done = script("image_sample.py", "--model_path", model, *QUICK)
    assert done.code == 0, done.err
    folder = model.parent / "samples" / "ema_0.9_000010_dpm++2m_3_seed0"
    assert str(folder) in done.out
    assert "8 images of 16x16x1 by dpm++2m, 3 steps" in done.err
    images = arrays(folder / "samples_8x16x16x1.npz")
    assert list(images) == ["arr_0"]
    assert images["arr_0"].dtype == np.uint8
    assert images["arr_0"].shape == (8, 16, 16, 1)
    files = pictures(folder)
    assert sorted(files) == [f"{k:06d}.png" for k in range(8)]
    for k, name in enumerate(sorted(files)):
        assert Image.open(folder / "png" / name).mode == "L"
        assert np.array_equal(files[name], images["arr_0"][k, :, :, 0])
    assert Image.open(folder / "grid.png").size[0] >= 3 * 64
    assert not (model.parent / "png").exists()


def test_colour_files_where_the_network_has_three_channels(script, tmp_path):
    from dataclasses import replace

    model = write_trained(tmp_path / "run", replace(NETWORK, in_channels=3))
    done = script("image_sample.py", "--model_path", model, *QUICK, "--out_dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert arrays(tmp_path / "out" / "samples_8x16x16x3.npz")["arr_0"].shape == (8, 16, 16, 3)
    assert Image.open(tmp_path / "out" / "png" / "000000.png").mode == "RGB"


def test_the_same_images_whatever_the_batches_and_the_ranks(script, model, tmp_path):
    """Stochastic sampling: the noise of every step counts."""
    flags = ["--model_path", model, "--steps", "4", "--num_samples", "8", "--precision", "fp32"]
    for size in (1, 3, 8):
        out = tmp_path / f"by{size}"
        assert script("image_sample.py", *flags, "--batch_size", size, "--out_dir", out).code == 0
        assert same(out, tmp_path / "by1")
    out = tmp_path / "two ranks"
    ranks = [
        Command("image_sample.py", [*flags, "--batch_size", 3, "--out_dir", out], env, tmp_path / k)
        for k, env in zip("ab", torchrun_environments(2))
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said
    assert same(out, tmp_path / "by1")
    one, two = (arrays(tmp_path / n / "samples_8x16x16x1.npz") for n in ("by1", "two ranks"))
    assert abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert len({picture.tobytes() for picture in pictures(out).values()}) == 8


def draw_at_once():
    progress.LINE_S = 0.0


class TestInterruption:
    def test_finished_images_are_kept_and_the_others_follow(self, script, model, tmp_path):
        flags = ["--model_path", model, *QUICK, "--batch_size", 2]
        script("image_sample.py", *flags, "--out_dir", tmp_path / "whole")
        script("image_sample.py", *flags, "--out_dir", tmp_path / "torn")
        marked = np.zeros((16, 16), np.uint8)
        Image.fromarray(marked).save(tmp_path / "torn" / "png" / "000002.png")
        for k in (0, 3, 7):
            (tmp_path / "torn" / "png" / f"{k:06d}.png").unlink()
        done = script("image_sample.py", *flags, "--out_dir", tmp_path / "torn")
        assert done.code == 0
        assert "5 are there already" in done.err
        torn = pictures(tmp_path / "torn")
        assert np.array_equal(torn.pop("000002.png"), marked)  # not sampled anew
        whole = pictures(tmp_path / "whole")
        assert all(abs(torn[k].astype(int) - whole[k]).max() <= 1 for k in torn)

    def test_more_images_are_added_to_those_that_are_there(self, script, model):
        for count in (3, 5):
            done = script("image_sample.py", "--model_path", model, *QUICK, "--num_samples", count)
            assert done.code == 0
        assert "3 are there already" in done.err
        folder = model.parent / "samples" / "ema_0.9_000010_dpm++2m_3_seed0"
        first, both = (arrays(folder / f"samples_{n}x16x16x1.npz")["arr_0"] for n in (3, 5))
        assert np.array_equal(first, both[:3])

    def test_a_signal_ends_it_at_the_next_step(self, script, model, tmp_path):
        out = tmp_path / "out"
        flags = ["--model_path", model, "--num_samples", 60, "--batch_size", 1, "--out_dir", out]
        running = Command("image_sample.py", flags, {}, tmp_path / "said")
        running.wait_for(lambda: (out / "png" / "000001.png").exists())
        running.send("SIGTERM")
        assert running.wait() == EXIT_STOPPED, running.said
        assert "rerun the command to resume" in running.said
        there = len(list((out / "png").iterdir()))
        assert 2 <= there < 60
        assert not list(out.glob("*.npz"))
        flags[3] = there
        done = script("image_sample.py", *flags)
        assert done.code == 0
        assert f"{there} are there already" in done.err
        assert len(list(out.glob("*.npz"))) == 1

    def test_a_signal_ends_even_a_large_batch(self, script, model, tmp_path):
        out = tmp_path / "out"
        flags = ["--model_path", model, "--num_samples", 500, "--batch_size", 500]
        flags += ["--sampler", "ddpm", "--out_dir", out]
        running = Command("image_sample.py", flags, {}, tmp_path / "said", draw_at_once)
        running.wait_for(lambda: "0/50" in running.said)
        running.send("SIGTERM")
        assert running.wait() == EXIT_STOPPED, running.said
        assert "50/50" not in running.said
        assert not list((out / "png").iterdir())


class TestFolders:
    def test_another_command_has_a_folder_of_its_own(self, script, model):
        flags = ["--model_path", model, *QUICK]
        script("image_sample.py", *flags)
        script("image_sample.py", *flags, "--seed", 1)
        script("image_sample.py", *flags, "--clip_denoised", "False")
        names = sorted(path.name for path in (model.parent / "samples").iterdir())
        stem = "ema_0.9_000010_dpm++2m_3_seed"
        assert names == [f"{stem}0", f"{stem}0_2", f"{stem}1"]
        one, other = (pictures(model.parent / "samples" / f"{stem}{k}") for k in ("0", "1"))
        assert not np.array_equal(one["000000.png"], other["000000.png"])

    def test_images_of_two_commands_do_not_mix(self, script, model, tmp_path):
        flags = ["--model_path", model, *QUICK, "--out_dir", tmp_path / "out"]
        assert script("image_sample.py", *flags).code == 0
        done = script("image_sample.py", *flags, "--seed", 1)
        assert done.code == 2
        assert "seed 0 there, 1 here" in done.err
        copy = shutil.copy(model, model.with_name("ema_0.9_000011.pt"))  # a name does not count
        done = script("image_sample.py", "--model_path", copy, *flags[2:])
        assert "8 are there already" in done.err, done.err
        th.save({k: v + 1 for k, v in th.load(model).items()}, model)
        assert "another checkpoint" in script("image_sample.py", *flags).err

    def test_a_training_run_is_not_disturbed(self, script, model, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_LOGDIR", str(model.parent))
        before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
        script("image_sample.py", "--model_path", model, *QUICK)
        after = {p.name: p.read_bytes() for p in model.parent.iterdir() if p.is_file()}
        assert after == before
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "elsewhere"))
        script("image_sample.py", "--model_path", model, *QUICK)
        assert (tmp_path / "elsewhere" / "samples_8x16x16x1.npz").exists()


class TestFlags:
    def test_flags_that_agree_may_be_given(self, script, model):
        overrides = ("--num_channels", 16, "--diffusion_steps", 50, "--noise_schedule", "cosine")
        overrides += ("--in_channels", "auto")
        assert script("image_sample.py", "--model_path", model, *QUICK, *overrides).code == 0

    @pytest.mark.parametrize(
        ("flag", "value", "there"),
        [
            ("num_channels", 32, 16),
            ("noise_schedule", "linear", "'cosine'"),
            ("image_size", 32, 16),
        ],
    )
    def test_a_contradiction_names_the_flag_and_both_values(
        self, script, model, flag, value, there
    ):
        done = script("image_sample.py", "--model_path", model, *QUICK, f"--{flag}", value)
        assert done.code == 2
        assert f"--{flag} {value} contradicts" in done.err
        assert f"says {there}" in done.err

    def test_without_config_what_no_weight_tells_must_be_given(self, script, tmp_path):
        model = write_trained(tmp_path / "bare", config=False)
        done = script("image_sample.py", "--model_path", model, *QUICK)
        assert done.code == 2
        for flag in ("num_heads", "use_new_attention_order", "image_size", "diffusion_steps"):
            assert f"--{flag}" in done.err
        assert "--noise_schedule" in done.err
        schedule = ("--diffusion_steps", 50, "--noise_schedule", "cosine", "--image_size", 16)
        done = script("image_sample.py", "--model_path", model, *QUICK, *HEADS, *schedule)
        assert done.code == 0, done.err
        known = write_trained(tmp_path / "known")
        script("image_sample.py", "--model_path", known, *QUICK)
        name = "samples/ema_0.9_000010_dpm++2m_3_seed0"
        assert same(model.parent / name, known.parent / name, tolerance=0)

    @pytest.mark.parametrize("flags", [("--use_ddim", "True"), ("--sampler", "ddpm")])
    def test_running_every_step_is_said(self, script, tmp_path, flags):
        long = DiffusionConfig(learn_sigma=True, diffusion_steps=150, noise_schedule="cosine")
        model = write_trained(tmp_path / "run", diffusion=long)
        done = script("image_sample.py", "--model_path", model, "--num_samples", 1, *flags)
        assert "every one of the 150 timesteps" in done.err
        few = ("--timestep_respacing", "5")
        done = script("image_sample.py", "--model_path", model, "--num_samples", 1, *flags, *few)
        assert "every one" not in done.err
        assert "5 steps over 5 of 150 timesteps" in done.err

    def test_the_checkpoint_alone_takes_no_days(self, script, model):
        done = script("image_sample.py", "--model_path", model)
        assert done.code == 0, done.err
        device, said, line = done.err.splitlines()[:3]
        assert device.startswith("device: cpu")
        assert "as in the original package: --num_samples 10000 --sampler ddpm" in said
        assert line.startswith("16 images of 16x16x1 by dpm++2m, 20 steps")
        (record,) = (model.parent / "samples").glob("*/sampling.json")
        assert json.loads(record.read_text())["images"]["eta"] == 1

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--num_samples", "3"], "the sampler by default"),
            (["--steps", "5"], "the number of images by default"),
            (["--num_samples", "3", "--use_ddim", "True"], ""),
            (["--num_samples", "10000", "--sampler", "ddpm"], ""),
        ],
    )
    def test_what_is_left_open_is_said(self, flags, said):
        given = dict(zip((f.lstrip("-") for f in flags[::2]), flags[1::2]))
        assert said_of_defaults(given).startswith(said)
        assert bool(said) == bool(said_of_defaults(given))

    def test_the_originals_command_line_is_the_originals(self):
        given = {"num_samples": 10000, "sampler": "ddpm"}
        settings = sample_settings(GuidedSampleConfig, given)
        assert settings == GuidedSampleConfig(sampler="ddpm")
        assert choose_sampler(settings, DIFFUSION.build()) == ("ddpm", 50)
        assert choose_sampler(GuidedSampleConfig(), DIFFUSION.build()) == ("ddpm", 50)

    @pytest.mark.parametrize(
        ("flags", "loop", "respacing"),
        [
            (("--timestep_respacing", "6"), "p_sample_loop", "6"),
            (("--use_ddim", "True", "--timestep_respacing", "ddim5"), "ddim_sample_loop", "ddim5"),
        ],
    )
    def test_the_originals_flags_keep_their_meaning(self, script, model, flags, loop, respacing):
        done = script("image_sample.py", "--model_path", model, "--num_samples", 2, *flags)
        assert done.code == 0, done.err
        (file,) = (model.parent / "samples").glob("*/samples_2x16x16x1.npz")
        network = NETWORK.build()
        network.load_state_dict(th.load(model))
        from dataclasses import replace

        diffusion = replace(DIFFUSION, timestep_respacing=respacing).build()
        expected = getattr(diffusion, loop)(
            network.eval(),
            (2, 1, 16, 16),
            noise=rng.normal(0, "sample", range(2), (1, 16, 16)),
            noise_fn=lambda x, t: rng.normal(0, f"step {t}", range(2), (1, 16, 16)),
        )
        found = arrays(file)["arr_0"].astype(int)
        assert abs(found - to_uint8(expected)).max() <= 1

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (("--guidance_scale", "2"), "without --cond_drop_prob"),
            (("--class_labels", "1"), "without classes"),
            (("--num_samples", "0"), "--num_samples 0"),
            (("--batch_size", "0"), "--batch_size 0"),
            (("--sampler", "euler"), "--sampler"),
        ],
    )
    def test_what_cannot_be_is_refused(self, script, model, flags, named):
        done = script("image_sample.py", "--model_path", model, *QUICK, *flags)
        assert done.code == 2
        assert named in done.err
        assert not (model.parent / "samples").exists()

    def test_a_checkpoint_must_be_named_and_be_one(self, script, tmp_path):
        assert "--model_path is missing" in script("image_sample.py").err
        th.save({"step": 3}, tmp_path / "state.pt")
        done = script("image_sample.py", "--model_path", tmp_path / "state.pt")
        assert "holds more than weights" in done.err

    def test_networks_of_other_kinds_name_their_script(self, script, model):
        config = json.loads((model.parent / "config.json").read_text())
        (model.parent / "config.json").write_text(json.dumps({**config, "kind": "super_res"}))
        done = script("image_sample.py", "--model_path", model, *QUICK)
        assert done.code == 2
        assert "scripts/super_res_sample.py" in done.err


def test_the_reverse_process_as_a_strip_and_an_animation(script, model, tmp_path):
    flags = ["--model_path", model, "--num_samples", 2, "--save_process", "--out_dir", tmp_path]
    assert script("image_sample.py", *flags, "--steps", 30).code == 0
    strip = Image.open(tmp_path / "process.png")
    assert strip.size[0] >= 12 * 64
    assert strip.size[1] >= 2 * 64
    animation = Image.open(tmp_path / "process.gif")
    assert animation.n_frames == 12
    # the last prediction is the image itself
    enlarged = np.asarray(strip)[:64, -66:-2]
    assert np.array_equal(enlarged[::4, ::4], pictures(tmp_path)["000000.png"])
    shutil.rmtree(tmp_path / "png")
