from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from worker.datasets.parallel import batched, decode_threads, map_ordered


def test_results_come_in_order_whichever_is_ready_first() -> None:
    second_is_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_is_done.wait(30)
        elif item == 1:
            second_is_done.set()
        return item * 10

    assert list(map_ordered(work, range(5), 2)) == [0, 10, 20, 30, 40]


def test_no_more_is_taken_than_a_few_for_each_thread() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(1000):
            taken += 1
            yield item

    results = map_ordered(lambda item: item, items(), 2)
    assert next(results) == 0
    assert taken == 5
    results.close()


def test_an_error_reaches_the_consumer() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_ordered(lambda item: 1 // item, [1, 0, 1], 2))


def test_batches_end_at_64_items_or_when_they_are_heavy() -> None:
    assert [len(batch) for batch in batched(range(130), lambda _: 1, 1000)] == [64, 64, 2]
    assert list(batched([3, 3, 9, 1], int, 5)) == [[3, 3], [9], [1]]


def test_small_images_are_decoded_by_one_thread() -> None:
    assert decode_threads(1000, 8) == 1
    assert decode_threads(100_000, 8) == 8
    assert decode_threads(100_000, 0) >= 1
