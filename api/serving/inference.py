"""The one thread that runs models, and the queue in front of it.

Every call of torch (import, load, forward) happens in this thread: several threads that each run
a forward pass on the same cores are much slower than one. What was queued for a model while the
last batch ran goes through it together; nothing waits for a batch to fill up, unless the operator
lets it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import structlog

from api.serving.cache import ModelCache, ModelKey
from api.serving.images import Square
from shared.errors import TooBusy
from skipline import schemas

if TYPE_CHECKING:
    from shared.vision.predictor import Look

log = structlog.get_logger(__name__)

MAX_BATCH_IMAGES = 64
MAX_BATCH_IMAGES_CPU = 16
"""Sixteen images take nearly sixteen times as long as one: a larger batch would only let the next
one wait."""
PAUSE_SECONDS = 0.25
"""Before a client is told to come back later."""
NICENESS = 5
"""Of what computes: the threads that read requests, decode images and answer probes come first."""


@dataclass(frozen=True)
class Answer:
    """`probabilities` float32 [B, num_classes]; times in milliseconds. `look`: where that was
    asked for."""

    probabilities: npt.NDArray[np.float32]
    classes: tuple[str, ...]
    queue_ms: float
    load_ms: float
    forward_ms: float
    look: Look | None = None


@dataclass(frozen=True, eq=False)
class _Request:
    key: ModelKey
    images: Square
    looks: bool
    answer: Future[Answer] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)


class Inference:
    """Answers predictions one batch after the other.

    Args:
        max_waiting: predictions that are in work or wait at a time.
        max_batch_images: that go through a network together, unless one request has more.
        max_wait_seconds: that an idle network waits for a batch to fill up, counted from when the
            first of its requests was queued.
    """

    def __init__(
        self,
        cache: ModelCache,
        max_waiting: int,
        max_wait_seconds: float = 0.0,
        max_batch_images: int = MAX_BATCH_IMAGES,
    ) -> None:
        self._cache = cache
        self._max_waiting = max_waiting
        self._max_wait_seconds = max_wait_seconds
        self._max_batch_images = max_batch_images
        self._num_places_taken = 0
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self.started = threading.Event()
        """Set as soon as torch is there, or was found not to load."""
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    async def room(self) -> None:
        """Returns at once where a place is free. Raises `TooBusy` where none is, but only after a
        pause: clients that come back at once would keep the process busy with refusing them."""
        if self._num_places_taken >= self._max_waiting:
            await asyncio.sleep(PAUSE_SECONDS)
            self._require_room()

    def _require_room(self) -> None:
        if self._num_places_taken >= self._max_waiting:
            raise TooBusy(f"{self._max_waiting} predictions wait already; try again in a moment")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue for one prediction, from before its images are decoded until it
        is answered. Used by the event loop's thread alone. Raises `TooBusy`."""
        self._require_room()
        self._num_places_taken += 1
        try:
            yield
        finally:
            self._num_places_taken -= 1

    @property
    def num_places_taken(self) -> int:
        """How many predictions are in work or wait."""
        return self._num_places_taken

    def submit(self, key: ModelKey, images: Square, *, looks: bool = False) -> Future[Answer]:
        """Queues images uint8 [B, S, S, 3]; `looks`: to be looked at more closely, which takes
        twice as long. The future raises what `ModelCache.get` raises."""
        request = _Request(key, images, looks)
        with self._changed:
            if self._stopped:
                request.answer.cancel()
            else:
                self._waiting.append(request)
                self._changed.notify()
        return request.answer

    def loaded(self) -> schemas.LoadedModels:
        """The models in memory; never waits for a prediction."""
        return self._cache.loaded

    def stop(self) -> None:
        """Ends the thread after the batch it works on; what waits is cancelled."""
        with self._changed:
            self._stopped = True
            for request in self._waiting:
                request.answer.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        if sys.platform == "linux":  # where threads have a priority each, and hand it on
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            import shared.vision.predictor  # noqa: F401 - seconds that the first one need not wait
        except Exception as error:
            log.warning("torch cannot be loaded", error=str(error))
        self.started.set()
        while requests := self._take():
            try:
                self._serve(requests)
            except Exception as error:
                for request in requests:
                    if not request.answer.done():
                        request.answer.set_exception(error)

    def _take(self) -> list[_Request]:
        """The next requests for one model, with `max_batch_images` at most unless the
        first alone has more; waits for one. Empty once stopped."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._max_wait_seconds and not self._stopped:
                    waited = time.monotonic() - self._waiting[0].queued_at
                    self._changed.wait_for(self._is_enough, self._max_wait_seconds - waited)
                if self._stopped:
                    return []
                taken = self._next_batch()
            # A request whose client has left was cancelled.
            wanted = [r for r in taken if r.answer.set_running_or_notify_cancel()]
            if wanted:
                return wanted

    def _is_enough(self) -> bool:
        """A full batch waits, or nobody waits for one any more."""
        if self._stopped:
            return True
        key = self._waiting[0].key
        return sum(len(r.images) for r in self._waiting if r.key == key) >= self._max_batch_images

    def _next_batch(self) -> list[_Request]:
        taken = [self._waiting.popleft()]
        num_images = len(taken[0].images)
        for request in list(self._waiting):
            fits = num_images + len(request.images) <= self._max_batch_images
            if fits and request.key == taken[0].key:
                self._waiting.remove(request)
                taken.append(request)
                num_images += len(request.images)
        return taken

    def _serve(self, requests: list[_Request]) -> None:
        taken_at = time.monotonic()
        model = self._cache.get(requests[0].key)
        loaded_at = time.monotonic()
        images = np.concatenate([request.images for request in requests])
        size = self._max_batch_images
        chunks = range(0, len(images), size)
        probabilities = np.concatenate(
            [model.predict(images[first : first + size]) for first in chunks]
        )
        done_at = time.monotonic()
        first = 0
        for request in requests:
            beyond = first + len(request.images)
            request.answer.set_result(
                Answer(
                    probabilities=probabilities[first:beyond],
                    classes=model.bundle.classes,
                    queue_ms=1000 * (taken_at - request.queued_at),
                    load_ms=1000 * (loaded_at - taken_at),
                    forward_ms=1000 * (done_at - loaded_at),
                    look=model.look(request.images) if request.looks else None,
                )
            )
            first = beyond
