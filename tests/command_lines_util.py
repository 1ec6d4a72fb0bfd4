"""Whether a command's parser takes a command line of the documents.

A word in capitals stands for a value that the flag takes.
"""

import argparse
import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from dataclasses import replace
from unittest import mock

import pytest
from commands_util import all_commands
from documents_util import Code, Command
from documents_util import commands as commands_of
from paths import ROOT

from guided_diffusion.runtime.command_line import commands
from guided_diffusion.runtime.command_line.parsing import CommandParser, parse_flags
from guided_diffusion.runtime.errors import UserError

_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*|\$\w+")
# values to try in place of a placeholder
_SAMPLES = ("1", "0.5", "2", "100", "1:2", "True", "cpu")
_WITHOUT_FLAGS = ("on_gpu_summary.py",)
_SWITCHED = ("true", "false", "yes", "no", "1", "0")
_SHOWN = {"-h", "--help", "--help_all", "--help-all", "--version"}
# programs whose command lines stand in prose, and flags of theirs that stand there alone
OTHER_PROGRAMS = (
    *("mpiexec", "mpirun", "torchrun", "srun", "sbatch"),
    *("pip", "conda", "docker", "wsl", "git", "pytest", "ip"),
)
OTHERS_FLAGS = (
    *("--node-rank", "--master-addr", "--master-port", "--signals-to-handle"),  # torchrun
    *("--allow-run-as-root", "--oversubscribe", "-x"),  # Open MPI
    *("--ipc", "--gpus", "--build-arg"),  # docker
    "--toy",  # benchmarks/on_gpu.sh
)


class _Found(BaseException):
    """Carries a parser out of the script that made it."""


@functools.cache
def parser_of(path: str, nothing_required: bool = False) -> argparse.ArgumentParser:
    """The parser of a script, by its path from the root."""
    if nothing_required:
        parser = parser_of.__wrapped__(path)
        for action in parser._actions:
            action.required = False
            if not action.option_strings and action.nargs is None:
                action.nargs = "?"
        return parser
    return (
        _parser_of_benchmark(path)
        if path.startswith("benchmarks/")
        else commands.parser_of(ROOT / path)
    )


def _parser_of_benchmark(path: str) -> argparse.ArgumentParser:
    """The parser with which a benchmark starts to parse its command line."""

    def stop(self, *arguments, **options):
        raise _Found(self)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [path]),
        mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]),
        pytest.raises(_Found) as found,
    ):
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return found.value.args[0]


def _path(name: str) -> str:
    return f"scripts/{name}" if (ROOT / "scripts" / name).exists() else f"tools/{name}"


@functools.cache
def scripts() -> dict[str, str]:
    """The path of every script that takes flags, by its name and by its path."""
    paths = [_path(name) for name in all_commands()]
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        text = file.read_text()
        if '__name__ == "__main__"' in text and file.name not in _WITHOUT_FLAGS:
            paths.append(f"benchmarks/{file.name}")
    return {**{path.rsplit("/", 1)[1]: path for path in paths}, **{path: path for path in paths}}


def fault(command: Command) -> str | None:
    """Why a command line cannot be given as it stands; None if it can."""
    path = scripts().get(command.script)
    if path is None:
        ours = re.match(r"(\./)?(scripts|tools|benchmarks)/", command.script)
        missing = ours and not (ROOT / command.script).is_file()
        return f"{command.script} does not exist" if missing else None
    parser = parser_of(path)
    words = [word for word in command.arguments if word not in _SHOWN]
    words = _without_config(words)
    unfinished = command.open or len(words) < len(command.arguments)
    if command.code.mention:
        unfinished = unfinished or not _has_arguments(parser, words)
        words = _with_values(parser, words)
    if unfinished:
        parser = parser_of(path, nothing_required=True)
    words = _filled(parser, words)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            parse = parse_flags if isinstance(parser, CommandParser) else _parse
            parse(parser, words)
    except UserError as error:
        return str(error)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    return _ignored(path, command)


@functools.cache
def _with_effect(path: str) -> set[str]:
    """The spellings of the flags that a script does not ignore."""
    parser = parser_of(path)
    if not isinstance(parser, CommandParser):
        return _spellings(parser)
    return {spelling for flag in commands.flags_of(parser) for spelling in flag.spellings}


def _ignored(path: str, command: Command) -> str | None:
    """What is said of a flag that the command takes only so that others' may be passed along."""
    written = set(re.findall(r"(?<![\w-])--[\w-]+", command.code.text))
    named = {_split(word) for word in command.arguments} & written
    ignored = sorted((named & _spellings(parser_of(path))) - _with_effect(path))
    return f"{command.script} ignores {', '.join(ignored)}" if ignored else None


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> None:
    parser.parse_intermixed_args(words)


