"""Parsing a command line, by the flags that configurations declare; see `flags.py`.

Flags keep the underscores of the original package and also accept hyphens, and may stand anywhere
among the arguments. Booleans are `--flag`, `--no_flag` and `--flag True|False`.
"""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from guided_diffusion.runtime.command_line import config_file
from guided_diffusion.runtime.command_line.flags import NOT_GIVEN, Declared, Range, str2bool
from guided_diffusion.runtime.command_line.help_text import (
    Shown,
    default_of,
    main_spelling,
    metavar_of,
    page,
    version,
)
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import expand_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

GENERAL = "General"


@dataclasses.dataclass(frozen=True)
class Part:
    """The flags of a configuration in a command that does not use them as it says.

    :param default: what takes the place of the configuration's defaults, such as "from the
        checkpoint".
    :param defaults: the same of single flags.
    :param title: of the flags, in place of the configuration's TITLE.
    :param ignored: names of flags that the command takes, so that those of other commands may be
        passed along, and ignores: no help lists them. True: all.
    :param basic: names of the flags in --help; by default those that are declared so, none where
        a `default` is stated.
    """

    config: "type[DataclassInstance]"
    default: str = ""
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title: str = ""
    ignored: Collection[str] | bool = ()
    basic: Collection[str] | None = None

    def ignores(self, name: str) -> bool:
        return self.ignored if isinstance(self.ignored, bool) else name in self.ignored

    def shows(self, field: "dataclasses.Field[Any]") -> bool:
        """Whether --help shows a flag."""
        if self.basic is None:
            return field.metadata["declared"].basic and not self.default
        return field.name in self.basic


class _StoreInRange(argparse.Action):
    """Stores a number, or a UserError says which are allowed."""

    def __init__(self, *args: Any, limits: Range, **options: Any) -> None:
        super().__init__(*args, **options)
        self.limits = limits

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if isinstance(values, int | float):
            self.limits.check(f"--{self.dest}", values)
        setattr(namespace, self.dest, values)


class _Asked(Exception):
    """The user asked for a text in place of the command's work."""


class _Ask(argparse.Action):
    """Ends the parsing: while it lasts, argparse takes all arguments for optional ones."""

    def __call__(self, *_: Any) -> NoReturn:
        raise _Asked(self.dest)


