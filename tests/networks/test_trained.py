"""Checkpoints as every command reads them."""

import dataclasses
import json

import pytest
import torch as th
from sampling_util import NETWORK, write_trained

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import GuidedConfig, MaskDiffusionConfig
from guided_diffusion.networks.config import SuperResConfig
from guided_diffusion.networks.trained import read_trained
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model

SHAPELESS = {"image_size": 16, "num_heads": 2, "use_new_attention_order": False}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
@pytest.mark.parametrize("config", [True, False])
def test_names_that_wrappers_prefixed_are_restored(tmp_path, prefix, config):
    path = write_trained(tmp_path / "run", config=config)
    weights = th.load(path, weights_only=True)
    th.save({prefix + name: value for name, value in weights.items()}, path)
    found = read_trained(str(path), {} if config else SHAPELESS, for_tuning=True)
    assert found.weights.keys() == weights.keys()
    found.network("cpu")


def test_a_compiled_part_of_a_network_is_read(tmp_path):
    path = write_trained(tmp_path / "run")
    weights = th.load(path, weights_only=True)
    inside = "time_embed._orig_mod."
    th.save({k.replace("time_embed.", inside): v for k, v in weights.items()}, path)
    assert read_trained(str(path), {}).weights.keys() == weights.keys()


@pytest.mark.parametrize("for_tuning", [True, False])
@pytest.mark.parametrize(
    ("kind", "purpose"),
    [
        ("mask_diffusion", "predict.py"),
        ("super_res", "super_res_sample.py"),
        ("classifier", "classifier_sample.py"),
        ("segmentation_guided", "image_sample.py"),
    ],
)
def test_a_network_of_another_kind_names_what_it_is_for(tmp_path, kind, purpose, for_tuning):
    path = write_trained(tmp_path / "run", kind=kind)
    with pytest.raises(
        UserError, match=rf"kind {kind}, not diffusion: it is for scripts/{purpose}"
    ):
        read_trained(str(path), {}, for_tuning=for_tuning)


GUIDED = {"segmentation_guided": True}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GuidedConfig, {**GUIDED, "num_segmentation_classes": 3}),  # 1 + 2 channels: as in colour
        (GuidedConfig, {**GUIDED, "num_segmentation_classes": 2}),
        (GuidedConfig, {**GUIDED, "num_segmentation_classes": 3, "learn_sigma": False}),
        (GuidedConfig, {**GUIDED, "num_segmentation_classes": 4, "in_channels": 3}),
        (MaskDiffusionConfig, {"num_segmentation_classes": 2}),
        (MaskDiffusionConfig, {"num_segmentation_classes": 4, "in_channels": 3}),
        (SuperResConfig, {"small_size": 8, "large_size": 16}),
        (SuperResConfig, {"small_size": 8, "large_size": 16, "in_channels": 3}),
    ],
)
@pytest.mark.parametrize("for_tuning", [True, False])
def test_without_config_a_condition_shows_in_the_channels(tmp_path, kind, settings, for_tuning):
    fields = dataclasses.asdict(NETWORK) | settings
    names = {field.name for field in dataclasses.fields(kind)}
    model = kind(**{k: v for k, v in fields.items() if k in names})
    path = tmp_path / "model000001.pt"
    th.save(model.build().state_dict(), path)
    with pytest.raises(UserError, match=r"input and .* output channels: it is conditioned"):
        read_trained(str(path), SHAPELESS, for_tuning=for_tuning)


@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_a_network_without_its_classes_keeps_their_embedding(tmp_path, drop):
    model = dataclasses.replace(NETWORK, class_cond=True, num_classes=4, cond_drop_prob=drop)
    found = read_trained(str(write_trained(tmp_path / "run", model, classes=("a", "b"))), {})
    weights, message = found.without_classes()
    assert "class-conditional" in message
    plain = NETWORK.build()
    plain.load_state_dict(weights)
    x, t = th.randn(1, 1, 16, 16), th.tensor([3])
    network = found.network("cpu")
    if not drop:  # room for two classes that it never saw
        network.label_emb.weight[0] = found.weights["label_emb.weight"][:2].mean(0)
    expected = network(x, t, y=th.tensor([4 if drop else 0]))
    th.testing.assert_close(plain(x, t), expected)
    unconditional = read_trained(str(write_trained(tmp_path / "plain")), {})
    assert unconditional.without_classes() == (unconditional.weights, "")


def test_a_segmentation_model_is_refused(tmp_path):
    config = SegmentationConfig(NETWORK, ReadingConfig(16, 1, "pad"), generic_categories(3))
    path = str(tmp_path / "segm.pth")
    save_model(path, config, config.build().state_dict())
    with pytest.raises(UserError, match=r"segmentation model already.*name the pretrained"):
        read_trained(path, {})


@pytest.mark.parametrize(
    ("for_tuning", "missing"),
    [(True, ["image_size"]), (False, ["image_size", "diffusion_steps", "noise_schedule"])],
)
def test_without_config_each_use_asks_for_what_it_needs(tmp_path, for_tuning, missing):
    path = str(write_trained(tmp_path / "run", config=False))
    heads = {name: value for name, value in SHAPELESS.items() if name != "image_size"}
    expected = " nor ".join(f"--{name}" for name in missing)
    with pytest.raises(UserError, match=f"do not determine {expected}: give"):
        read_trained(path, heads, for_tuning=for_tuning)


def test_only_tuning_may_change_the_size_of_the_images(tmp_path):
    path = str(write_trained(tmp_path / "run"))
    found = read_trained(path, {"image_size": 32, "dropout": 0.5}, for_tuning=True)
    assert (found.model.image_size, found.model.dropout) == (16, 0.5)
    with pytest.raises(UserError, match="--image_size 32 contradicts"):
        read_trained(path, {"image_size": 32})


def test_a_config_of_another_program_is_named(tmp_path):
    path = write_trained(tmp_path / "run")
    (path.parent / "config.json").write_text(json.dumps({"kind": "diffusion"}))
    with pytest.raises(UserError, match=r"lacks 'model': this package did not write it"):
        read_trained(str(path), {})


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("model", "num_channels", "wide", "num_channels is 'wide', but must be a whole number"),
        ("model", "num_channels", 0.5, "num_channels is 0.5"),
        ("model", "use_fp16", 1, "use_fp16 is 1, but must be True or False"),
        ("model", "attention_resolutions", None, "but must be a text"),
        ("diffusion", "noise_schedule", "sine", "noise_schedule is 'sine', but must be linear"),
        ("reading", "resize", {}, "resize is {}"),
        ("diffusion", "timestep_respacing", "a\nb", "respacing 'a b' is neither"),
        ("reading", "window_center", "middle", "but must be a number or None|a number or"),
        ("classes", None, "cat", "classes are not a list of names"),
        ("kind", None, "paint", "kind paint, not diffusion: it is unknown"),
        ("kind", None, {}, "it is unknown to this version"),
        ("model", None, [], "settings by name"),
    ],
)
def test_values_of_another_type_are_named(tmp_path, section, key, value, said):
    path = write_trained(tmp_path / "run")
    config = json.loads((path.parent / "config.json").read_text())
    if key:
        config[section][key] = value
    else:
        config[section] = value
    (path.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said) as caught:
        read_trained(str(path), {})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
