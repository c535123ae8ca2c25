"""Live points for any number of listeners, with one thread that reads the database.

Each listener has a cursor (the number of the last point it was given) and one batch at a time. The
poller fills only empty batches, from each listener's own cursor: history and live points come the
same way, a slow listener holds no more than its batch and misses nothing, and one that comes back
with `Last-Event-ID` goes on where it stopped. The asynchronous side touches no session.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping

import structlog
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from starlette.types import Receive, Scope, Send

from shared import repository
from shared.database import Database
from shared.errors import TooManyStreams
from shared.tables import MetricPoint
from skipline.schemas import EndEvent, JobStatus, MetricEvent, RewindEvent

log = structlog.get_logger(__name__)

BATCH_POINTS = 500
"""Points that a listener is given at once, and that are kept for it at most."""
POLL_SECONDS = 0.25
KEEPALIVE_SECONDS = 15.0

Events = list[tuple[int, bytes]]
"""Numbers of points, with what goes over the wire."""


class Subscription:
    """One listener to one job's points; `StreamHub.subscribe` makes them.

    The poller and the event loop hand the batch to each other without a lock: the poller writes
    it only while `is_hungry`, the loop takes it only while it is not.
    """

    def __init__(self, hub: StreamHub, job_id: str, cursor: int) -> None:
        self.job_id = job_id
        self.cursor = cursor
        self.is_hungry = True
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._batch = b""
        self._ended = False
        self._is_behind = True

    def feed(self, events: Events, last: int, end: bytes | None) -> None:
        """From the poller: points that come after the cursor. `end` is sent when the job is over
        and its last point, of the number `last`, is among those given."""
        fresh = [(number, data) for number, data in events if number > self.cursor][:BATCH_POINTS]
        if fresh:
            self.cursor = fresh[-1][0]
        self._is_behind = self.cursor < last
        if self._is_behind:
            end = None
        if fresh or end is not None:
            self._hand_over(b"".join(data for _, data in fresh) + (end or b""), end is not None)

    def stop(self) -> None:
        """From the poller, or at shutdown: the stream ends here, without a word."""
        self._hand_over(b"", True)

    def _hand_over(self, batch: bytes, ended: bool) -> None:
        self._batch, self._ended, self.is_hungry = batch, ended, False
        self._loop.call_soon_threadsafe(self._ready.set)

    async def chunks(self) -> AsyncIterator[bytes]:
        """What goes over the wire, from the cursor on, until the job or the service ends."""
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_SECONDS):
                    await self._ready.wait()
            except TimeoutError:
                yield KEEPALIVE_COMMENT
                continue
            self._ready.clear()
            batch, ended = self._batch, self._ended
            if batch:
                yield batch
            if ended:
                return
            self.is_hungry = True
            if self._is_behind:
                self._hub.wake()

    def close(self) -> None:
        self._hub.unsubscribe(self)


class MetricStream(EventSourceResponse):
    """The response that a subscription is; it ends with it, however the client went away."""

    def __init__(self, subscription: Subscription) -> None:
        super().__init__(
            subscription.chunks(),
            # No cache may keep it, and no proxy in front may collect it.
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"},
        )
        self._subscription = subscription

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._subscription.close()


class StreamHub:
    """All listeners of this process. `subscribe`, `unsubscribe` and `stop` belong to the event
    loop's thread; the poller runs in its own."""

    def __init__(self, database: Database, max_streams: int) -> None:
        self._database = database
        self._max_streams = max_streams
        self._subscriptions: tuple[Subscription, ...] = ()
        """Replaced, never changed: the poller may be in the middle of it."""
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)
        self._thread.start()

    def subscribe(self, job_id: str, cursor: int) -> Subscription:
        """A listener to the points numbered above `cursor`. Raises `TooManyStreams`."""
        if len(self._subscriptions) >= self._max_streams:
            raise TooManyStreams(f"{self._max_streams} streams are open already")
        subscription = Subscription(self, job_id, cursor)
        self._subscriptions = (*self._subscriptions, subscription)
        if self._stopped:
            subscription.stop()
        self.wake()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)

    def wake(self) -> None:
        """Has the poller look at once."""
        self._wake.set()

    def stop(self) -> None:
        """Ends every stream at once: the server waits for open connections before it leaves."""
        self._stopped = True
        self.wake()

    def join(self) -> None:
        """Waits for the poller, once stopped."""
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stopped:
            self._wake.wait(POLL_SECONDS if self._subscriptions else None)
            self._wake.clear()
            try:
                self._look()
            except DBAPIError as error:
                log.warning("streams wait for the database", error=type(error).__name__)
                self._wake.wait(POLL_SECONDS)
            except Exception:  # A bug: clients had better come again than wait for ever.
                log.exception("the streams failed")
                for subscription in self._subscriptions:
                    subscription.stop()
        for subscription in self._subscriptions:
            subscription.stop()

    def _look(self) -> None:
        """One round: what each hungry listener has not seen. Those near the end of their jobs
        share one query; one far behind, at the start of a long history, has its own."""
        hungry = [s for s in self._subscriptions if s.is_hungry]
        if not hungry:
            return
        with self._database.read_scope() as session:
            heads = repository.last_points(session, {s.job_id for s in hungry})
        near: dict[str, list[Subscription]] = defaultdict(list)
        far: list[Subscription] = []
        for subscription in hungry:
            if subscription.job_id not in heads:
                subscription.stop()  # The job was deleted.
            elif heads[subscription.job_id][1] - subscription.cursor < BATCH_POINTS:
                near[subscription.job_id].append(subscription)
            else:
                far.append(subscription)
        with self._database.read_scope() as session:
            events = _read(session, _behind(near, heads))
            for job_id, subscriptions in near.items():
                _feed(subscriptions, events.get(job_id, []), heads[job_id])
            for subscription in far:
                job_id = subscription.job_id
                events = _read(session, {job_id: subscription.cursor})
                _feed([subscription], events.get(job_id, []), heads[job_id])


