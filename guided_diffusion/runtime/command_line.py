"""Parsing a command line, by the flags that configurations declare; see `flags.py`."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import expand_path
from guided_diffusion.runtime.flags import NOT_GIVEN, add_flag

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong flag as a UserError, without printing the usage.

    :ivar defaults: of the flags that are fields of configurations.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.defaults: dict[str, Any] = {}

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser(description: str | None, *configs: "type[DataclassInstance]") -> CommandParser:
    """Build a parser whose flags are the fields of the configurations, one group each.

    A field of several configurations is listed under the first. Flags that are not given are absent
    from the result of parsing, so that a checkpoint's configuration can supply them; see
    `from_flags`.
    """
    parser = CommandParser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for config in configs:
        group = parser.add_argument_group(getattr(config, "TITLE", None))
        for f in dataclasses.fields(config):
            if f.name in parser.defaults or not f.init:
                continue
            parser.defaults[f.name] = f.default
            options = dict(f.metadata)
            shown = "''" if f.default == "" else f.default
            text = f"{options.pop('help', f.name)} (default: {shown})".replace("%", "%%")
            add_flag(group, f.name, f.default, argparse.SUPPRESS, help=text, **options)
    return parser


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """The flags and positional arguments that were given, by name.

    Flags may stand anywhere, also between the positional arguments.
    `~` and variables in texts are replaced: shells leave them in --flag=~/data and in quotes.

    :param argv: the command line without the command; by default that of this process.
    :raises UserError: for an unknown flag or an invalid value.
    """
    found = vars(parser.parse_intermixed_args(argv))
    given = {name: value for name, value in found.items() if value is not NOT_GIVEN}
    return {name: _expanded(value) for name, value in given.items()}


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return expand_path(value) if isinstance(value, str) else value
