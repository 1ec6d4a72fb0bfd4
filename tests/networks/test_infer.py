"""Architectures found again from the shapes of their weights."""

import dataclasses

import pytest
import torch as th

from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.infer import infer_model_config
from guided_diffusion.runtime.command_line.flags import from_mapping
from guided_diffusion.runtime.errors import UserError

HEADS = {"num_heads": 2, "use_new_attention_order": False}
CONFIGS = {
    "plain": ModelConfig(image_size=64, num_channels=32, num_res_blocks=1, num_heads=2),
    "paper": ModelConfig(
        image_size=256,
        num_channels=32,
        in_channels=1,
        attention_resolutions="32,16,8",
        num_heads=2,
        resblock_updown=True,
        learn_sigma=True,
    ),
    "one level": ModelConfig(image_size=8, num_channels=32, channel_mult="1", num_heads=2),
    "class conditional": ModelConfig(
        image_size=64,
        num_channels=32,
        channel_mult="0.5,1,2",
        num_heads=2,
        class_cond=True,
        num_classes=7,
        use_scale_shift_norm=False,
        num_res_blocks=3,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_inferred_architecture_has_the_same_tensors(name):
    config = CONFIGS[name]
    with th.device("meta"):
        state = config.build().state_dict()
        found = infer_model_config(state, {**HEADS, "image_size": config.image_size}, "m.pt")
        again = found.build().state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}
    for field in ("in_channels", "learn_sigma", "class_cond", "resblock_updown"):
        assert getattr(found, field) == getattr(config, field)
    assert found.use_scale_shift_norm == config.use_scale_shift_norm
    assert found.mult() == config.mult()


def test_what_shapes_cannot_determine_must_be_given():
    with th.device("meta"):
        state = CONFIGS["plain"].build().state_dict()
    with pytest.raises(UserError, match=r"--num_head_channels or --num_heads nor --use_new_att"):
        infer_model_config(state, {}, "m.pt")
    with pytest.raises(UserError, match="--use_new_attention_order: give"):
        infer_model_config(state, {"num_heads": 2}, "m.pt")
    with pytest.raises(UserError, match="determine --image_size: give"):
        infer_model_config(state, HEADS, "m.pt")
    with pytest.raises(UserError, match="determine --noise_schedule: give"):
        infer_model_config(state, {**HEADS, "image_size": 64}, "m.pt", ("noise_schedule",))


def test_other_networks_are_refused():
    with pytest.raises(UserError, match=r"m\.pt does not hold a diffusion U-Net"):
        infer_model_config({"conv1.weight": th.zeros(1)}, HEADS, "m.pt")


def test_the_given_heads_are_taken():
    config = dataclasses.replace(CONFIGS["plain"], num_heads=-1, num_head_channels=16)
    with th.device("meta"):
        state = config.build().state_dict()
    overrides = {"num_head_channels": 16, "use_new_attention_order": True, "image_size": 64}
    found = infer_model_config(state, overrides, "m.pt")
    assert (found.num_head_channels, found.use_new_attention_order) == (16, True)


@pytest.mark.parametrize("channels", [0, -1, 1e9])
def test_a_configuration_without_input_channels_is_refused(channels):
    with pytest.raises(UserError, match="in_channels"):
        from_mapping(ModelConfig, {"in_channels": channels})
