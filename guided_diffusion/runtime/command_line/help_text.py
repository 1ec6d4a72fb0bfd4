"""The text of --help and --help-all."""

import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from guided_diffusion.runtime.command_line.flags import Range

# of metavars, the words of choices are listed in place of a name up to this length
_MOST_CHOICES = 36
# columns: of the flags' names, and of a page at least and at most
_NAMES, _NARROWEST, _PAGE = 27, 50, 100
# what a text stands for, by the end of the flag's name
_METAVARS = {
    **dict.fromkeys(["dir", "folder", "output"], "FOLDER"),
    **dict.fromkeys(["checkpoint", "path", "categories", "model", "save", "load"], "FILE"),
    **dict.fromkeys(["sampler", "encoder"], "NAME"),
    **dict.fromkeys(["resolutions", "labels", "classes", "names", "rate"], "LIST"),
    **dict.fromkeys(["timesteps", "blocks", "seeds", "tune_steps", "tune_lr"], "LIST"),
    "swap": "PAIRS",
    "device": "DEVICE",
    "group": "PATTERN",
}
# how a help text ends that says what the default "", None or () means
_MEANING = re.compile(r"(?:^|[;,:] )(?:''|absent|default): (?P<words>[^;]*)$")


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the help says of a flag.

    :param metavar: what stands for its value; "" of one that takes none, or True or False.
    :param default: what happens without it, in words; "" where `help` says so.
    :param switch: whether it is a boolean.
    """

    metavar: str
    help: str
    default: str = ""
    basic: bool = True
    switch: bool = False

    def text(self, choices: Iterable[Any] | None) -> str:
        """Its help with its choices, where the metavar does not list them, and its default."""
        words = [str(choice) for choice in choices or () if choice != ""]
        text = self.help
        if words and self.metavar == "NAME":
            text += f"; one of {', '.join(words)}"
        quiet = not self.default or (self.switch and self.default == "off")
        return text if quiet else f"{text} (default: {self.default})".strip()


def default_of(field: "dataclasses.Field[Any]") -> tuple[str, str]:
    """A flag's help without what it says of the default, and the default in words."""
    text, default = field.metadata["help"], field.default
    if words := field.metadata["declared"].default:
        return text, words
    if isinstance(default, bool):
        return text, "on" if default else "off"
    if default in ("", None, ()) and (found := _MEANING.search(text)):
        return text[: found.start()], found["words"]
    if isinstance(default, tuple):
        return text, ",".join(map(str, default))
    if isinstance(default, float):
        return text, f"{default:g}"
    return text, "" if default is None else str(default)


def metavar_of(field: "dataclasses.Field[Any]") -> str:
    """What stands for a flag's value."""
    several = " ..." if field.metadata.get("nargs") == "+" else ""
    if metavar := field.metadata["declared"].metavar:
        return metavar + several
    if choices := [str(choice) for choice in field.metadata.get("choices", ()) if choice != ""]:
        listed = "|".join(choices)
        return listed if len(listed) <= _MOST_CHOICES else "NAME"
    kind = field.metadata.get("type", type(field.default))
    if kind is int:
        return "N"
    if kind is float:
        limits = field.metadata.get("limits", Range())
        low = limits.least if limits.above is None else limits.above
        high = limits.most if limits.below is None else limits.below
        return "FRACTION" if (low, high) == (0, 1) else "NUMBER"
    return next((m for end, m in _METAVARS.items() if field.name.endswith(end)), "TEXT")


def page(
    prog: str,
    description: str,
    groups: "Iterable[tuple[str, Sequence[tuple[argparse.Action, Shown]]]]",
    everything: bool,
) -> str:
    """The whole help.

    :param groups: titles, and the arguments and flags below them.
    :param everything: with the flags that are not basic, and with all spellings.
    """
    width = min(max(_NARROWEST, shutil.get_terminal_size().columns - 1), _PAGE)
    groups = list(groups)
    lines = textwrap.wrap(f"usage: {usage(prog, groups)}", width, subsequent_indent=" " * 9)
    for paragraph in description.strip().split("\n\n"):
        lines.append("")
        drawn = any("  " in line or line.startswith(prog) for line in paragraph.splitlines())
        lines += paragraph.splitlines() if drawn else textwrap.wrap(paragraph, width)
    hidden = 0
    for title, pairs in groups:
        chosen = [(a, shown) for a, shown in pairs if everything or shown.basic]
        hidden += len(pairs) - len(chosen)
        if chosen:
            lines += ["", f"{title}:"]
        for action, shown in chosen:
            lines += _entry(_name(action, shown, everything), shown.text(action.choices), width)
    if hidden:
        lines += ["", f"{hidden} further flags: {prog} --help-all"]
    return "\n".join(lines)


def usage(
    prog: str, groups: "Iterable[tuple[str, Sequence[tuple[argparse.Action, Shown]]]]"
) -> str:
    """How to call a command: optional arguments that go together in one pair of brackets.

    :param groups: titles, and the arguments and flags below them.
    """
    words = f"{prog} [flags]"
    arguments = (a for _, pairs in groups for a, _ in pairs if not a.option_strings)
    for number, action in enumerate(arguments):
        name = str(action.metavar)
        optional = action.nargs == "?"
        if optional and number and words.endswith("]"):
            words = f"{words[:-1]} {name}]"
        else:
            name += " ..." if action.nargs == "+" else ""
            words += f" [{name}]" if optional else f" {name}"
    return words


def _name(action: argparse.Action, shown: Shown, everything: bool) -> str:
    """How a flag is spelt; with everything also its short and other names."""
    if not action.option_strings:
        return str(action.metavar)
    name, also = main_spelling(action), ""
    if everything:
        others = [s for s in action.option_strings if s.replace("-", "_") != name.replace("-", "_")]
        also = "".join(f", {spelling}" for spelling in others)
    if shown.switch:
        return f"{name}{also}" + (f", --no_{action.dest}" if shown.default != "off" else "")
    return f"{name} {shown.metavar}".strip() + also


def main_spelling(action: argparse.Action) -> str:
    """That of the original package, with underscores."""
    if f"--{action.dest}" in action.option_strings and action.dest != "help_all":
        return f"--{action.dest}"
    return next(spelling for spelling in action.option_strings if spelling.startswith("--"))


def _entry(name: str, text: str, width: int) -> list[str]:
    """The lines of a flag: its name, and the text beside it or below."""
    lines = textwrap.wrap(text, width - _NAMES, break_on_hyphens=False) or [""]
    indent = " " * _NAMES
    if len(name) + 4 > _NAMES:
        return [f"  {name}", *(f"{indent}{line}" for line in lines)]
    return [f"  {name:{_NAMES - 2}}{lines[0]}", *(f"{indent}{line}" for line in lines[1:])]


def version() -> str:
    """The versions of the package and of torch, which is not imported."""
    from importlib import metadata  # slow, and not needed for work

    found = []
    for name in ("guided-diffusion", "torch"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
    return ", ".join(found)
