"""Command lines: booleans, arguments among flags, what is said about wrong ones."""

import dataclasses

import pytest

from guided_diffusion.runtime.command_line.flags import flag, str2bool
from guided_diffusion.runtime.command_line.parsing import Part, make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    TITLE = "Test"

    batch_size: int = flag(1, "images", "-b", least=1, basic=True)
    save_all: bool = flag(False, "all", "-a")
    report: bool = flag(True, "a page")
    resize: str = flag("crop", "how", choices=("crop", "squash"))
    where: str = flag("", "folder; '': here")
    names: tuple[str, ...] = flag((), "names", type=str, nargs="+", metavar="NAME")
    mode: bool | str = flag(
        False,
        "which",
        type=lambda text: text if text == "norms" else str2bool(text),
        switch=True,
    )


@dataclasses.dataclass(frozen=True)
class Other:
    lr: float = flag(0.1, "rate", least=0)
    epochs: int = flag(1, "number", least=0)


@pytest.fixture
def parser():
    """A command of one to three arguments, which ignores --epochs."""
    found = make_parser("What it does.", Config, Part(Other, "from a file", ignored=["epochs"]))
    found.add_argument("model")
    found.add_argument("image", nargs="?")
    found.add_argument("mask", nargs="?")
    return found


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("M --save_all I", {"save_all": True, "image": "I"}),
        ("--save_all M I", {"save_all": True, "image": "I"}),
        ("M --save-all True I", {"save_all": True, "image": "I"}),
        ("M -a no I", {"save_all": False, "image": "I"}),
        ("M --save_all=True", {"save_all": True}),
        ("M --save_all=0", {"save_all": False}),
        ("--no_report M I", {"report": False, "image": "I"}),
        ("--no-report M --no-save-all I", {"report": False, "save_all": False, "image": "I"}),
        ("--no_save_all M", {"save_all": False}),
        ("--mode M I", {"mode": True, "image": "I"}),
        ("--mode norms M I", {"mode": "norms", "image": "I"}),
        ("--no_mode M", {"mode": False}),
        ("--save_all -b 3 M --report False", {"save_all": True, "batch_size": 3, "report": False}),
        ("M I K --batch-size 2", {"image": "I", "mask": "K", "batch_size": 2}),
        ("M --names a b --save_all I", {"names": ["a", "b"], "save_all": True, "image": "I"}),
        ("M --save_all -- --report", {"save_all": True, "image": "--report"}),
        ("M --epochs 3", {"epochs": 3}),
    ],
)  # fmt: skip
def test_flags_among_arguments(parser, words, found):
    assert parse_flags(parser, words.split()) == {"model": "M", **found}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("M --bach_size 3", "--bach_size; did you mean --batch_size?"),
        ("M --bach-size 3", "--bach-size; did you mean --batch_size?"),
        ("M --no_reprot", "did you mean --no_report?"),
        ("M --epoch 3", "unrecognized arguments: --epoch (see"),  # no word of an ignored flag
        ("--batchsize 3 I K", "did you mean --batch_size?"),  # not: MODEL is missing
        ("M --resize squish", "'squish' (choose from crop, squash); did you mean squash?"),
        ("M --save_all=perhaps", "expected True or False, not 'perhaps'"),
        ("M --no_report=True", "--no_report takes no value"),
        ("M I K --save_all perhaps", "perhaps; --save_all takes True or False"),
        ("--batch_size 2", "required: MODEL"),
        ("M --batch_size 0", "--batch_size 0: must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_on_one_line(parser, words, said):
    with pytest.raises(UserError) as error:
        parse_flags(parser, words.split())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_help_shows_what_matters_first(parser, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser.prog = "do.py"
    texts = {}
    for name in ("--help", "-h", "--help-all", "--help_all"):
        with pytest.raises(SystemExit) as end:
            parser.parse([name])
        assert end.value.code == 0
        texts[name] = capsys.readouterr().out
    basic, everything = texts["--help"], texts["--help-all"]
    assert basic == texts["-h"]
    assert everything == texts["--help_all"]
    assert basic.startswith("usage: do.py [flags] MODEL [IMAGE MASK]\n\nWhat it does.\n")
    assert "--batch_size N " in basic
    assert "--resize" not in basic
    assert basic.splitlines()[-1] == "10 further flags: do.py --help-all"
    assert "--batch_size N, -b" in everything
    assert "--report, --no_report" in everything
    assert "--resize crop|squash" in everything
    assert "folder (default: here)" in everything
    assert "--lr NUMBER" in everything
    assert "rate (default: from a file)" in everything
    assert "epochs" not in everything
    assert "--batch-size" not in everything


def test_help_in_a_narrow_terminal(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    assert max(map(len, parser.help(everything=True).splitlines())) < 60


def test_version(parser, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse(["--version"])
    assert end.value.code == 0
    assert "guided-diffusion" in capsys.readouterr().out