class CommandParser(argparse.ArgumentParser):
    """The parser of a command. It reports a wrong flag as a UserError of one line.

    :ivar defaults: of the flags that are fields of configurations.
    :ivar shown: what the help says of them; without those that the command ignores.
    :ivar sections: of files of settings, and the names in them that this command or its kin know.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            add_help=False,
            argument_default=argparse.SUPPRESS,
        )
        self.defaults: dict[str, Any] = {}
        self.shown: dict[str, Shown] = {}
        self.sections: dict[str, set[str]] = {}
        # from the spellings of booleans to their flag, and to the value of --no_flag
        self.switches: dict[str, tuple[argparse.Action, bool]] = {}
        # from the spellings of flags to the argument that they stand for
        self.instead: dict[str, argparse.Action] = {}

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As of any parser; a positional argument is named in capitals."""
        if not names[0].startswith("-"):
            options.setdefault("metavar", names[0].upper())
        return super().add_argument(*names, **options)

    def add_configuration(self, part: Part) -> None:
        """Add the flags of a configuration but those that another one has declared."""
        config = part.config
        group = self.add_argument_group(part.title or getattr(config, "TITLE", None))
        if section := getattr(config, "SECTION", "") if part.ignored is not True else "":
            known = self.sections.setdefault(section, set())
            known.update(_names_of_kin(config, section))
        for field in dataclasses.fields(config):
            if field.init and field.name not in self.defaults:
                self._add_field(group, field, part)

    def _add_field(
        self, group: argparse._ArgumentGroup, field: "dataclasses.Field[Any]", part: Part
    ) -> None:
        options = dict(field.metadata)
        declared: Declared = options.pop("declared")
        text, default = default_of(field)
        if "type" not in options:
            kind = str if field.default is None else type(field.default)
            options["type"] = str2bool if kind is bool else kind
        if "limits" in options:
            options["action"] = _StoreInRange
        spellings = [*_both(f"--{field.name}"), *options.pop("aliases", ())]
        options["help"] = text.replace("%", "%%")
        action = group.add_argument(*spellings, dest=field.name, **options)
        if declared.switch:
            self.switches |= dict.fromkeys(spellings, (action, True))
            for spelling in _both(f"--no_{field.name}"):
                self.switches.setdefault(spelling, (action, False))
        self.defaults[field.name] = field.default
        if not part.ignores(field.name):
            self.shown[field.name] = Shown(
                metavar="" if declared.switch else metavar_of(field),
                help=text,
                default=part.defaults.get(field.name, part.default or default),
                basic=part.shows(field),
                switch=declared.switch,
            )

    def add_general(self) -> None:
        """Add the flags that every command has."""
        group = self.add_argument_group(GENERAL)
        words = {
            "config": "YAML or JSON file of flags by name, or a run's config.json; flags on the"
            " command line override it",
            "help": "show the flags that matter first, and exit",
            "help_all": "show all flags, and exit",
            "version": "show the versions of this package and of torch, and exit",
        }
        for name, text in words.items():
            spellings = [*(["-h"] if name == "help" else []), *reversed(_both(f"--{name}"))]
            if name == "config":
                group.add_argument(*spellings, dest=name, help=text)
            else:
                group.add_argument(*spellings, dest=name, action=_Ask, nargs=0, help=text)
            metavar = "FILE" if name == "config" else ""
            self.shown[name] = Shown(metavar, text, basic=name == "config")

    def visible(self) -> Iterator[tuple[str, list[tuple[argparse.Action, Shown]]]]:
        """The groups of arguments and flags that the help lists: their titles and what is in them.

        The positional arguments come first, and flags that every command has last.
        """
        groups: dict[str, list[tuple[argparse.Action, Shown]]] = {"Arguments": [], "Flags": []}
        for group in self._action_groups:
            for action in group._group_actions:
                if action.option_strings and self.ignores(action.dest):
                    continue
                title = group.title or "Flags"
                if group in (self._positionals, self._optionals):  # of add_argument
                    title = "Flags" if action.option_strings else "Arguments"
                told = Shown(str(action.metavar or ""), action.help or "")
                shown = self.shown.get(action.dest, told) if action.option_strings else told
                groups.setdefault(title, []).append((action, shown))
        groups[GENERAL] = groups.pop(GENERAL, [])
        return ((title, actions) for title, actions in groups.items() if actions)

    def spellings_of(self, action: argparse.Action) -> tuple[str, ...]:
        """All spellings of a flag, the original package's first; with --no_flag of a boolean."""
        more = [s for s, (of, positive) in self.switches.items() if of is action and not positive]
        return (*sorted(action.option_strings, key=lambda s: not s.startswith("--")), *more)

    def help(self, everything: bool) -> str:
        """The text of --help, or of --help-all."""
        return page(self.prog, self.description or "", self.visible(), everything)

    def format_help(self) -> str:
        return self.help(everything=True)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+)/\S+:", r"argument \1:", message)
        raise UserError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices if choice != ""]
            raise argparse.ArgumentError(
                action,
                f"invalid choice: {value!r} (choose from {', '.join(choices)})"
                + did_you_mean(str(value), choices),
            )

    def unknown(self, name: str) -> str:
        """What to say of a flag that the command does not have, such as "--bach_size"."""
        actions = {s: action for s, (action, _) in self.switches.items()}
        actions |= self._option_string_actions
        known = {
            spelling.lstrip("-"): main_spelling(action) if positive else spelling
            for spelling, action in actions.items()
            for _, positive in [self.switches.get(spelling, (action, True))]
            if not self.ignores(action.dest)
        }
        nearest = difflib.get_close_matches(name[2:].replace("-", "_"), known, 1)
        return f"; did you mean {known[nearest[0]]}?" if nearest else ""

    def ignores(self, name: str) -> bool:
        """Whether the command takes a flag and ignores it."""
        return name in self.defaults and name not in self.shown

    def _with_values(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """The command line with a value for each boolean: none of them takes an argument for one.

        :return: the words, and files of flags, which are left out of the words.
        :raises UserError: for an unknown flag, before its value is taken for an argument.
        """
        words: list[str] = []
        files: list[str] = []
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if word == "--":
                return [*words, word, *rest], files
            name, equals, value = word.partition("=")
            if name == "--config" and (equals or rest):
                files.append(expand_path(value if equals else rest.pop(0)))
                continue
            action, positive = self.switches.get(name, (None, True))
            if action is None:
                flag = name.startswith("--") and " " not in name
                if flag and name not in self._option_string_actions:
                    self.error(f"unrecognized arguments: {word}{self.unknown(name)}")
                words.append(word)
            elif equals:
                if not positive:
                    self.error(f"{name} takes no value: pass --{action.dest} True or {name}")
                words.append(word)
            elif positive and rest and _is_value(action, rest[0]):
                words.append(f"--{action.dest}={rest.pop(0)}")
            else:
                words.append(f"--{action.dest}={positive}")
        return words, files

    def parse(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The flags and positional arguments that were given, by name; see `parse_flags`."""
        given = list(sys.argv[1:] if argv is None else argv)
        words, files = self._with_values(given)
        settings: dict[str, Any] = {}
        for path in files:
            settings |= self._read(path)
        expected = list(self._actions)
        flags = words[: words.index("--")] if "--" in words else words
        named = [f"--{name}" for name in settings] + [word.partition("=")[0] for word in flags]
        replaced = [self.instead[name] for name in named if name in self.instead]
        self._actions[:] = [action for action in expected if action not in replaced]
        try:
            found, extra = self.parse_known_intermixed_args(words)
        except _Asked as asked:
            text = str(asked)
            print(version() if text == "version" else self.help(text == "help_all"))
            self.exit()
        finally:
            self._actions[:] = expected
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}{self._bare(given, extra[0])}")
        return {**settings, **vars(found)}

    def _bare(self, given: Sequence[str], word: str) -> str:
        """What to say of a word too many: whether a boolean stands before it."""
        before = given[given.index(word) - 1] if word in given[1:] else ""
        return f"; {before} takes True or False" if before in self.switches else ""

    def _read(self, path: str) -> dict[str, Any]:
        """The flags in a file of settings, checked as if they stood on the command line."""
        general = next(group for group in self._action_groups if group.title == GENERAL)
        actions = {
            action.dest: action
            for action in self._actions
            if action.option_strings and action not in general._group_actions
        }
        found = argparse.Namespace()
        ignored = set(filter(self.ignores, actions))
        for key, texts in config_file.read(path, actions, self.sections, ignored, self.unknown):
            action = actions[key]
            try:
                self._store(action, texts, found)
            except (UserError, argparse.ArgumentError) as error:
                said = error.message if isinstance(error, argparse.ArgumentError) else str(error)
                raise UserError(f"{path}: {key}: {said.removeprefix(f'--{key} ')}") from error
        return vars(found)

    def _store(self, action: argparse.Action, texts: list[str], found: argparse.Namespace) -> None:
        if isinstance(action.nargs, int) and len(texts) != action.nargs:
            raise UserError(f"{len(texts)} values in place of {action.nargs}")
        if isinstance(action, argparse._AppendAction):
            for text in texts:
                action(self, found, self._get_values(action, [text]))
        else:
            one = action.nargs is None
            values = self._get_values(action, [",".join(texts)] if one else texts)
            action(self, found, values)


def _both(spelling: str) -> list[str]:
    """A spelling with underscores, and with hyphens."""
    return list(dict.fromkeys([spelling, f"--{spelling[2:].replace('_', '-')}"]))


def _names_of_kin(config: "type[DataclassInstance]", section: str) -> set[str]:
    """The fields of a configuration, and of all that stand in the same section and share a base."""
    bases = [base for base in config.__mro__ if getattr(base, "SECTION", "") == section]
    names: set[str] = set()
    for kind in (kinds := [bases[-1]]):
        kinds += kind.__subclasses__()
        names.update(field.name for field in dataclasses.fields(kind))
    return names


def _is_value(action: argparse.Action, word: str) -> bool:
    """Whether a word is the value of a boolean rather than an argument."""
    assert callable(action.type)
    try:
        action.type(word)
    except argparse.ArgumentTypeError:
        return False
    return True


def did_you_mean(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def make_parser(description: str | None, *parts: "type[DataclassInstance] | Part") -> CommandParser:
    """Build a parser whose flags are the fields of the configurations, one group each.

    A field of several configurations is listed under the first. Flags that are not given are absent
    from the result of parsing, so that a checkpoint's configuration can supply them; see
    `flags.from_flags`.
    """
    parser = CommandParser(description)
    for part in parts:
        parser.add_configuration(part if isinstance(part, Part) else Part(part))
    parser.add_general()
    return parser


def parse_flags(parser: CommandParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The flags and positional arguments that were given, by name.

    `~` and variables in texts are replaced: shells leave them in --flag=~/data and in quotes.

    :param argv: the command line without the command; by default that of this process.
    :raises UserError: for an unknown flag or an invalid value, also in a file of `--config`.
    """
    given = {k: value for k, value in parser.parse(argv).items() if value is not NOT_GIVEN}
    return {name: _expanded(value) for name, value in given.items()}


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return expand_path(value) if isinstance(value, str) else value