def _behind(
    near: Mapping[str, list[Subscription]], heads: Mapping[str, tuple[JobStatus, int]]
) -> dict[str, int]:
    """The lowest cursor of each job that has something new for one of its listeners."""
    cursors = {job_id: min(s.cursor for s in listeners) for job_id, listeners in near.items()}
    return {job_id: cursor for job_id, cursor in cursors.items() if cursor < heads[job_id][1]}


def _read(session: Session, cursors: Mapping[str, int]) -> dict[str, Events]:
    """The points after each cursor. The limit may cut some off: a cursor only moves as far as
    its listener was given points, so the next round finds them."""
    limit = BATCH_POINTS * len(cursors)
    events: dict[str, Events] = defaultdict(list)
    for row in repository.points_after(session, cursors, limit):
        events[row.job_id].append((row.number, _render(row)))
    return events


def _feed(
    subscriptions: Iterable[Subscription], events: Events, head: tuple[JobStatus, int]
) -> None:
    """`head` was read before the points: a job that was over had all its points by then."""
    status, last = head
    end = None
    if status.is_terminal:
        end = format_sse_event(event="end", data_str=EndEvent(status=status).model_dump_json())
    for subscription in subscriptions:
        subscription.feed(events, last, end)


def _render(row: MetricPoint) -> bytes:
    event: MetricEvent | RewindEvent
    if row.name == repository.REWIND:
        event, kind = RewindEvent(step=row.step, attempt=row.attempt), "rewind"
    else:
        assert row.value is not None
        event, kind = (
            MetricEvent(
                name=row.name,
                step=row.step,
                epoch=row.epoch,
                value=row.value,
                time=row.time,
                attempt=row.attempt,
            ),
            "metric",
        )
    return format_sse_event(event=kind, data_str=event.model_dump_json(), id=str(row.number))
