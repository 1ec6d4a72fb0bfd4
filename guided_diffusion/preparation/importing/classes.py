"""From the names of a source to a class table, and which of two classes lies on top."""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.names import composed
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.source import Color
from guided_diffusion.segmentation.categories import (
    IGNORE_COLOR,
    MAX_CATEGORIES,
    Category,
    ClassTable,
    generic_categories,
    load_categories,
)

# names that stand for no class; the second forms are LabelMe's
BACKGROUND = ("background", "_background_")
IGNORED = ("ignore", "__ignore__")
_UNNAMED = re.compile(r"class (\d{1,3})")


@dataclass(frozen=True)
class Classes:
    """What becomes of the names of a source.

    table  the class table of the masks
    value  index in the masks by name in the source; None leaves the annotation out
    rank   by index; regions of a higher rank lie on top, of equal ones the later
    """

    table: ClassTable
    value: Mapping[str, int | None]
    rank: Mapping[int, int]


def plan(
    found: Mapping[str, Color | None],
    joins: str = "",
    priority: str = "",
    categories: str = "",
    ignoring: bool = False,
    source: str = "the source",
) -> Classes:
    """The classes of masks.

    :param found: colours by name in the source, in its order.
    :param joins: NAME=CLASS,NAME=CLASS,...; without a class, annotations of the name are left out.
    :param priority: CLASS,CLASS,..., the topmost first.
    :param categories: a class table to use; "": one is made of the names.
    :param ignoring: whether masks also mark pixels without a label.
    :param source: what the names are from, for messages.
    :raises UserError: for a name that is not there.
    """
    targets = {name: name for name in found}
    for name, target in _parse(joins).items():
        if name not in targets:
            raise UserError(
                f"--map {joins}: there is no class {name!r}; there are {_listed(found)}"
            )
        targets[name] = target
    table = _given(categories, ignoring) if categories else None
    if table is None:
        table = _made(found, targets, ignoring, source)
    known = {category.name.casefold(): category.index for category in table.entries}
    value = {name: _value(target, table, known, categories) for name, target in targets.items()}
    order = [word for word in _split(priority) if word]
    rank: dict[int, int] = {}
    for height, word in enumerate(reversed(order), 1):
        index = known.get(word.casefold())
        if index is None or word in order[: len(order) - height]:
            why = "is named twice" if index is not None else "is no class"
            raise UserError(
                f"--priority {priority}: {word!r} {why}; classes are"
                f" {_listed([category.name for category in table])}"
            )
        rank[index] = height
    return Classes(table, value, rank)


def _split(text: str) -> list[str]:
    """The parts between commas; a part in quotes may hold some."""
    try:
        rows = list(csv.reader([text], skipinitialspace=True))
    except csv.Error:
        rows = [text.split(",")]
    return [composed(part.strip()) for part in (rows[0] if rows else [])]


def _parse(joins: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, _split(joins)):
        name, equals, target = (piece.strip() for piece in part.rpartition("="))
        if not equals or not name:
            raise UserError(f"--map {joins}: expected NAME=CLASS, or NAME= to leave it out")
        if not target.isprintable():
            raise UserError(f"--map: {target!a} is no name of a class")
        found[name] = target
    return found


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return ", ".join(shown[:12]) + more if shown else "none"


def _value(target: str, table: ClassTable, known: Mapping[str, int], categories: str) -> int | None:
    if not target:
        return None
    if target.casefold() in known:
        return known[target.casefold()]
    if target.casefold() in BACKGROUND:
        return 0
    if target.casefold() in IGNORED:
        return table.ignored[0].index if table.ignored else IGNORE
    unnamed = _UNNAMED.fullmatch(target)
    if unnamed and 0 < int(unnamed[1]) < len(table):
        return int(unnamed[1])
    raise UserError(
        f"{categories} has no class {target!r}; add it there, or say what becomes of it with"
        f' --map "{target}=CLASS"'
    )


def _given(path: str, ignoring: bool) -> ClassTable:
    table = load_categories(path)
    if not ignoring or table.ignored:
        return table
    return ClassTable(table, [Category(IGNORE, "unlabelled", IGNORE_COLOR)])


def _made(
    found: Mapping[str, Color | None], targets: Mapping[str, str], ignoring: bool, source: str
) -> ClassTable:
    """A table of the names that remain, in their order, in their colours as far as they differ."""
    wanted: dict[str, Color | None] = {}
    spelt: dict[str, str] = {}
    for name, target in targets.items():
        key = target.casefold()
        ignoring = ignoring or key in IGNORED
        if not target or key in BACKGROUND or key in IGNORED:
            continue
        if spelt.setdefault(key, target) != target:
            raise UserError(
                f"{spelt[key]!r} and {target!r} differ only in capital letters; join them with"
                f' --map "{name}={spelt[key]}"'
            )
        # joined classes have the colour of the one whose name they take
        wanted[target] = (found.get(target) or wanted.get(target)) or found[name]
    if not wanted:
        raise UserError(f"{source}: no class is left but those that --map leaves out")
    if len(wanted) >= MAX_CATEGORIES:
        raise UserError(
            f"there are {len(wanted)} classes, {_listed(wanted)}; masks hold"
            f" {MAX_CATEGORIES - 1}: join some with --map"
        )
    taken: set[Color] = {(0, 0, 0), IGNORE_COLOR}
    colors: dict[str, Color] = {}
    for name, color in wanted.items():
        if color is not None and color not in taken:
            taken.add(color)
            colors[name] = color
    spare = (c.color for c in generic_categories(MAX_CATEGORIES) if c.color not in taken)
    table = [Category(0, "background", (0, 0, 0))]
    for index, name in enumerate(wanted, 1):
        table.append(Category(index, name, colors.get(name) or _next(spare, taken)))
    ignored = [Category(IGNORE, "unlabelled", IGNORE_COLOR)] if ignoring else []
    return ClassTable(table, ignored)


def _next(spare: Iterable[Color], taken: set[Color]) -> Color:
    for color in spare:
        if color not in taken:
            taken.add(color)
            return color
    # hundreds of classes: any colour that is free
    code = next(i for i in range(1, 2**24) if (i >> 16, i >> 8 & 255, i & 255) not in taken)
    taken.add((code >> 16, code >> 8 & 255, code & 255))
    return code >> 16, code >> 8 & 255, code & 255
