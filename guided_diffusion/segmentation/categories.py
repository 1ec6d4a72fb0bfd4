"""The class table: the meaning and the colour of each value in index masks."""

import colorsys
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.masks import MaskRule, ignored_values
from guided_diffusion.images.names import composed
from guided_diffusion.images.splits import SPLITS
from guided_diffusion.images.swaps import Swaps, check_swap_classes
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import read_json

TABLE_NAME = "categories.json"
DEFAULT_CATEGORIES = str(Path(__file__).with_name(TABLE_NAME))
MAX_CATEGORIES = 255  # masks have 8 bits, and 255 in them means "ignore"
IGNORE_COLOR = (128, 128, 128)
CODES_EXAMPLE = (
    '{"category": ["123037004", "SCT", "Anatomical Structure"],'
    ' "type": ["39607008", "SCT", "Lung"]}'
)
_CODE_LENGTHS = (16, 16, 64)  # characters of DICOM's CodeValue, CodingSchemeDesignator, CodeMeaning
EXAMPLE = '{"index": 1, "name": "enamel", "color": [255, 0, 0]}'

# in the name of a class, such as "left lung" or "lung_right"
_SIDE = r"(?<![a-z])(left|right)(?![a-z])"


class Code(NamedTuple):
    """A term of a vocabulary, such as ("39607008", "SCT", "Lung")."""

    value: str
    scheme: str
    meaning: str


class SegmentCodes(NamedTuple):
    """What a class is in DICOM: Segmented Property Category and Type (PS3.3 C.8.20.2)."""

    category: Code
    type: Code


@dataclass(frozen=True)
class Category:
    """One class.

    :param index: its value in index masks.
    :param name: its name.
    :param color: red, green and blue, 0 to 255.
    :param codes: its meaning in DICOM, None if the class table does not say.
    """

    index: int
    name: str
    color: tuple[int, int, int]
    codes: SegmentCodes | None = None


class ClassTable(tuple[Category, ...]):
    """The classes of a task, by index; `ignored`: the values of pixels without a label."""

    ignored: tuple[Category, ...]

    def __new__(cls, classes: Iterable[Category], ignored: Iterable[Category] = ()) -> "ClassTable":
        table = super().__new__(cls, classes)
        table.ignored = tuple(ignored)
        return table

    @property
    def entries(self) -> tuple[Category, ...]:
        """The classes, then the ignored values."""
        return (*self, *self.ignored)

    def mask_rule(self, binary: bool = False, threshold: int | None = None) -> MaskRule:
        """How to read masks of these classes."""
        values = tuple(category.index for category in self.ignored)
        return MaskRule(len(self), values, binary, threshold)

    def ignoring(self, index: int) -> "ClassTable":
        """The table in which a value is ignored, as `--ignore_index` asks; -1: the table itself."""
        known = [category.index for category in self.ignored]
        more = [
            Category(i, "ignored", IGNORE_COLOR) for i in ignored_values(index) if i not in known
        ]
        return ClassTable(self, (*self.ignored, *more))


# the class table of masks that only separate foreground from background
BINARY = ClassTable((Category(0, "background", (0, 0, 0)), Category(1, "foreground", (255, 0, 0))))


def load_categories(path: str | None = None) -> ClassTable:
    """Read a class table, sorted by index.

    :param path: a JSON file; None or "" for the project's own table (bitewings).
    :raises UserError: naming the file and the fault: not JSON, indices other than 0, 1, 2, ... (of
        values marked `"ignore": true`: any above), or a name or colour that two classes share.
    """
    path = str(path or DEFAULT_CATEGORIES)
    plain = read_json(path, "the class table")
    return from_plain(plain, source=path)


def table_beside(folder: str) -> str:
    """The class table's file in a folder or beside it; "" if there is none."""
    places = (folder, os.path.dirname(os.path.normpath(folder)))
    paths = (os.path.join(place, TABLE_NAME) for place in places)
    return next(filter(os.path.isfile, paths), "")


def table_of_masks(masks: str) -> str:
    """The class table's file of masks: where they are, beside, or beside their TRAIN, VAL or TEST.

    :param masks: a folder, a file or a glob pattern.
    :return: "" if there is none.
    """
    folder = masks if os.path.isdir(masks) else os.path.dirname(masks)
    part = os.path.dirname(os.path.normpath(folder))
    found = table_beside(folder)
    if not found and os.path.basename(part).lower() in SPLITS:
        found = table_beside(part)
    return found


