"""The progress bar of all commands, with rate and remaining time."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

_hidden = False


def hide_bars() -> None:
    """Show no bars from now on: of several processes, the one that started them shows its own."""
    global _hidden
    _hidden = True


def progress_bar(total: int | None, unit: str = "step", **options: Any) -> tqdm:
    """A bar on rank 0, redrawn twice a second on a terminal and once a minute in a log file.

    :param total: number of steps; None if unknown; 0 shows no bar.
    :param options: for tqdm.
    """
    return tqdm(
        total=total,
        unit=unit,
        disable=_hidden or not _is_main() or total == 0,
        mininterval=0.5 if sys.stderr.isatty() else 60,
        dynamic_ncols=True,
        **options,
    )


def _is_main() -> bool:
    """Whether this is rank 0, the only rank unless torch is in use."""
    dist = sys.modules.get("torch.distributed")
    return dist is None or not dist.is_initialized() or dist.get_rank() == 0


def track(items: Iterable[T], description: str, unit: str = "image") -> Iterator[T]:
    """Iterate over items with a bar, drawn on a terminal only and erased at the end."""
    disable = True if _hidden else None
    return iter(tqdm(items, desc=description, unit=unit, disable=disable, leave=False))
