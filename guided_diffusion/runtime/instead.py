"""Flags that name what a positional argument names otherwise."""

import argparse
from typing import Any

from guided_diffusion.runtime.command_line import CommandParser
from guided_diffusion.runtime.help_text import Shown


class _InsteadOf(argparse.Action):
    """Stores its value, and takes the argument out of those that are expected."""

    def __init__(self, *args: Any, argument: argparse.Action, **options: Any) -> None:
        super().__init__(*args, **options)
        self.argument = argument

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        # flags are parsed before arguments
        if self.argument in parser._actions:
            parser._remove_action(self.argument)


def add_instead(parser: CommandParser, argument: str, *spellings: str) -> None:
    """Add a flag for a positional argument that the parser has.

    With the flag the argument is left out of the command line, and the others move up.

    :param argument: its name in the result of parsing.
    """
    found = next(a for a in parser._actions if a.dest == argument and not a.option_strings)
    text = f"instead of the argument {found.metavar}"
    group = parser.add_argument_group("Arguments by name")
    group.add_argument(*spellings, dest=argument, action=_InsteadOf, argument=found, help=text)
    parser.shown[argument] = Shown(str(found.metavar), text, basic=False)
