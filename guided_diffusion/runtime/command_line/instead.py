"""Flags that name what a positional argument names otherwise."""

from guided_diffusion.runtime.command_line.help_text import Shown
from guided_diffusion.runtime.command_line.parsing import CommandParser


def add_instead(parser: CommandParser, argument: str, *spellings: str) -> None:
    """Add a flag for a positional argument that the parser has.

    With the flag the argument is left out of the command line, and the others move up.

    :param argument: its name in the result of parsing.
    """
    found = next(a for a in parser._actions if a.dest == argument and not a.option_strings)
    text = f"instead of the argument {found.metavar}"
    group = parser.add_argument_group("Arguments by name")
    group.add_argument(*spellings, dest=argument, help=text)
    parser.instead |= dict.fromkeys([f"--{argument}", *spellings], found)
    parser.shown[argument] = Shown(str(found.metavar), text, basic=False)
