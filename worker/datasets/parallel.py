"""Work on many small pieces with a few threads: in order, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from shared.settings import num_cores

T = TypeVar("T")
R = TypeVar("R")

MIN_BYTES_FOR_THREADS = 16 * 2**10
"""Images smaller than this decode in so short a time that threads mostly wait for the
interpreter's lock: a second one made packing 1 KiB JPEGs of 32x32 pixels a third slower."""


def decode_threads(mean_image_bytes: float, num_threads: int) -> int:
    """How many threads to decode images of this size with; `num_threads` 0: as many as cores."""
    return (num_threads or num_cores()) if mean_image_bytes >= MIN_BYTES_FOR_THREADS else 1


def batched(items: Iterable[T], size_of: Callable[[T], int], max_bytes: int) -> Iterator[list[T]]:
    """The items in lists of at most 64, or fewer where they reach `max_bytes` together."""
    batch: list[T] = []
    num_bytes = 0
    for item in items:
        batch.append(item)
        num_bytes += size_of(item)
        if len(batch) == 64 or num_bytes >= max_bytes:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def map_ordered(
    function: Callable[[T], R], items: Iterable[T], num_threads: int
) -> Generator[R, None, None]:
    """`function` of each item, in the items' order, with at most two waiting for each thread.

    When the consumer leaves early, what has not begun is dropped and what has is waited for.
    """
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
