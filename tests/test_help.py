"""--help of every command is short, --help-all complete, and both say what is true of it."""

import dataclasses
import math
import re

import pytest
from commands_util import all_commands, path_of

from guided_diffusion.runtime.command_line.commands import flags_of, parser_of
from guided_diffusion.segmentation.training.learning import FinetuneConfig
from guided_diffusion.training.config import TrainConfig


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("name", all_commands())
class TestEveryCommand:
    @pytest.fixture
    def parser(self, name):
        return parser_of(path_of(name))

    def test_help_fits_on_a_page(self, parser, name):
        lines = parser.help(everything=False).splitlines()
        assert sum(max(1, math.ceil(len(line) / 80)) for line in lines) <= 60
        assert lines[0].startswith(f"usage: {name} [flags]")
        assert re.fullmatch(rf"\d+ further flags: {re.escape(name)} --help-all", lines[-1])
        assert any(line.startswith("  --config FILE") for line in lines)

    def test_help_all_lists_every_flag(self, parser):
        listed = re.findall(r"^  --(\S+?),?(?= |$)", parser.help(everything=True), re.MULTILINE)
        known = {a.dest for a in parser._actions if a.option_strings and not parser.ignores(a.dest)}
        assert sorted(name.replace("-", "_") for name in listed) == sorted(known)

    def test_one_spelling_and_a_telling_name_for_the_value(self, parser):
        basic, everything = (parser.help(everything=e) for e in (False, True))
        assert not re.search(r"^  --\w+-\w+", basic, re.MULTILINE)
        assert not re.search(
            r"^  --\w+ (STR|INT|FLOAT|TEXT|True\|False)\b", everything, re.MULTILINE
        )
        assert not re.search(r"default: (''|None|\(\))", everything)

    def test_flags_of_says_what_help_does(self, parser):
        everything = " ".join(parser.help(everything=True).split())
        for flag in flags_of(parser):
            assert set(flag.spellings) <= {*parser._option_string_actions, *parser.switches}
            assert " ".join(flag.help.split()) in everything, flag.name
            assert flag.default in ("", "off") or f"(default: {flag.default})" in everything


def test_finetune_takes_flags_of_pretraining_and_hides_them():
    parser = parser_of(path_of("finetune.py"))
    fields = ({f.name for f in dataclasses.fields(kind)} for kind in (TrainConfig, FinetuneConfig))
    pretraining = next(fields) - next(fields)
    assert "schedule_sampler" in pretraining
    assert {name for name in parser.defaults if parser.ignores(name)} >= pretraining
    found = parser.parse(["c", "i", "m", "--schedule_sampler", "uniform", "--num_workers", "2"])
    assert (found["schedule_sampler"], found["num_workers"]) == ("uniform", 2)


@pytest.mark.parametrize(
    ("name", "flag", "default"),
    [
        ("finetune.py", "num_heads", "from the checkpoint"),
        ("finetune.py", "image_size", "from the checkpoint"),
        ("finetune.py", "batch_size", "2"),
        ("image_sample.py", "diffusion_steps", "from the checkpoint"),
        ("image_train.py", "image_size", "64"),
        ("image_train.py", "resize", "crop"),
        ("mask_diffusion_train.py", "resize", "pad"),
        ("image_train.py", "in_channels", "from the images"),
        ("predict.py", "report", "on"),
        ("predict.py", "no_save", "off"),
    ],
)
def test_defaults_are_those_of_the_command(name, flag, default):
    found = {f.name: f.default for f in flags_of(parser_of(path_of(name)))}
    assert found[flag] == default


def test_a_switch_does_not_swallow_the_model():
    parser = parser_of(path_of("predict.py"))
    found = parser.parse(["--save_uncertainty", "segm.pth", "IN", "OUT"])
    assert found == {"save_uncertainty": True, "arguments": ["segm.pth", "IN", "OUT"]}
