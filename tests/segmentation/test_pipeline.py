"""Threads around the network: order, bounds, errors."""

import threading
import time

import pytest

from guided_diffusion.segmentation.pipeline import in_batches, prefetch


def test_results_come_in_order_though_they_end_in_another():
    def slow(n):
        time.sleep(0.02 if n % 2 == 0 else 0)
        return n * n

    assert list(prefetch(slow, range(9), workers=3, ahead=4)) == [n * n for n in range(9)]


def test_no_more_is_drawn_than_allowed():
    drawn = []

    def items():
        for n in range(20):
            drawn.append(n)
            yield n

    results = prefetch(str, items(), ahead=3)
    assert next(results) == "0"
    assert drawn == [0, 1, 2, 3]
    next(results)
    assert len(drawn) == 5
    results.close()


def test_work_overlaps():
    meet = threading.Barrier(2, timeout=5)
    assert len(list(prefetch(lambda n: meet.wait(), range(4), workers=2))) == 4


def test_an_error_comes_in_its_place_and_ends_the_rest():
    begun = []

    def work(n):
        begun.append(n)
        if n == 2:
            raise ValueError("two")
        return n

    results = prefetch(work, range(100), workers=1, ahead=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(begun) <= 6


def test_what_was_begun_is_finished_when_the_consumer_stops():
    finished = []

    def work(n):
        time.sleep(0.05)
        finished.append(n)
        return n

    results = prefetch(work, range(50), workers=2, ahead=8)
    next(results)
    results.close()
    count = len(finished)
    assert count < 9
    time.sleep(0.1)
    assert len(finished) == count


def test_batches():
    assert list(in_batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(in_batches([], 2)) == []
