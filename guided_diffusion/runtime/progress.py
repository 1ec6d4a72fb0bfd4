"""The progress bar of all commands, with rate and remaining time.

On a terminal it is redrawn in its place; in a log file it is a line a minute.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from guided_diffusion.runtime import messages

T = TypeVar("T")

# seconds between drawings, on a terminal and in a file
REDRAW_S = 0.5
LINE_S = 60.0

_hidden = False


def hide_bars() -> None:
    """Show no bars from now on: of several processes, the one that started them shows its own."""
    global _hidden
    _hidden = True


class _Lines:
    """A file in which every drawing of a bar is a line of its own."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()


def progress_bar(total: int | None, unit: str = "step", **options: Any) -> tqdm:
    """A bar on rank 0, redrawn twice a second on a terminal; a line a minute in a file.

    :param total: number of steps; None if unknown; 0 shows no bar.
    :param options: for tqdm.
    """
    if "delay" not in options:  # of checks, which may find mistakes
        messages.begin_work()
    return _bar(total=total, unit=unit, disable=not _is_main() or total == 0, **options)


def _bar(disable: bool, **options: Any) -> tqdm:
    """A bar on standard error."""
    disable = disable or _hidden or messages.is_quiet()
    if sys.stderr.isatty():
        drawing: dict[str, Any] = {"mininterval": REDRAW_S, "dynamic_ncols": True}
    else:
        # work that takes less time leaves no line
        drawing = {"mininterval": LINE_S, "delay": LINE_S, "file": _Lines(sys.stderr)}
    return tqdm(disable=disable, **{**options, **drawing})


def _is_main() -> bool:
    """Whether this is rank 0, the only rank unless torch is in use."""
    dist = sys.modules.get("torch.distributed")
    return dist is None or not dist.is_initialized() or dist.get_rank() == 0


def track(items: Iterable[T], description: str, unit: str = "image") -> Iterator[T]:
    """Iterate over items with a bar, drawn on a terminal only and erased at the end."""
    disable = not sys.stderr.isatty()
    return iter(_bar(disable, iterable=items, desc=description, unit=unit, leave=False))
