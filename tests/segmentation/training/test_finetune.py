"""Fine-tuning: from a pretrained checkpoint to segm.pth."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch as th
from conftest import TINY, TINY_DIFFUSION, draw_pairs
from finetuning_util import folders, same, weights
from golden_util import fill_parameters

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.masks import MaskRule
from guided_diffusion.images.reading import ReadingConfig, normalize
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.segmentation.model_file import load_model
from guided_diffusion.segmentation.networks.padding import sliding_scores
from guided_diffusion.segmentation.training.augment import Augmentation
from guided_diffusion.segmentation.training.dataset import load_labelled, training_batches
from guided_diffusion.segmentation.training.job import reading_of_pairs
from guided_diffusion.segmentation.training.layers import freeze, parameter_groups
from guided_diffusion.segmentation.training.learning import FinetuneConfig
from guided_diffusion.segmentation.training.noised_input import NoisedInput


@pytest.mark.parametrize(("width", "lr"), [(16, 1e-3), (32, 1e-3), (64, 5e-4), (128, 2.5e-4)])
def test_wider_networks_learn_more_slowly_by_default(width, lr):
    assert FinetuneConfig().with_default_lr(width).lr == pytest.approx(lr)
    assert FinetuneConfig(lr=0.02).with_default_lr(width).lr == 0.02


def test_a_class_that_no_training_mask_shows_is_named(script, pretrained, split, tmp_path):
    argv = [pretrained, *folders(split), "--epochs", 1]
    assert "cannot be learnt" not in script("finetune.py", *argv, "--out_channels", 3).err
    argv += ["--weights_save", "more.pth", "--out_channels", 5]
    assert "cannot be learnt: class 3, class 4" in script("finetune.py", *argv).err


@pytest.mark.curves
def test_a_run_learns_and_leaves_all_its_files(script, pretrained, split, tmp_path):
    argv = [pretrained, *folders(split), "--epochs", 12, "--lr", 1e-3, "--augmentation", "light"]
    ended = script("finetune.py", *argv, "--out_channels", 3)
    assert ended.code == 0, ended.err
    for name in ("segm.pth", "segm_last.pth", "segm_logs/curves.png", "segm_logs/log.txt"):
        assert (tmp_path / name).stat().st_size
    rows = list(csv.DictReader((tmp_path / "segm_logs/progress.csv").open()))
    assert len(rows) == 12
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])
    assert {"val_dice class 1", "val_iou background", "val_mean_iou"} <= rows[0].keys()
    model, config, values = load_model(str(tmp_path / "segm.pth"))
    assert model.out_channels == 3
    assert config.model == TINY
    assert config.reading.resize == "pad"
    best = max(rows, key=lambda row: float(row["val_mean_iou"]))
    assert values["best"]["mean_iou"] == float(best["val_mean_iou"])
    # the same command again has nothing to do, and does nothing
    before = (tmp_path / "segm.pth").read_bytes()
    again = script("finetune.py", *argv, "--out_channels", 3)
    assert (again.code, "complete" in again.out) == (0, True)
    assert (tmp_path / "segm.pth").read_bytes() == before
    # another command does not overwrite it, unless told to put it aside
    other = script("finetune.py", *argv, "--out_channels", 3, "--seed", 1)
    assert other.code == 2
    assert "seed" in other.err
    fresh = script(
        "finetune.py", *argv, "--out_channels", 3, "--epochs", 1, "--resume_checkpoint", "none"
    )
    assert fresh.code == 0, fresh.err
    assert (tmp_path / "segm.pth.old").read_bytes() == before


def test_without_validation_the_last_network_is_saved(script, pretrained, split, tmp_path):
    ended = script("finetune.py", pretrained, *folders(split)[:2], "--epochs", 2)
    assert ended.code == 0, ended.err
    assert same(weights(tmp_path / "segm.pth"), weights(tmp_path / "segm_last.pth"))
    assert load_model(str(tmp_path / "segm.pth"))[0].out_channels == 3


def test_flags_of_pretraining_are_accepted_and_checked(script, pretrained, split):
    argv = [pretrained, *folders(split), "--epochs", 1]
    flags = (
        "--num_channels 32 --num_res_blocks 1 --attention_resolutions 8 --learn_sigma True"
        " --num_head_channels 16 --resblock_updown True --use_fp16 True --image_size 24"
        " --schedule_sampler uniform --ema_rate 0.9 --save_interval 7 --microbatch 1"
    )
    ended = script("finetune.py", *argv, *flags.split())
    assert ended.code == 0, ended.err
    assert "ignored here" in ended.err
    wrong = script("finetune.py", *argv, "--num_channels", 64, "--weights_save", "b.pth")
    assert wrong.code == 2
    assert "--num_channels 64 contradicts" in wrong.err
    assert "32" in wrong.err
    assert wrong.err.count("\n") == 1


def test_a_checkpoint_without_config_needs_what_shapes_cannot_determine(
    script, pretrained, split, tmp_path
):
    bare = tmp_path / "checkpoints" / "model410000.pt"
    bare.parent.mkdir()
    shutil.copy(pretrained, bare)
    argv = [bare, *folders(split), "--epochs", 1]
    ended = script("finetune.py", *argv)
    assert ended.code == 2
    assert "--image_size" in ended.err
    assert "--num_head_channels" in ended.err
    assert "--use_new_attention_order" in ended.err
    flags = "--image_size 16 --num_head_channels 16 --use_new_attention_order False"
    ended = script("finetune.py", *argv, *flags.split())
    assert ended.code == 0, ended.err
    wrong = script("finetune.py", *argv, *flags.split(), "--num_res_blocks", 2)
    assert wrong.code == 2
    assert "--num_res_blocks 2 contradicts" in wrong.err


def test_weights_that_do_not_fit_their_config_are_refused(script, pretrained, split):
    """Such as config.json of another run: nothing but the new layers starts from random weights."""
    weights = th.load(pretrained, weights_only=True)
    colour = {**weights, "input_blocks.0.0.weight": th.zeros(32, 3, 3, 3)}
    lacking = {k: v for k, v in weights.items() if not k.startswith("time_embed.0")}
    for wrong, name in ((colour, "input_blocks.0.0.weight"), (lacking, "time_embed.0.weight")):
        th.save(wrong, pretrained)
        ended = script("finetune.py", pretrained, *folders(split), "--depth", 1)
        assert ended.code == 2
        assert f"{name}, would start from random weights" in ended.err
        assert ended.err.count("\n") == 1


def test_depth_random_init_and_frozen_parts(script, pretrained, split, tmp_path):
    argv = [pretrained, *folders(split), "--epochs", 1]
    ended = script("finetune.py", *argv, "--depth", 1, "--weights_save", "d.pth")
    assert ended.code == 0, ended.err
    assert load_model("d.pth")[0].depth == 1
    ended = script(
        "finetune.py",
        *argv,
        "--unfreeze_decoder",
        0,
        "--unfreeze_encoder",
        0,
        "--weights_save",
        "f.pth",
    )
    assert ended.code == 0, ended.err
    donor, tuned = th.load(pretrained, weights_only=True), weights("f.pth")
    changed = {
        k.split(".")[0]
        for k in tuned
        if k in donor and tuned[k].shape == donor[k].shape and not th.equal(tuned[k], donor[k])
    }
    assert changed == {"out"}
    ended = script("finetune.py", *argv, "--random_init", "True", "--weights_save", "r.pth")
    assert "random weights" in ended.err
    start = weights("r.pth")["time_embed.0.weight"]
    assert (start - donor["time_embed.0.weight"]).norm() > 0.5 * start.norm()


@pytest.mark.parametrize(
    ("before", "flags", "after", "said"),
    [
        ("crop", "", "pad", "--resize pad; the pretraining read with crop, which would cut off"),
        ("pad", "", "pad", ""),
        ("squash", "", "squash", ""),
        ("squash", "--resize pad", "pad", "--resize pad; the pretraining read with squash"),
        ("crop", "--resize crop", "crop", "what it cuts off is neither learnt nor predicted"),
    ],
)
def test_masks_are_not_cropped_unless_asked_for(
    script, pretrained, split, before, flags, after, said
):
    stored = checkpoint.read_config(str(pretrained))
    stored["reading"]["resize"] = before
    checkpoint.write_config(str(pretrained.parent), stored)
    ended = script("finetune.py", pretrained, *folders(split), "--epochs", 1, *flags.split())
    assert ended.code == 0, ended.err
    assert load_model("segm.pth")[1].reading.resize == after
    assert said in ended.err
    assert bool(said) == ("--resize" in ended.err)


def test_what_is_read_otherwise_than_in_pretraining_is_named():
    flags = {"intensity": "percentile", "resize": "squash", "in_channels": 3}
    before = ReadingConfig(16, 1, "pad", percentile_low=1.0)
    reading, said = reading_of_pairs(before, flags)
    assert said == [
        "--resize squash; the pretraining read with pad",
        "--intensity percentile; the pretraining read with full",
    ]
    assert reading.percentile_low == 1.0


def test_no_labelled_image_is_skipped(script, pretrained, split):
    ended = script("finetune.py", pretrained, *folders(split), "--skip_bad_images", "True")
    assert (ended.code, "every labelled radiograph is needed" in ended.err) == (2, True), ended.err


def test_native_size_runs_and_is_predicted_so(script, pretrained, split, tmp_path):
    argv = [pretrained, *folders(split), "--epochs", 1, "--resize", "native", "--image_size", 8]
    ended = script("finetune.py", *argv)
    assert ended.code == 0, ended.err
    assert load_model("segm.pth")[1].reading.resize == "native"


def test_more_images_a_step_than_there_are(script, pretrained, tmp_path):
    draw_pairs(tmp_path / "one", 1)
    dirs = [tmp_path / "one" / kind for kind in ("IMG", "MASK")]
    ended = script("finetune.py", pretrained, *dirs, "--epochs", 2, "--batch_size", 4)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(("share", "trained"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_the_decoder_is_unfrozen_from_the_output(share, trained):
    model = TINY.build_segmentation(3, None, 1)
    freeze(model, 1.0, share)
    training = [all(p.requires_grad for p in b.parameters()) for b in model.output_blocks]
    assert training == [False] * (4 - trained) + [True] * trained
    assert all(p.requires_grad for p in model.out.parameters())
    assert all(p.requires_grad for p in model.input_blocks.parameters())


@pytest.mark.parametrize("flags", ["--depth 1", "--random_init True"])
def test_random_weights_are_not_frozen(script, pretrained, split, flags):
    argv = [pretrained, *folders(split), "--unfreeze_encoder", 0, *flags.split()]
    ended = script("finetune.py", *argv)
    assert ended.code == 2
    assert "frozen at its random values" in ended.err


@pytest.mark.parametrize(("encoder", "decoder"), [(1.0, 0.5), (0.5, 1.0)])
def test_what_frozen_blocks_receive_and_give_stays(encoder, decoder):
    """A frozen block gets the timestep embedding that it was trained with."""
    model = fill_parameters(TINY.build_segmentation(3, None, 1))
    assert "time_embed" in freeze(model, encoder, decoder)
    block = model.output_blocks[0] if decoder < 1 else model.input_blocks[0]
    inputs = [th.randn(1, p.shape[1], 8, 8) for p in block.parameters() if p.ndim == 4][:1]
    embed = model.time_embed(th.ones(1, TINY.num_channels))
    before = block(*inputs, embed)
    trained = [p for p in model.parameters() if p.requires_grad]
    th.optim.SGD(trained, lr=1.0).zero_grad()
    images, optimizer = th.randn(2, 1, 16, 16), th.optim.SGD(trained, lr=0.1)
    model(images).square().mean().backward()
    optimizer.step()
    assert th.equal(block(*inputs, model.time_embed(th.ones(1, TINY.num_channels))), before)
    assert freeze(TINY.build_segmentation(3, None, 1), 1.0, 1.0) == []


def test_the_encoder_trains_from_the_middle_outwards():
    model = TINY.build_segmentation(3, None, 1)
    frozen = freeze(model, 0.5, 1.0)
    assert all(p.requires_grad for p in model.middle_block.parameters())
    assert not any(p.requires_grad for p in model.input_blocks[0].parameters())
    assert "time_embed" in frozen


def groups_by_name(model, **settings):
    groups = parameter_groups(model, **settings)
    scale_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale_of) == sum(len(group["params"]) for group in groups)
    return {name: scale_of[id(p)] for name, p in model.named_parameters()}


def test_learning_rates_fall_from_the_output_to_the_input():
    model = TINY.build_segmentation(3, None, 1)
    scales = groups_by_name(
        model, layer_decay=0.5, fresh={"out.2.weight", "out.2.bias"}, head_lr_scale=7.0
    )
    assert scales["out.2.weight"] == 7
    assert scales["out.0.weight"] == 1
    assert scales["output_blocks.3.0.in_layers.0.weight"] == 0.5
    assert scales["output_blocks.0.0.in_layers.0.weight"] == 0.5**4
    assert scales["middle_block.0.in_layers.0.weight"] == 0.5**5
    assert scales["input_blocks.3.0.in_layers.0.weight"] == 0.5**6
    assert scales["input_blocks.0.0.weight"] == scales["time_embed.0.weight"] == 0.5**9
    assert set(groups_by_name(model).values()) == {1.0}


def test_the_average_of_the_weights_is_what_is_saved(script, pretrained, split, tmp_path):
    argv = [pretrained, *folders(split), "--steps", 3, "--lr", 1e-2, "--ema_rate", 0.9]
    ended = script("finetune.py", *argv)
    assert ended.code == 0, ended.err
    last = th.load("segm_last.pth", weights_only=True)
    saved = weights("segm.pth")
    assert not same(saved, last["state_dict"])
    # warm-up keeps 1/10, 2/11 and 3/12 of the average; the first weights must be gone by then
    name = "input_blocks.0.0.weight"
    first = th.load(pretrained, weights_only=True)[name]
    assert (saved[name] - last["state_dict"][name]).norm() < (saved[name] - first).norm()
    values = th.load("segm.pth", weights_only=True)
    if values["best"]["epoch"] == 3:
        assert same(saved, last["ema"])


@pytest.mark.parametrize(
    ("images", "settings", "expected"),
    [
        (10, {"epochs": 7}, (7, 5, 35)),
        (1, {"steps": 400}, (100, 4, 400)),
        (10, {"steps": 12}, (3, 5, 12)),
        (3, {"steps": 3, "batch_size": 8}, (3, 1, 3)),
    ],
)
def test_how_long_a_run_is(images, settings, expected):
    assert FinetuneConfig(**settings).length(images) == expected


def test_steps_instead_of_epochs_and_some_of_the_images(script, pretrained, split):
    argv = [pretrained, *folders(split)[:2], "--steps", 5, "--train_names"]
    ended = script("finetune.py", *argv, "r2, r0")
    assert ended.code == 0, ended.err
    values = th.load("segm_last.pth", weights_only=True)
    assert values["stepper"]["steps"] == 5
    assert values["origin"]["train"] == ["r2", "r0"]
    assert "complete" in script("finetune.py", *argv, "r2, r0").out
    wrong = script("finetune.py", *argv, "r2,r9", "--weights_save", "w.pth")
    assert wrong.code == 2
    assert "r9" in wrong.err
    assert "r0" in wrong.err


@pytest.mark.parametrize(
    "flags",
    ["--layer_decay 0", "--ema_rate 1", "--lr -1", "--timestep_range 9", "--timestep 50"],
)
def test_values_out_of_range_are_refused(script, pretrained, split, flags):
    more = [] if "range" in flags else ["--noise_at_timestep", "True"]
    ended = script("finetune.py", pretrained, *folders(split), *flags.split(), *more)
    assert ended.code == 2
    assert flags.split()[0] in ended.err


class TestNoisedInput:
    images = th.linspace(-1, 1, 64).view(1, 1, 8, 8).repeat(200, 1, 1, 1)

    def test_timesteps_fill_the_range_and_noise_follows_the_schedule(self):
        noised, network_timesteps = NoisedInput(TINY_DIFFUSION, 1, (10, 13), True)(self.images, 0)
        assert set(network_timesteps.tolist()) == {10, 11, 12, 13}
        signal = TINY_DIFFUSION.build().alphas_cumprod
        for step in (10, 13):
            chosen = network_timesteps == step
            noise = noised[chosen] - signal[step] ** 0.5 * self.images[chosen]
            assert float(noise.std()) == pytest.approx((1 - signal[step]) ** 0.5, rel=0.05)

    def test_without_noise_images_stay(self):
        same_images, network_timesteps = NoisedInput(TINY_DIFFUSION, 1, (0, 49), False)(
            self.images, 0
        )
        assert same_images is self.images
        assert network_timesteps.min() < 5
        assert network_timesteps.max() > 44

    def test_a_fixed_timestep_is_the_networks_own(self):
        noised, network_timesteps = NoisedInput(TINY_DIFFUSION, 3, None, True)(self.images, 0)
        assert network_timesteps is None
        assert not th.equal(noised[0], noised[1])

    def test_each_image_depends_on_its_number_alone(self):
        noised = NoisedInput(TINY_DIFFUSION, 1, (0, 49), True, seed=5)
        whole, later = noised(self.images[:6], 0), noised(self.images[:3], 3)
        assert th.equal(whole[0][3:], later[0])
        assert th.equal(whole[1][3:], later[1])

    def test_the_network_is_told_its_own_units(self):
        rescaled = dataclasses.replace(TINY_DIFFUSION, rescale_timesteps=True)
        _, network_timesteps = NoisedInput(rescaled, 1, (10, 10), False)(self.images, 0)
        assert set(network_timesteps.tolist()) == {200}


class TestData:
    def test_batches_are_a_function_of_seed_and_step(self, split):
        data = load_labelled(*folders(split)[:2], ReadingConfig(16, 1, "pad"), MaskRule(3))

        def batches(step, seed=0):
            found = training_batches(data, 2, Augmentation("heavy"), seed, step)
            return [next(found) for _ in range(4)]

        later = batches(2)
        for (x, y), (again_x, again_y) in zip(batches(0)[2:], later):
            assert th.equal(x, again_x)
            assert th.equal(y, again_y)
        assert not th.equal(batches(0, 1)[0][0], batches(0)[0][0])

    def test_padding_is_ignored_and_classes_stay(self, split):
        data = load_labelled(*folders(split)[:2], ReadingConfig(32, 1, "pad"), MaskRule(3))
        masks = np.stack(data.masks)
        assert set(np.unique(masks)) == {0, 1, 2, IGNORE}
        assert np.stack(data.images).shape == (3, 32, 32, 1)
        assert data.class_pixels(3).sum() == (masks != IGNORE).sum()

    def test_native_size_trains_on_windows(self, split):
        data = load_labelled(*folders(split)[:2], ReadingConfig(8, 1, "native"), MaskRule(3))
        assert data.images[0].shape == (16, 20, 1)
        images, masks = data.batch([0, 0, 1], seeds=[5, 6, 7])
        assert images.shape == (3, 1, 8, 8)
        whole = normalize(data.images[0])[0].numpy()
        shifts = [
            (y, x)
            for y in range(9)
            for x in range(13)
            if np.array_equal(whole[y : y + 8, x : x + 8], images[0, 0].numpy())
        ]
        y, x = shifts[0]
        assert np.array_equal(masks[0].numpy(), data.masks[0][y : y + 8, x : x + 8])
        larger = load_labelled(*folders(split)[:2], ReadingConfig(24, 1, "native"), MaskRule(3))
        _, masks = larger.batch([0], seeds=[1])
        assert masks.shape == (1, 24, 24)
        assert (masks == IGNORE).sum() == 24 * 24 - 16 * 20

    def test_training_and_prediction_pad_alike(self, split):
        """Where the image is smaller than the window, the network sees the same either way."""
        for size in ((24, 32), (24, 18), (12, 33)):
            reading = ReadingConfig(size, 1, "native")
            data = load_labelled(*folders(split)[:2], reading, MaskRule(3))
            image = normalize(data.images[0])[None]
            seen = []

            def network(x, seen=seen):
                seen.append(x.clone())
                return x

            scores = sliding_scores(network, image, size)
            th.testing.assert_close(scores, image)
            crops = [data.batch([0], seeds=[seed])[0][0] for seed in range(60)]
            windows = [window for batch in seen for window in batch]
            assert all(any(th.equal(w, crop) for crop in crops) for w in windows)
            assert windows[0].shape[-2:] == size

    def test_metrics_are_written_as_json_would(self, script, pretrained, split, tmp_path):
        script("finetune.py", pretrained, *folders(split), "--epochs", 1)
        _, _, values = load_model(str(tmp_path / "segm.pth"))
        json.dumps(values["best"])


@pytest.mark.parametrize("how", ["same patients", "same files"])
def test_patients_in_both_train_and_val_are_said(script, pretrained, split, tmp_path, how):
    log = tmp_path / "segm_logs" / "log.txt"
    run = [*folders(split), "--epochs", 1, "--weights_save", tmp_path / "segm.pth"]
    assert script("finetune.py", pretrained, *run).code == 0
    assert "too high" not in log.read_text()
    if how == "same files":
        for kind in ("IMG", "MASK"):
            shutil.copy(split / "TRAIN" / kind / "r0.png", split / "VAL" / kind / "r1.png")
    else:
        for path in sorted(split.rglob("*.png")):
            path.rename(path.with_name(f"{path.stem.replace('r', '000')}_{path.parts[-3][0]}.png"))
    run[-1] = tmp_path / "other.pth"
    ended = script("finetune.py", pretrained, *run)
    assert ended.code == 0, ended.err
    assert "warning: scores on VAL will be too high" in ended.out + ended.err
    assert "TRAIN/IMG" in ended.out + ended.err