def _split(word: str) -> str:
    return word.split("=", 1)[0] if word.startswith("--") else word


def _spellings(parser: argparse.ArgumentParser) -> set[str]:
    """All spellings of all flags, with --no_FLAG of those that have it."""
    return {*parser._option_string_actions, *getattr(parser, "switches", ())}


def _taker(parser: argparse.ArgumentParser, word: str, following: str) -> argparse.Action | None:
    """The flag that a word names, if the following word is its value."""
    name, equals, _ = word.partition("=")
    action = parser._option_string_actions.get(name)
    if name in getattr(parser, "switches", ()):
        return action if following in ("True", "False", *_SWITCHED) and not equals else None
    return None if action is None or equals or action.nargs == 0 else action


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _has_arguments(parser: argparse.ArgumentParser, words: list[str]) -> bool:
    """Whether some words belong to no flag; an unknown flag is taken to have one value."""
    expected = 0
    for word, following in zip(words, [*words[1:], ""]):
        if _is_flag(word):
            known = _split(word) in _spellings(parser)
            action = _taker(parser, word, following)
            many = action is not None and action.nargs in ("*", "+")
            expected = len(words) if many else int(action is not None or not known)
        elif expected:
            expected -= 1
        else:
            return True
    return False


def _with_values(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """The words without those known flags that need a value and have none."""
    kept = []
    for word, following in zip(words, [*words[1:], ""]):
        bare = not following or _is_flag(following)
        if not (bare and _taker(parser, word, following) is not None):
            kept.append(word)
    return kept


def _filled(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """The words with values that fit in place of those that stand for one."""
    filled, action = [], None
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        if _is_flag(word):
            action = _taker(parser, word, following)
            known = parser._option_string_actions.get(name)
            filled.append(f"{name}={_sample(known, value)}" if known and equals else word)
        else:
            filled.append(word if action is None else _sample(action, word))
            action = action if action is not None and action.nargs in ("*", "+") else None
    return filled


def _without_config(words: list[str]) -> list[str]:
    """The words with a file of settings at its place, and without one that readers are to write."""
    kept = list(words)
    while "--config" in kept[:-1]:
        at = kept.index("--config")
        file = ROOT / kept[at + 1]
        kept[at : at + 2] = [f"--config={file}"] if file.is_file() else []
    return kept


def _sample(action: argparse.Action, word: str) -> str:
    if not _PLACEHOLDER.fullmatch(word):
        return word
    if action.choices:
        return str(next(iter(action.choices)))
    convert = action.type or str
    for sample in (word, *_SAMPLES):
        with contextlib.suppress(ValueError, TypeError, UserError, argparse.ArgumentTypeError):
            value = convert(sample)
            limits = getattr(action, "limits", None)
            if limits is not None and isinstance(value, int | float):
                limits.check("", value)
            return sample
    return word


# ---- flags and paths that prose names ----


@functools.cache
def all_spellings() -> frozenset[str]:
    """Every spelling of every flag of every script."""
    paths = sorted(set(scripts().values()))
    return frozenset(flag for path in paths for flag in _spellings(parser_of(path)))


def unknown_flags(code: Code) -> list[str]:
    """Flags of a code in prose that no script has; those of other programs aside."""
    words = _words(code)
    if not code.mention or (words and words[0] in OTHER_PROGRAMS):
        return []
    named = [part for word in words for part in re.split(r"[/|]", word.split("=", 1)[0])]
    flags = [part for part in named if re.fullmatch(r"--?[A-Za-z][a-z_-]*", part)]
    return [flag for flag in flags if flag not in all_spellings() and flag not in OTHERS_FLAGS]


def value_fault(code: Code) -> str | None:
    """Why no script takes the flags that a code in prose consists of, with their values."""
    words = _words(code)
    flags = [word.split("=", 1)[0] for word in words if re.match(r"--\w[^ ]*$", word)]
    if not code.mention or not words or words[0] not in all_spellings() or len(words) == 1:
        return None
    paths = sorted(set(scripts().values()))
    having = [path for path in paths if set(flags) <= _spellings(parser_of(path))]
    if not having:
        return f"no script has all of {' '.join(flags)}"
    # a benchmark counts where no command has the flags
    having = [path for path in having if not path.startswith("benchmarks/")] or having
    found = None
    for path in having:
        lines = commands_of(replace(code, text=f"{path} {code.text}"))
        found = next(filter(None, map(fault, lines)), None)
        if found is None:
            return None
    return found


def _words(code: Code) -> list[str]:
    try:
        return shlex.split(code.text)
    except ValueError:
        return code.text.split()
