"""Timing the largest piece of work that does not take too long, on a clock of the tests."""

import pytest
import torch as th

from guided_diffusion.training.pieces import Piece, Timing, pieces_of, time_largest

WHOLE = Piece(5, 64)


def pixels(piece: Piece) -> int:
    return piece.images * piece.side**2


class Machine:
    """Takes `rate` seconds per pixel, and twice as long the first time."""

    def __init__(self, rate: float, memory: float = float("inf")):
        self.rate, self.memory = rate, memory
        self.calls: list[Piece] = []

    def __call__(self, piece: Piece) -> float:
        if pixels(piece) > self.memory:
            raise th.OutOfMemoryError("full")
        first = piece not in self.calls
        self.calls.append(piece)
        return self.rate * pixels(piece) * (1 + first)


def test_pieces():
    assert pieces_of(WHOLE, 8) == [(1, 16), (1, 32), (1, 64), (2, 64), (4, 64), (5, 64)]
    assert pieces_of(Piece(1, 24), 8) == [(1, 24)]
    assert pieces_of(Piece(2, 24), 8) == [(1, 24), (2, 24)]
    for piece in pieces_of(Piece(1, 256), 32):
        assert piece.side % 32 == 0


def test_a_fast_machine_runs_the_whole():
    machine = Machine(1e-6)
    assert time_largest(pieces_of(WHOLE, 8), machine, pixels, 10.0) == Timing(
        WHOLE, pytest.approx(1e-6 * pixels(WHOLE)), pytest.approx(2e-6 * pixels(WHOLE))
    )
    assert set(machine.calls) == {(1, 16), WHOLE}


def test_a_slow_one_runs_a_piece_that_is_not_too_long():
    machine = Machine(10 / 5000)  # 5000 pixels in 10 s
    found = time_largest(pieces_of(WHOLE, 8), machine, pixels, 10.0)
    assert found.piece == (1, 64)
    assert machine.calls.count(found.piece) == 1  # too long to repeat


def test_the_smallest_is_run_in_any_case():
    assert time_largest(pieces_of(WHOLE, 8), Machine(100.0), pixels, 10.0).piece == (1, 16)


def test_without_memory_for_the_whole():
    pieces = pieces_of(WHOLE, 8)
    few = Machine(1e-6, memory=3 * 64**2)
    assert time_largest(pieces, few, pixels, 10.0).piece == (2, 64)
    known = Machine(1e-6)
    fits = time_largest(pieces, known, pixels, 10.0, lambda piece: piece.images <= 2)
    assert fits.piece == (2, 64)
    assert all(piece.images <= 2 for piece in known.calls)
    with pytest.raises(th.OutOfMemoryError):
        time_largest(pieces, Machine(1e-6, memory=1), pixels, 10.0)
