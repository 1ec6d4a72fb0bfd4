"""Files of flags, for --config."""

import dataclasses
import json
import os

import pytest
from commands_util import path_of
from paths import ROOT

from guided_diffusion.runtime.command_line.commands import parser_of
from guided_diffusion.runtime.command_line.flags import flag
from guided_diffusion.runtime.command_line.instead import add_instead
from guided_diffusion.runtime.command_line.parsing import Part, make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Train:
    SECTION = "train"

    lr: float = flag(0.1, "rate", least=0)
    batch_size: int = flag(1, "images", least=1)
    use_fp16: bool = flag(False, "half")
    channel_mult: str = flag("", "list")
    flip_swap: str = flag("", "pairs")
    data_dir: str = flag("", "folder")
    avoid: tuple[str, ...] = flag((), "folders", type=str, nargs="+")
    compare: tuple[str, ...] = flag((), "two", type=str, nargs=2)
    window: float | None = flag(None, "width", type=float, least=0)
    resume_checkpoint: str = flag("", "file")
    format: str = flag("tif", "kind", choices=("tif", "png"))


@dataclasses.dataclass(frozen=True)
class Longer(Train):
    iterations: int = flag(1, "steps", least=1)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    folds: int = flag(0, "parts", least=0)


@pytest.fixture
def parse(tmp_path):
    """Parses a command line with a file of flags, by its content and name."""

    def run(content, *words, name="flags.yaml"):
        (tmp_path / name).write_text(content)
        parser = make_parser("", Train, Part(Elsewhere, ignored=True))
        return parse_flags(parser, ["--config", str(tmp_path / name), *words])

    return run


def test_flags_by_name(parse):
    text = """
    lr: 1e-4
    batch-size: 4
    use_fp16: yes
    channel_mult: [1, 2, 2.50]
    flip-swap: 1:2
    data_dir: ~/films
    avoid: [VAL, TEST]
    compare: [a.pth, b.pth]
    window: null
    """
    home = os.path.expanduser("~")
    assert parse(text) == {
        "lr": 1e-4,
        "batch_size": 4,
        "use_fp16": True,
        "channel_mult": "1,2,2.50",
        "flip_swap": "1:2",
        "data_dir": f"{home}/films",
        "avoid": ["VAL", "TEST"],
        "compare": ["a.pth", "b.pth"],
    }
    assert parse("") == {}


def test_json(parse):
    text = '{"lr": 1e-4, "use-fp16": false, "channel_mult": [1, 2.50], "window": null}'
    assert parse(text, name="flags.json") == {
        "lr": 1e-4,
        "use_fp16": False,
        "channel_mult": "1,2.50",
    }


def test_the_command_line_and_later_files_win(parse, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("lr: 3\nformat: png")
    words = ["--config", str(other), "--batch_size", "7"]
    found = parse("lr: 2\nbatch_size: 4\nuse_fp16: true", *words)
    assert found == {"lr": 3, "format": "png", "batch_size": 7, "use_fp16": True}


def test_a_flag_in_place_of_an_argument(tmp_path):
    """The argument is then not expected."""
    (tmp_path / "flags.yaml").write_text("model: a.pth")
    parser = make_parser("", Train)
    parser.add_argument("model")
    add_instead(parser, "model", "--model")
    parser.add_argument("image")
    found = parse_flags(parser, ["--config", str(tmp_path / "flags.yaml"), "b.png"])
    assert found == {"model": "a.pth", "image": "b.png"}


def test_sections_are_for_several_commands(parse):
    text = "train: {lr: 2, iterations: 5}\nsample: {num_samples: 3}\nmodel:\nbatch_size: 4"
    assert parse(text) == {"lr": 2, "batch_size": 4}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bach_size: 4", "flags.yaml: bach_size is no flag here; did you mean --batch_size?"),
        ("train: {bach-size: 4}", "train: bach-size is no flag here; did you mean --batch_size?"),
        ("lr: -1", "flags.yaml: lr: -1.0: must be at least 0"),
        ("batch_size: 2.5", "flags.yaml: batch_size: invalid int value: '2.5'"),
        ("use_fp16: perhaps", "use_fp16: expected True or False, not 'perhaps'"),
        ("format: pngs", "invalid choice: 'pngs' (choose from tif, png); did you mean png?"),
        ("compare: [a]", "compare: 1 values in place of 2"),
        ("lr: 1\ntrain: {lr: 2}", "lr stands there twice"),
        ("batch_size: 1\nbatch-size: 2", "batch-size stands there twice"),
        ("lr: 1\nlr: 2", "lr stands there twice"),
        ("optimiser: {lr: 1}", "optimiser is no section: they are model, diffusion"),
        ("train: {lr: {start: 1}}", "lr holds names of its own"),
        ("lr: [[1]]", "lr is a list of lists"),
        ("[lr, 1]", "does not hold flags by name"),
        ("lr: [1", "flags.yaml cannot be read"),
        ("help: true", "help is no flag here"),
        ("train: {null: 1}", "None is no flag here"),
        ("1: 2\n2: 3", "1 is no flag here"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_file_and_flag(parse, text, said):
    with pytest.raises(UserError) as error:
        parse(text)
    assert said in str(error.value)
    assert "flags.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files(parse, tmp_path):
    for content in ("{", '{"lr": 1, "lr": 2}', "3"):
        with pytest.raises(UserError, match=r"flags\.json"):
            parse(content, name="flags.json")
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        parse("", "--config", str(tmp_path / "nowhere.yaml"))


def test_the_config_json_of_a_run(parse):
    """It holds more than flags; how it was started, and what the command ignores, is left out."""
    training = {"lr": 2, "folds": 9, "global_batch": 4, "resume_checkpoint": "none", "window": None}
    stored = {"kind": "diffusion", "model": {"depth": 4}, "training": training, "reading": {}}
    assert parse(json.dumps(stored), name="config.json") == {"lr": 2}
    with pytest.raises(UserError, match=r"config\.json: lr: -2\.0"):
        parse(json.dumps({**stored, "training": {"lr": -2}}), name="config.json")


def test_a_real_run():
    """Every flag of its training, but for how it was started."""
    path = ROOT / "tests" / "legacy" / "run" / "config.json"
    found = parse_flags(parser_of(path_of("image_train.py")), ["--config", str(path)])
    stored = json.loads(path.read_text())
    sections = [stored[name] for name in ("model", "diffusion", "reading", "training")]
    flags = {name: value for section in sections for name, value in section.items()}
    del flags["resume_checkpoint"]
    assert found == {name: value for name, value in flags.items() if value is not None}