def from_plain(plain: Any, source: str = "the class table") -> ClassTable:
    """Check and build a class table from plain lists and dictionaries; see `to_plain`."""
    if not isinstance(plain, list | tuple):
        plain = []
    entries = [(_category(item, source), item.get("ignore", False)) for item in plain]
    table = sorted((c for c, ignored in entries if not ignored), key=lambda c: c.index)
    ignored = sorted((c for c, ignored in entries if ignored), key=lambda c: c.index)
    if not 2 <= len(table) <= MAX_CATEGORIES:
        raise UserError(
            f"{source}: expected a list of 2 to {MAX_CATEGORIES} classes, each like {EXAMPLE}."
        )
    indices = [category.index for category in table]
    if indices != list(range(len(table))):
        raise UserError(
            f"{source}: the indices are {indices}; expected 0 to {len(table) - 1}, each once"
            ' (values of pixels without a label are marked "ignore": true).'
        )
    for number, category in enumerate(ignored):
        if not len(table) <= category.index <= IGNORE or category in ignored[:number]:
            raise UserError(
                f"{source}: ignored index {category.index} ({category.name}): expected values from"
                f" {len(table)} to {IGNORE}, each once."
            )
    _check_unique([*table, *ignored], source)
    return ClassTable(table, ignored)


def _check_unique(entries: Sequence[Category], source: str) -> None:
    names: dict[str, int] = {}
    colors: dict[tuple[int, int, int], int] = {}
    for category in entries:
        twin = names.setdefault(category.name.casefold(), category.index)
        if twin != category.index:
            raise UserError(
                f"{source}: classes {twin} and {category.index} share the name {category.name!r}."
            )
        twin = colors.setdefault(category.color, category.index)
        if twin != category.index:
            raise UserError(
                f"{source}: classes {twin} and {category.index} share the colour "
                f"{list(category.color)}; colour masks would be ambiguous."
            )


def _category(item: Any, source: str) -> Category:
    required = {"index", "name", "color"}
    if not isinstance(item, dict) or not required <= set(item) <= {*required, "ignore", "dicom"}:
        raise UserError(f"{source}: {_short(item)} is not a class; write it like {EXAMPLE}.")
    index, name, color = item["index"], item["name"], item["color"]
    if not _is_int(index):
        raise UserError(f"{source}: index {_short(index)} is not an integer.")
    if not isinstance(item.get("ignore", False), bool):
        raise UserError(
            f'{source}: class {index}: "ignore" is true or false, not {_short(item["ignore"])}.'
        )
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise UserError(f"{source}: class {index} needs a name on one line, not {_short(name)}.")
    if (
        not isinstance(color, list | tuple)
        or len(color) != 3
        or not all(_is_int(v) and 0 <= v <= 255 for v in color)
    ):
        raise UserError(
            f"{source}: class {index} ({name}) has the colour {_short(color)}; "
            "a colour is [red, green, blue], each from 0 to 255."
        )
    codes = _codes(item["dicom"], f"{source}: class {index} ({name})") if "dicom" in item else None
    return Category(index, composed(name.strip()), tuple(color), codes)


def _codes(item: Any, which: str) -> SegmentCodes:
    if isinstance(item, dict) and set(item) == set(SegmentCodes._fields):
        terms = [item[name] for name in SegmentCodes._fields]
        if all(map(_is_term, terms)):
            return SegmentCodes(*(Code(*map(str.strip, term)) for term in terms))
    raise UserError(f'{which}: {_short(item)} is no "dicom"; write it like {CODES_EXAMPLE}.')


