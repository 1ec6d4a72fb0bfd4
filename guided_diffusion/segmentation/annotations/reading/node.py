"""Values in a JSON file of unknown origin, which know where they stand for messages."""

import contextlib
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from guided_diffusion.images.names import composed
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import read_json

# coordinates beyond are no drawing: they would take minutes to fill, or overflow
MOST_COORDINATE = 1e6
_SHOWN = 60


class Node:
    """A value, and its place: `labels.json annotations[3].bbox`."""

    def __init__(self, value: Any, where: str, root: bool = False) -> None:
        self.value = value
        self.where = where
        self._dot = " " if root else "."

    def fail(self, wanted: str, remedy: str = "export it again") -> UserError:
        """What to raise where the value is not what it must be."""
        return UserError(f"{self.where} is {short(self.value)}, not {wanted}; {remedy}")

    def get(self, key: str) -> "Node | None":
        """The value of a key; None if it is absent or null."""
        if not isinstance(self.value, dict):
            raise self.fail("an object with names")
        value = self.value.get(key)
        return None if value is None else Node(value, f"{self.where}{self._dot}{short_key(key)}")

    def need(self, key: str) -> "Node":
        """The value of a key.

        :raises UserError: if it is absent or null.
        """
        found = self.get(key)
        if found is None:
            raise UserError(f"{self.where} lacks {key!r}; export it again")
        return found

    def entries(self) -> Iterator["Node"]:
        """The values of a list."""
        if not isinstance(self.value, list):
            raise self.fail("a list")
        for number, value in enumerate(self.value):
            yield Node(value, f"{self.where}[{number}]")

    def items(self) -> Iterator[tuple[str, "Node"]]:
        """The values of an object, by name."""
        if not isinstance(self.value, dict):
            raise self.fail("an object with names")
        for key, value in self.value.items():
            yield key, Node(value, f"{self.where}{self._dot}{short_key(key)}")

    def text(self) -> str:
        """A text that is not blank, on one line, in Unicode's composed form."""
        if not isinstance(self.value, str):
            raise self.fail("a text")
        text = composed(self.value.strip())
        if not text or not text.isprintable():
            raise self.fail("a text on one line")
        return text

    def name(self) -> str:
        """A name that a file or class may have; numbers count as their digits."""
        if isinstance(self.value, int) and not isinstance(self.value, bool):
            return str(self.value)[:_SHOWN]
        return self.text()

    def path(self) -> str:
        """The name of a file, as it is: its bytes need not be UTF-8."""
        if not isinstance(self.value, str) or not self.value.strip() or "\0" in self.value:
            raise self.fail("the name of a file")
        return self.value

    def number(self) -> float:
        value = math.nan
        if _is_number(self.value):
            with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
                value = float(self.value)
        if not math.isfinite(value):
            raise self.fail("a number")
        return value

    def coordinate(self) -> float:
        """A number that can be a place in an image."""
        value = self.number()
        if abs(value) > MOST_COORDINATE:
            raise self.fail("a place in or near the image", "correct the annotation")
        return value

    def whole(self, least: int = 0, most: int = 2**31 - 1) -> int:
        value = self.value
        if not _is_number(value) or value != value or not least <= value <= most:
            raise self.fail(f"a whole number from {least} to {most}")
        if value != int(value):
            raise self.fail("a whole number")
        return int(value)

    def points(self) -> np.ndarray:
        """A list of pairs [x, y]: float64 [N x 2]."""
        pairs = list(self.entries())
        for pair in pairs:
            if not isinstance(pair.value, list) or len(pair.value) != 2:
                raise pair.fail("a point [x, y]", "correct the annotation")
        return _coordinates([number for pair in pairs for number in pair.entries()])

    def flat_points(self) -> np.ndarray:
        """A list x, y, x, y, ...: float64 [N x 2]."""
        numbers = list(self.entries())
        if len(numbers) % 2:
            raise UserError(f"{self.where} has an odd count of coordinates, {len(numbers)}")
        return _coordinates(numbers)

    def whole_numbers(self, most: int = 2**31 - 1) -> np.ndarray:
        """A list of whole numbers from 0 on: int64 [N]."""
        if not isinstance(self.value, list):
            raise self.fail("a list")
        if all(type(value) is int and 0 <= value <= most for value in self.value):
            return np.array(self.value, np.int64)
        return np.array([number.whole(0, most) for number in self.entries()], np.int64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _coordinates(numbers: list[Node]) -> np.ndarray:
    return np.array([number.coordinate() for number in numbers], np.float64).reshape(-1, 2)


def short(value: Any) -> str:
    """A value for a message: printable, on one line, shortened."""
    if isinstance(value, dict | list):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}" if value else f"an empty {kind.split()[1]}"
    text = ascii(value) if not str(value).isprintable() else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def short_key(key: str) -> str:
    """A key for a message."""
    shown = key if key.isprintable() else ascii(key)[1:-1]
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


@lru_cache(maxsize=1)
def _parsed(path: str) -> Any:
    return read_json(path, "the annotations")


def load(path: str) -> Node:
    """The content of a JSON file; that of the last one is kept, as it is asked for repeatedly.

    :raises UserError: if it is not JSON.
    """
    return Node(_parsed(path), path, root=True)


def forget() -> None:
    """Release the content that `load` keeps."""
    _parsed.cache_clear()
