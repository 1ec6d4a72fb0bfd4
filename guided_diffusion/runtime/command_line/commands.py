"""What the commands take, without running them: for references and tests."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion.runtime.command_line.parsing import CommandParser


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
    """The arguments and flags of a command that have an effect, as --help-all lists them."""
    return [
        Flag(
            name=action.dest,
            spellings=parser.spellings_of(action),
            metavar=shown.metavar,
            help=shown.help,
            default=shown.default,
            choices=tuple(str(choice) for choice in action.choices or () if choice != ""),
            group=title,
            basic=shown.basic,
            required=action.required,
        )
        for title, pairs in parser.visible()
        for action, shown in pairs
    ]