def _is_term(item: Any) -> bool:
    return (
        isinstance(item, list | tuple)
        and len(item) == len(_CODE_LENGTHS)
        and all(isinstance(text, str) and text.isprintable() for text in item)
        and all(0 < len(text.strip()) <= most for text, most in zip(item, _CODE_LENGTHS))
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_plain(categories: Sequence[Category]) -> list[dict[str, Any]]:
    """A class table as plain values, for JSON and for checkpoints read with `weights_only=True`."""
    plain = [_to_plain(category) for category in categories]
    for category in categories.ignored if isinstance(categories, ClassTable) else ():
        plain.append({**_to_plain(category), "ignore": True})
    return plain


def _to_plain(category: Category) -> dict[str, Any]:
    plain = {"index": category.index, "name": category.name, "color": list(category.color)}
    if category.codes:
        plain["dicom"] = {name: list(term) for name, term in category.codes._asdict().items()}
    return plain


def generic_categories(n: int) -> ClassTable:
    """A table for `n` unnamed classes: "background" (black), "class 1", "class 2", ...

    The hues step by the golden ratio, so that neighbouring indices look unlike each other.
    """
    if not 2 <= n <= MAX_CATEGORIES:
        raise UserError(f"{n} classes: choose between 2 and {MAX_CATEGORIES}.")
    table = [Category(0, "background", (0, 0, 0))]
    for index in range(1, n):
        hue = (index - 1) * 0.618034 % 1.0
        saturation, value = ((1.0, 1.0), (0.55, 1.0), (1.0, 0.65))[(index - 1) // 12 % 3]
        red, green, blue = (round(255 * v) for v in colorsys.hsv_to_rgb(hue, saturation, value))
        table.append(Category(index, f"class {index}", (red, green, blue)))
    return ClassTable(table)


def categories_for(num_classes: int, path: str | None = None) -> ClassTable:
    """The class table for a task of `num_classes`.

    :param path: a table of as many classes; without one, the project's own table if it has as many,
        or else a generic one.
    """
    if path:
        table = load_categories(path)
        if len(table) != num_classes:
            raise UserError(
                f"{path} lists {len(table)} classes but {num_classes} were requested; "
                "make them agree."
            )
        return table
    table = load_categories()
    return table if len(table) == num_classes else generic_categories(num_classes)


def resolve_categories(
    count: Callable[[], int],
    number: int = 0,
    path: str = "",
    binary: bool = False,
    ignore_index: int = -1,
) -> ClassTable:
    """The class table that the flags ask for, or else one for the classes in the masks.

    :param count: counts the classes in the masks; called only where the flags do not tell.
    :param number: of classes, 0 if not given.
    :param path: of a class table, "" if not given.
    :param binary: masks separate foreground from background, whatever their values.
    :param ignore_index: value of pixels without a label, -1 for none but those of the table.
    """
    if binary:
        if number not in (0, 2):
            raise UserError(f"--binary or --mask_threshold makes two classes, not {number}")
        table = categories_for(2, path) if path else BINARY
    elif number:
        table = categories_for(number, path)
    else:
        table = load_categories(path) if path else categories_for(count())
    return table.ignoring(ignore_index)


def check_same_classes(
    one: Sequence[Category], other: Sequence[Category], names: Sequence[str], remedy: str
) -> None:
    """Refuse to mix what two class tables describe: masks, or predictions.

    Classes are the same if each index has the same name, in upper or lower case. Colours, codes and
    the values of pixels without a label may differ.

    :param names: of what has the tables, for messages; :param remedy: what to do, or what holds.
    :raises UserError: naming the first class that differs.
    """
    first, second = names
    for index, (ours, theirs) in enumerate(zip(one, other)):
        if ours.name.casefold() != theirs.name.casefold():
            raise UserError(
                f"class {index} is {ours.name!r} in {first} and {theirs.name!r} in {second}:"
                f" {remedy}"
            )
    if len(one) != len(other):
        raise UserError(f"{first} has {len(one)} classes and {second} {len(other)}: {remedy}")


def check_swaps(
    categories: Sequence[Category],
    swaps: Swaps,
    chosen: bool,
    mirroring: str = "--tta",
    instead: str = "use --tta shifts",
) -> None:
    """Refuse to mirror radiographs if classes have a side and nobody said how to exchange them.

    :param chosen: whether the user chose `swaps`, be it by choosing none.
    :param mirroring: the flag that mirrors.
    :param instead: what to do to mirror nothing.
    :raises UserError: also if a pair names a class that does not exist.
    """
    check_swap_classes(swaps, len(categories))
    sided = [c for c in categories if re.search(_SIDE, c.name.lower())]
    if sided and not chosen:
        opposite = {"left": "right", "right": "left"}
        names = {c.name.lower(): c.index for c in sided}
        pairs = set()
        for name, index in names.items():
            other = names.get(re.sub(_SIDE, lambda m: opposite[m[1]], name))
            if other is not None:
                pairs.add((min(index, other), max(index, other)))
        advice = ",".join(f"{one}:{other}" for one, other in sorted(pairs)) or "1:2"
        raise UserError(
            f"{mirroring} mirrors radiographs, and {sided[0].name!r} has a side: say which "
            f"classes to exchange, as in --flip_swap {advice}, or {instead}"
        )
