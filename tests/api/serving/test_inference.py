"""The queue in front of the inference thread, with a model that notes what it is given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from api.serving.cache import ModelKey
from api.serving.inference import MAX_BATCH_IMAGES, PAUSE_SECONDS, Inference
from shared.errors import TooBusy

KEY = ModelKey("a", "a", 2)
OTHER = ModelKey("b", "b", 2)
FOREVER = 3600.0


class Cache:
    """Two models of one class, without weights."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int]] = []

    def get(self, key: ModelKey) -> Any:
        def predict(images: Any) -> Any:
            self.batches.append((key.checkpoint_id, len(images)))
            return np.ones((len(images), 1), np.float32)

        return SimpleNamespace(predict=predict, bundle=SimpleNamespace(classes=("a",)))


@pytest.fixture
def cache() -> Cache:
    return Cache()


@pytest.fixture
def patient(cache: Cache) -> Iterator[Inference]:
    """It would wait for a full batch for an hour."""
    inference = Inference(cache, 1000, max_wait_seconds=FOREVER)  # type: ignore[arg-type]
    yield inference
    inference.stop()


def squares(number: int) -> Any:
    return np.zeros((number, 2, 2, 3), np.uint8)


def test_a_refusal_waits_for_a_place_to_become_free_first(cache: Cache) -> None:
    inference = Inference(cache, 1)  # type: ignore[arg-type]

    async def ask() -> None:
        await inference.room()
        with inference.place():
            early = asyncio.create_task(inference.room())
            await asyncio.sleep(0)
            began = time.monotonic()
            with pytest.raises(TooBusy):
                await inference.room()
            assert time.monotonic() - began >= PAUSE_SECONDS
            with pytest.raises(TooBusy):
                await early
            late = asyncio.create_task(inference.room())
            await asyncio.sleep(0)
        await late

    asyncio.run(ask())
    inference.stop()


def test_an_idle_model_does_not_wait_unless_it_is_let(cache: Cache) -> None:
    inference = Inference(cache, 1000)  # type: ignore[arg-type]
    inference.submit(KEY, squares(1)).result(timeout=20)
    inference.stop()
    assert cache.batches == [("a", 1)]


def test_a_model_that_may_wait_takes_a_batch_as_soon_as_it_is_full(
    patient: Inference, cache: Cache
) -> None:
    half = MAX_BATCH_IMAGES // 2
    first = patient.submit(KEY, squares(half))
    other = patient.submit(OTHER, squares(half))
    second = patient.submit(KEY, squares(half))
    for answer in (first, second):
        answer.result(timeout=20)
    assert cache.batches == [("a", MAX_BATCH_IMAGES)]
    assert not other.done()


def test_what_waits_for_a_batch_to_fill_is_cancelled_by_the_end(
    patient: Inference, cache: Cache
) -> None:
    answer = patient.submit(KEY, squares(1))
    patient.stop()
    assert answer.cancelled()
    assert cache.batches == []


def test_a_wait_ends_when_its_time_is_over(cache: Cache) -> None:
    inference = Inference(cache, 1000, max_wait_seconds=0.002)  # type: ignore[arg-type]
    answer = inference.submit(KEY, squares(1)).result(timeout=20)
    inference.stop()
    assert cache.batches == [("a", 1)]
    # The thread is there after it has imported torch, long after the 2 ms.
    assert answer.queue_ms >= 2
