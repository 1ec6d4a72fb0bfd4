"""Threads that read ahead and write behind, so that the network does not wait for files."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int = 2, ahead: int = 4
) -> Iterator[Result]:
    """The results of `function` for each of `items`, in order, computed by threads.

    `items` is drawn in the caller's thread, at most `ahead` items before the result that is
    waited for. An error comes up where its result would have, and nothing new is begun after it;
    what was begun is finished before control returns, also when the caller is interrupted.

    :param workers: number of threads.
    :param ahead: items drawn and not yet handed over: what memory must hold.
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
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
