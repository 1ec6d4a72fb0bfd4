"""Flags: a script's flags are the fields of its configurations.

A configuration is a frozen dataclass whose fields carry their help texts. Flags keep the original
package's spelling with underscores and also accept hyphens; booleans are the words True and False.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from guided_diffusion.runtime.errors import UserError

Config = TypeVar("Config")


def flag(default: Any, help: str, *aliases: str, **options: Any) -> Any:
    """A configuration's field that is also a flag; `options` go to `add_argument`."""
    metadata = {"help": help, "aliases": aliases, **options}
    return dataclasses.field(default=default, metadata=metadata)


def from_mapping(config: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration from those values that it has; what it derives itself is left out."""
    names = {f.name for f in dataclasses.fields(config) if f.init}
    return config(**{name: value for name, value in values.items() if name in names})


def str2bool(v: str | bool) -> bool:
    """A word for yes or no to a boolean."""
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {v!r}")


def _add_flag(
    parser: argparse._ActionsContainer, name: str, default: Any, fallback: Any, **options: Any
) -> None:
    spellings = [f"--{name}"]
    if "_" in name:
        spellings.append(f"--{name.replace('_', '-')}")
    spellings += options.pop("aliases", ())
    if "type" not in options:
        kind = str if default is None else type(default)
        options["type"] = str2bool if kind is bool else kind
    if options["type"] is str2bool:
        # a bare switch means True, a word decides
        options |= {"nargs": "?", "const": True, "metavar": "True|False"}
    elif "choices" not in options:
        options.setdefault("metavar", options["type"].__name__.upper())
    parser.add_argument(*spellings, dest=name, default=fallback, **options)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add a flag for each entry, of its default's type; also spelt with hyphens."""
    for name, default in default_dict.items():
        _add_flag(parser, name, default, fallback=default, help=f"default: {default!r}")


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """Those of the parsed flags that `keys` names."""
    return {key: getattr(args, key) for key in keys}


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser(description: str, *configs: type) -> argparse.ArgumentParser:
    """A parser whose flags are the fields of the configurations, each in a group of its own.

    Flags that are not given are absent from the result of parsing, so that a checkpoint's
    configuration can fill them in; see `from_flags`.
    """
    parser = _OneLineParser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    seen = set()
    for config in configs:
        title = (config.__doc__ or "").split("\n")[0].split(";")[0].rstrip(".")
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(config):
            if f.name in seen or not f.init:
                continue
            seen.add(f.name)
            options = dict(f.metadata)
            shown = "''" if f.default == "" else f.default
            text = f"{options.pop('help', f.name)} (default: {shown})".replace("%", "%%")
            _add_flag(group, f.name, f.default, argparse.SUPPRESS, help=text, **options)
    return parser


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> dict:
    """The flags that were given, by name.

    :raises UserError: for an unknown flag or an impossible value.
    """
    return vars(parser.parse_args(argv))


def from_flags(
    config: type[Config], overrides: Mapping[str, Any], base: Config | None = None
) -> Config:
    """`config` with the given flags, the rest from `base` or its defaults."""
    values = dataclasses.asdict(base) if base is not None else {}
    return from_mapping(config, {**values, **overrides})
