"""Declaring flags: a script's flags are the fields of its configurations.

A configuration is a frozen dataclass whose fields carry help texts and whose class attribute TITLE
heads its flags in --help-all:

    @dataclass(frozen=True)
    class TrainConfig:
        TITLE = "Training"
        SECTION = "train"

        lr: float = flag(1e-4, "learning rate", least=0, basic=True)

A flag that takes a number says which; a wrong one is refused as soon as it is read. The few that
matter first are `basic`: --help shows them. SECTION names the part of a file of settings that holds
such flags, see `config_file.py`; `parsing.py` parses them.
"""

import argparse
import dataclasses
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from guided_diffusion.runtime.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# the flags that the user gave, by name; all others keep their defaults
Overrides = Mapping[str, Any]

Config = TypeVar("Config", bound="DataclassInstance")

# What the `type` of a flag returns for a value that is the same as leaving the flag out ("auto").
NOT_GIVEN = object()


# The largest number that a flag takes unless it says otherwise: room enough for counts, steps and
# factors, and nothing overflows.
MOST = 10**9
MOST_BATCH = 2**16
MOST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a flag takes: from `least` or above `above`, to `most` or below `below`;
    and `also` one outside, such as -1 for "as many as needed"."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: float | None = None

    def check(self, label: str, value: float) -> None:
        """:raises UserError: for a number outside, nan included."""
        low = self.least if self.above is None else self.above
        high = next((limit for limit in (self.below, self.most) if limit is not None), MOST)
        low = -high if low is None else low
        fits = low < value if self.above is not None else low <= value
        fits = fits and (value < high if self.below is not None else value <= high)
        if not fits and value != self.also:
            raise UserError(f"{label} {value}: must be {self._words(low, high)}")

    def _words(self, low: float, high: float) -> str:
        if self.above is None and self.below is None and high != MOST:
            words = f"between {low} and {high}"
        else:
            words = f"above {low}" if self.above is not None else f"at least {low}"
            words += f" and {'below' if self.below is not None else 'at most'} {high}"
        return words if self.also is None else f"{words}, or {self.also}"


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the help says of a flag, see `flag`."""

    basic: bool = False
    metavar: str = ""
    default: str = ""
    switch: bool = False


def flag(
    default: Any,
    help: str,
    *aliases: str,
    basic: bool = False,
    metavar: str = "",
    default_words: str = "",
    switch: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    also: float | None = None,
    **options: Any,
) -> Any:
    """A configuration's field that is also a flag.

    :param help: what it is. Its end may say what "" or None mean, "; '': a GPU if available" or
        "; absent: as in training": that is then shown as the default.
    :param aliases: further spellings, such as "-o".
    :param basic: whether --help shows it; --help-all shows all.
    :param metavar: what stands for the value in the help, such as FILE; by default by its type.
    :param switch: whether it may stand without a value, for True, and takes only what its `type`
        accepts; always so of booleans.
    :param default_words: what happens without the flag, where the default does not tell.
    :param least, above, most, below, also: the numbers that it takes, see `Range`; by default no
        more than MOST.
    :param options: for `ArgumentParser.add_argument`.
    """
    limits = Range(least, above, most, below, also)
    metadata = {
        "help": help,
        "aliases": aliases,
        "declared": Declared(basic, metavar, default_words, switch or isinstance(default, bool)),
        **options,
    }
    if limits != Range():
        metadata["limits"] = limits
    return dataclasses.field(default=default, metadata=metadata)


def from_mapping(config: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from those of the values that are its fields, ignoring all others.

    :raises UserError: for a value of another type than the field's, outside its range, or
        none of its choices.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{_short(values)} stands in place of settings by name")
    kinds = typing.get_type_hints(config)
    given = {}
    for f in dataclasses.fields(config):
        if not f.init or f.name not in values:
            continue
        value = given[f.name] = values[f.name]
        choices = f.metadata.get("choices")
        if not _fits(value, kinds[f.name]) or (choices and value not in choices):
            wanted = ", ".join(map(str, choices)) if choices else _described(kinds[f.name])
            raise UserError(f"{f.name} is {_short(value)}, but must be {wanted}")
        if "limits" in f.metadata and isinstance(value, int | float):
            f.metadata["limits"].check(f.name, value)
    return config(**given)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; whole numbers are also numbers, lists also tuples."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        return isinstance(value, list | tuple) and (
            parts[-1] is ... or (len(value) == len(parts) and all(map(_fits, value, parts)))
        )
    kind = typing.get_origin(kind) or kind
    return not isinstance(kind, type) or isinstance(value, kind)


def _described(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    parts = typing.get_args(kind) if typing.get_origin(kind) is not tuple else ()
    return names.get(kind) or " or ".join(map(_described, parts)) or str(kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def str2bool(v: str | bool) -> bool:
    """Parse a boolean flag.

    :raises argparse.ArgumentTypeError: if it is none of yes, true, t, y, 1, no, false, f, n, 0.
    """
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {v!r}")


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add a flag for each entry, of the type of its default; also spelt with hyphens.

    For parsers of one's own; those of this package's commands are `parsing.CommandParser`.
    """
    for name, default in default_dict.items():
        kind = str if default is None else type(default)
        options: dict[str, Any] = {"type": kind}
        if kind is bool:  # without a value it means True
            options = {"type": str2bool, "nargs": "?", "const": True}
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        text = f"default: {default!r}".replace("%", "%%")
        parser.add_argument(*spellings, dest=name, default=default, help=text, **options)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The parsed flags named by `keys`."""
    return {key: getattr(args, key) for key in keys}


def from_flags(config: type[Config], overrides: Overrides, base: Config | None = None) -> Config:
    """Build a configuration from the flags given; the other fields are those of `base`.

    :param overrides: from `parsing.parse_flags`; names that are no fields of `config` are
        ignored.
    :param base: by default the defaults of `config`.
    """
    values = dataclasses.asdict(base) if base is not None else {}
    return from_mapping(config, {**values, **overrides})
