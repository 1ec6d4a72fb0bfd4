"""Timing work that may be too large to run here by pieces of it."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th

# timed calls of a piece, at most, beside a first one that also allocates and tunes; and seconds
# after which there are enough
_CALLS, _ENOUGH = 9, 5.0
# a call that takes this share of the time allowed is not repeated
_LONG = 0.25


class Piece(NamedTuple):
    """Images of a number and of a size (pixels) that a network computes at a time."""

    images: int
    side: int


class Timing(NamedTuple):
    """Seconds that a piece takes: the median, and those of the first call."""

    piece: Piece
    seconds: float
    first: float


def pieces_of(whole: Piece, multiple: int) -> list[Piece]:
    """The whole and smaller pieces of it, ascending.

    :param multiple: of which a side must be one.
    """
    sides = [whole.side]
    while sides[-1] % (2 * multiple) == 0 and sides[-1] > 2 * multiple:
        sides.append(sides[-1] // 2)
    numbers = [1]
    while numbers[-1] * 2 < whole.images:
        numbers.append(numbers[-1] * 2)
    small = [Piece(1, side) for side in reversed(sides)]
    more = [Piece(number, whole.side) for number in numbers[1:]]
    return [*small, *more, *([whole] if whole.images > 1 else [])]


def time_largest(
    pieces: Sequence[Piece],
    seconds_of: Callable[[Piece], float],
    work: Callable[[Piece], float],
    longest: float,
    fits: Callable[[Piece], bool] = lambda piece: True,
) -> Timing:
    """Time the largest piece that a call of at most `longest` seconds does.

    How long a piece takes is foreseen from a smaller one that was timed, by the work in each.

    :param pieces: ascending; the first is run in any case.
    :param seconds_of: runs a piece; an out-of-memory error rules out that piece and larger ones.
    :param work: in any unit, such as operations.
    :param fits: whether there is memory for a piece.
    """
    at, end = 0, len(pieces)
    timing = _time(pieces[0], seconds_of, longest)
    while True:
        affordable = longest * work(timing.piece) / max(timing.seconds, 1e-9)
        candidates = (i for i in range(end - 1, at, -1) if work(pieces[i]) <= affordable)
        chosen = next((i for i in candidates if fits(pieces[i])), None)
        if chosen is None:
            return timing
        try:
            timing = _time(pieces[chosen], seconds_of, longest)
            at = chosen
        except th.OutOfMemoryError:
            end = chosen


def _time(piece: Piece, seconds_of: Callable[[Piece], float], longest: float) -> Timing:
    first = seconds_of(piece)
    if first > _LONG * longest:
        return Timing(piece, first, first)
    seconds = [seconds_of(piece)]
    while len(seconds) < _CALLS and sum(seconds) < _ENOUGH:
        seconds.append(seconds_of(piece))
    return Timing(piece, statistics.median(seconds), first)
