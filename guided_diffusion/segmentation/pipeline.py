"""Threads that read ahead and write behind, so that the network never waits for files."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int = 2, ahead: int = 4
) -> Iterator[Result]:
    """The results of `function` for each of `items`, in order, computed by threads.

    `items` is consumed in the caller's thread, at most `ahead` items ahead of the next result. An
    error is raised in place of its result, and nothing new is started after it; what was started
    is finished before control returns, even if the caller is interrupted.

    :param workers: number of threads.
    :param ahead: items consumed whose results have not been returned: memory must hold them.
    """
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
