"""Flags and configurations: the published networks, the original's defaults, wrong values."""

import argparse
import hashlib
import json

import pytest
import torch as th
from golden_util import GOLDEN

from guided_diffusion import script_util
from guided_diffusion.networks import config
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig, check_flags
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError

PUBLISHED = json.loads((GOLDEN / "published_models.json").read_text())
CLI = json.loads((GOLDEN / "cli_flags.json").read_text())
KINDS = {
    "image": (
        script_util.model_and_diffusion_defaults,
        script_util.create_model_and_diffusion,
    ),
    "super_res": (
        script_util.sr_model_and_diffusion_defaults,
        script_util.sr_create_model_and_diffusion,
    ),
    "classifier": (
        script_util.classifier_and_diffusion_defaults,
        script_util.create_classifier_and_diffusion,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flag_lines_build_the_published_networks(name):
    case = PUBLISHED[name]
    defaults, create = KINDS[case["kind"]]
    parser = argparse.ArgumentParser()
    script_util.add_dict_to_argparser(parser, defaults())
    args = parser.parse_args(case["flags"].split())
    with th.device("meta"):
        model, _ = create(**script_util.args_to_dict(args, defaults().keys()))
    state = model.state_dict()
    lines = "\n".join(f"{k} {'x'.join(map(str, v.shape))}" for k, v in state.items())
    assert len(state) == case["tensors"]
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    assert hashlib.sha256(lines.encode()).hexdigest() == case["sha256"]


def test_defaults_are_the_originals():
    defaults = script_util.model_and_diffusion_defaults()
    theirs = CLI["image_sample.py"]
    assert {k: v for k, v in defaults.items() if k in theirs} == {
        k: v for k, v in theirs.items() if k in defaults
    }
    assert script_util.classifier_defaults().items() <= CLI["classifier_train.py"].items()
    sr = script_util.sr_model_and_diffusion_defaults()
    assert sr.items() >= {k: v for k, v in CLI["super_res_sample.py"].items() if k in sr}.items()


def test_flag_lines_of_improved_diffusion_build_their_networks():
    for size, channels, mult in ((64, 128, "(1, 2, 3, 4)"), (128, 192, "(1, 1, 2, 3, 4)")):
        overrides = parse_flags(
            make_parser("", ModelConfig, DiffusionConfig),
            "--attention_resolutions 32,16 --class_cond False --diffusion_steps 4000 --dropout 0.1"
            f" --image_size {size} --learn_sigma True --noise_schedule linear"
            f" --num_channels {channels} --num_res_blocks 2 --use_scale_shift_norm True".split(),
        )
        config = from_flags(ModelConfig, overrides)
        with th.device("meta"):
            model = config.build()
        assert str(config.mult()) == mult
        assert model.out_channels == 6
        assert model.dropout == 0.1


class TestFlags:
    parser = make_parser("", ModelConfig, DiffusionConfig)

    def test_underscores_and_hyphens_mean_the_same(self):
        assert parse_flags(self.parser, ["--num-channels", "7"]) == {"num_channels": 7}
        assert parse_flags(self.parser, ["--num_channels", "7"]) == {"num_channels": 7}

    @pytest.mark.parametrize(("word", "value"), [("True", True), ("False", False), ("no", False)])
    def test_booleans_are_words(self, word, value):
        assert parse_flags(self.parser, ["--learn_sigma", word]) == {"learn_sigma": value}

    def test_what_is_not_given_is_absent(self):
        assert parse_flags(self.parser, []) == {}

    @pytest.mark.parametrize(
        ("argv", "named"),
        [
            (["--num_chanels", "7"], "--num_chanels"),
            (["--num_channels", "many"], "--num_channels"),
            (["--learn_sigma", "perhaps"], "True or False"),
            (["--noise_schedule", "cubic"], "cosine"),
        ],
    )
    def test_wrong_flags_are_named_in_one_line(self, argv, named):
        with pytest.raises(UserError, match=named) as error:
            parse_flags(self.parser, argv)
        assert "\n" not in str(error.value)

    def test_every_flag_has_a_help_text_with_its_default(self):
        for name in script_util.model_and_diffusion_defaults():
            assert self.parser.shown[name].help, name
            assert self.parser.shown[name].default, name


class TestSizes:
    @pytest.mark.parametrize("text", ["0.5,1,2", "1", "0.5,1,1,2,2,4,4"])
    def test_channel_mult_of_any_length_with_fractions(self, text):
        mult = config.parse_channel_mult(text)
        assert ",".join(map(str, mult)) == text

    @pytest.mark.parametrize("text", ["1,x", "1,-2", "0"])
    def test_wrong_channel_mult_is_refused(self, text):
        with pytest.raises(UserError, match="channel_mult"):
            config.parse_channel_mult(text)

    @pytest.mark.parametrize("size", [16, 24, 40, 96, 224, 320])
    def test_any_size_that_the_depth_divides(self, size):
        config = ModelConfig(image_size=size, num_channels=32, channel_mult="1,1,2,2")
        with th.device("meta"):
            out = config.build()(th.zeros(1, 3, size, size), th.zeros(1))
        assert out.shape == (1, 3, size, size)

    def test_a_size_that_it_does_not_divide_names_those_that_it_does(self):
        with pytest.raises(UserError, match=r"250.*multiple of 32.*224 or 256"):
            ModelConfig(image_size=250).build()

    def test_attention_sizes_stand_for_the_nearest_that_exist(self):
        factors = config.attention_factors
        assert factors("32,16,8", 256, 6) == (8, 16, 32)
        assert factors("32,16,8", 224, 6) == (8, 16, 32)
        assert factors("16,8", 64, 4) == (4, 8)
        assert factors("2", 64, 4) == ()


class TestCheckFlags:
    stored = ModelConfig(image_size=256, num_channels=64, attention_resolutions="32,16,8")

    def test_agreement_in_another_spelling_is_no_contradiction(self):
        mult = ",".join(map(str, self.stored.mult()))
        overrides = {"num_channels": 64, "channel_mult": mult, "attention_resolutions": "8,16,32"}
        check_flags(overrides, self.stored, "it")
        check_flags({"image_size": 128, "attention_resolutions": "32,16,8"}, self.stored, "it")

    def test_a_contradiction_names_the_flag_and_both_values(self):
        with pytest.raises(UserError, match=r"--num_channels 128 contradicts it, which says 64"):
            check_flags({"num_channels": 128}, self.stored, "it")
        with pytest.raises(UserError, match=r"--channel_mult 1,2"):
            check_flags({"channel_mult": "1,2"}, self.stored, "it")

    def test_what_does_not_change_the_network_may_differ(self):
        check_flags({"dropout": 0.5, "use_checkpoint": True, "use_fp16": True}, self.stored, "it")
