"""What jobs tell, live, for any number of listeners, with one thread that reads the database.

Each listener has a cursor (the number of the last row it was given) and one batch at a time. The
poller fills only empty batches, from each listener's own cursor: history and news come the same
way, a slow listener holds no more than its batch and misses nothing, and one that comes back with
`Last-Event-ID` goes on where it stopped. The asynchronous side touches no session. What the rows
are, and how they read, is the feeds' business.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import structlog
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from starlette.types import Receive, Scope, Send

from shared import repository
from shared.database import Database
from shared.errors import TooManyStreams
from shared.repository import Head
from skipline.schemas import EndEvent

log = structlog.get_logger(__name__)

BATCH_ITEMS = 500
"""Rows that a listener is given at once, and that are kept for it at most."""
POLL_SECONDS = 0.25
HINT_SECONDS = 0.02
"""Hints are collected for so long before a look: a busy job, or many, cost no more of them."""
KEEPALIVE_SECONDS = 15.0

Items = list[tuple[int, bytes]]
"""Numbers of rows, with what goes over the wire."""


RowT = TypeVar("RowT")


class Feed(ABC, Generic[RowT]):
    """Something that jobs tell row after row. A row has a `job_id` and a `number`, which counts
    within the job in the order of commits."""

    @abstractmethod
    def last(self, head: Head) -> int:
        """The number of the job's last row; 0 while there is none."""

    @abstractmethod
    def rows_after(
        self, session: Session, cursors: Mapping[str, int], limit: int
    ) -> Sequence[RowT]:
        """The rows that come after each job's cursor, in order within each job, `limit` at most."""

    @abstractmethod
    def render(self, row: RowT) -> bytes:
        """What goes over the wire."""


class Subscription:
    """One listener to what one job tells; `StreamHub.subscribe` makes them.

    The poller and the event loop hand the batch to each other without a lock: the poller writes
    it only while `is_hungry`, the loop takes it only while it is not.
    """

    def __init__(self, hub: StreamHub, feed: Feed[Any], job_id: str, cursor: int) -> None:
        self.feed = feed
        self.job_id = job_id
        self.cursor = cursor
        self.is_hungry = True
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._batch = b""
        self._ended = False
        self._is_behind = True

    def give(self, items: Items, last: int, end: bytes | None) -> None:
        """From the poller: what comes after the cursor. `end` is sent when the job is over and its
        last row, of the number `last`, is among those given."""
        fresh = [(number, data) for number, data in items if number > self.cursor][:BATCH_ITEMS]
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


class Stream(EventSourceResponse):
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
    loop's thread, `hint` to any; the poller runs in its own."""

    def __init__(self, database: Database, max_streams: int) -> None:
        self._database = database
        self._max_streams = max_streams
        self._subscriptions: tuple[Subscription, ...] = ()
        """Replaced, never changed: the poller may be in the middle of it."""
        self._watched: frozenset[str] = frozenset()
        self._wake = threading.Event()
        self._is_urgent = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)
        self._thread.start()

    def subscribe(self, feed: Feed[Any], job_id: str, cursor: int) -> Subscription:
        """A listener to the rows numbered above `cursor`. Raises `TooManyStreams`."""
        if len(self._subscriptions) >= self._max_streams:
            raise TooManyStreams(f"{self._max_streams} streams are open already")
        subscription = Subscription(self, feed, job_id, cursor)
        self._replace((*self._subscriptions, subscription))
        if self._stopped:
            subscription.stop()
        self.wake()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        self._replace(tuple(s for s in self._subscriptions if s is not subscription))

    def _replace(self, subscriptions: tuple[Subscription, ...]) -> None:
        self._subscriptions = subscriptions
        self._watched = frozenset(s.job_id for s in subscriptions)

    def wake(self) -> None:
        """Has the poller look at once."""
        self._is_urgent = True
        self._wake.set()

    def hint(self, job_id: str) -> None:
        """There is news of a job: has the poller look soon, if anybody listens to that job."""
        if job_id in self._watched:
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
            if not self._is_urgent:
                time.sleep(HINT_SECONDS)
            self._is_urgent = False
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
        """One round: what each hungry listener has not seen."""
        hungry: dict[Feed[Any], list[Subscription]] = defaultdict(list)
        for subscription in self._subscriptions:
            if subscription.is_hungry:
                hungry[subscription.feed].append(subscription)
        if not hungry:
            return
        with self._database.read_scope() as session:
            job_ids = {s.job_id for subscriptions in hungry.values() for s in subscriptions}
            heads = repository.heads(session, job_ids)
            for feed, subscriptions in hungry.items():
                _serve(session, feed, subscriptions, heads)


def _serve(
    session: Session,
    feed: Feed[Any],
    subscriptions: Iterable[Subscription],
    heads: Mapping[str, Head],
) -> None:
    """Those near the end of their jobs share one query; one far behind, at the start of a long
    history, has its own."""
    near: dict[str, list[Subscription]] = defaultdict(list)
    far: list[Subscription] = []
    for subscription in subscriptions:
        head = heads.get(subscription.job_id)
        if head is None:
            subscription.stop()  # The job was deleted.
        elif feed.last(head) - subscription.cursor < BATCH_ITEMS:
            near[subscription.job_id].append(subscription)
        else:
            far.append(subscription)
    items = _read(session, feed, _behind(feed, near, heads))
    for job_id, listeners in near.items():
        _give(feed, listeners, items.get(job_id, []), heads[job_id])
    for subscription in far:
        job_id = subscription.job_id
        items = _read(session, feed, {job_id: subscription.cursor})
        _give(feed, [subscription], items.get(job_id, []), heads[job_id])


def _behind(
    feed: Feed[Any], near: Mapping[str, list[Subscription]], heads: Mapping[str, Head]
) -> dict[str, int]:
    """The lowest cursor of each job that has something new for one of its listeners."""
    cursors = {job_id: min(s.cursor for s in listeners) for job_id, listeners in near.items()}
    return {
        job_id: cursor for job_id, cursor in cursors.items() if cursor < feed.last(heads[job_id])
    }


def _read(session: Session, feed: Feed[Any], cursors: Mapping[str, int]) -> dict[str, Items]:
    """The rows after each cursor. The limit may cut some off: a cursor only moves as far as its
    listener was given rows, so the next round finds them."""
    items: dict[str, Items] = defaultdict(list)
    for row in feed.rows_after(session, cursors, BATCH_ITEMS * len(cursors)):
        items[row.job_id].append((row.number, feed.render(row)))
    return items


def _give(feed: Feed[Any], subscriptions: Iterable[Subscription], items: Items, head: Head) -> None:
    """`head` was read before the rows: a job that was over had all of them by then."""
    end = None
    if head.status.is_terminal:
        document = EndEvent(status=head.status)
        end = format_sse_event(event="end", data_str=document.model_dump_json())
    for subscription in subscriptions:
        subscription.give(items, feed.last(head), end)
