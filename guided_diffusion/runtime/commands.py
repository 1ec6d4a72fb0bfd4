"""What the commands take, without running them: for references and tests."""

import argparse
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion.runtime.command_line import CommandParser


@dataclass(frozen=True)
class Flag:
    """A flag or a positional argument of a command.

    :param name: as the original package spells it, with underscores and without hyphens.
    :param spellings: all of them, such as --batch_size, --batch-size and -b; () of an argument.
    :param metavar: what stands for its value; "" of a switch.
    :param default: what happens without it, in words; "" where the help says so.
    :param group: the title of its group.
    :param basic: whether --help shows it; the others are in --help-all.
    :param required: whether the command refuses to run without it.
    """

    name: str
    spellings: tuple[str, ...]
    metavar: str
    help: str
    default: str
    choices: tuple[str, ...]
    group: str
    basic: bool
    required: bool

    @property
    def positional(self) -> bool:
        return not self.spellings


def parser_of(path: str | os.PathLike[str]) -> CommandParser:
    """The parser of a command, by its file: what the function `parser` there returns."""
    path = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(f"_command_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    hook = sys.excepthook
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        sys.excepthook = hook
    parser: CommandParser = module.parser()
    parser.prog = path.name
    return parser


def flags_of(parser: CommandParser) -> list[Flag]:
    """The arguments and flags of a command, in the order of its --help-all."""
    found = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if isinstance(action, argparse._HelpAction):
                continue
            found.append(
                Flag(
                    name=action.dest,
                    spellings=tuple(action.option_strings),
                    metavar=str(action.metavar or ""),
                    help=(action.help or "").replace("%%", "%"),
                    default="",
                    choices=tuple(map(str, action.choices or ())),
                    group=group.title or "",
                    basic=True,
                    required=action.required,
                )
            )
    return found
