"""Run lengths of masks."""

import numpy as np


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of runs along the rows of a mask, of pixels outside and inside in turn; the first
    is 0 if the first pixel is inside."""
    flat = np.concatenate([[False], mask.ravel()])
    turns = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], turns, [mask.size]])).tolist()
