"""Progress bars with rate and remaining time."""

import sys
from typing import Any

from tqdm import tqdm

from guided_diffusion import dist_util


def progress_bar(total: int, unit: str = "step", **options: Any) -> tqdm:
    """A bar on rank 0, drawn twice a second on a terminal and once a minute in a log file."""
    return tqdm(
        total=total,
        unit=unit,
        disable=not (dist_util.is_main() and total),
        mininterval=0.5 if sys.stderr.isatty() else 60,
        dynamic_ncols=True,
        **options,
    )
