"""Hints to look sooner, over Redis where the broker is one: "there is news of this job".

A hint says nothing that is not in the database, where whoever hears it reads. One that is lost,
late or doubled changes nothing, and nothing waits for one.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import make_url

from shared.settings import Settings

log = structlog.get_logger(__name__)

PATIENCE_SECONDS = 0.2
"""How long a hint may hold its publisher up."""
PAUSE_SECONDS = 5.0
"""After a failure nothing is published for so long."""
RECONNECT_SECONDS = 1.0
PING_SECONDS = 10.0
"""How often a listener makes sure that the other end is there; it gives up after three times as
long without a word."""
WAKE_SECONDS = 0.25
"""How long `close` may have to wait for the listener."""


class Hints:
    """Publishes and hears hints. With another broker than Redis it does neither."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.broker
        self._is_used = self._url.startswith(("redis://", "rediss://"))
        self._closing = threading.Event()
        self._listener: threading.Thread | None = None
        self._silent_until = 0.0
        if self._is_used:
            # A connection that has died since the last hint is made anew, once and at once.
            self._publisher = redis.Redis.from_url(
                self._url,
                socket_timeout=PATIENCE_SECONDS,
                socket_connect_timeout=PATIENCE_SECONDS,
                retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
            )
            self._channel = channel_name(settings, self._publisher)

    def publish(self, job_id: str) -> None:
        """Tells that there is news of a job. Never raises."""
        if not self._is_used or time.monotonic() < self._silent_until:
            return
        try:
            self._publisher.publish(self._channel, job_id)
        except Exception as error:  # Whatever it is, readers look by themselves.
            self._silent_until = time.monotonic() + PAUSE_SECONDS
            log.warning("no hint could be given", error=type(error).__name__)

    def listen(self, on_job: Callable[[str], None]) -> None:
        """Calls `on_job` with the id of each job that there is news of, from a thread of its own,
        until `close`."""
        if not self._is_used:
            return
        self._listener = threading.Thread(
            target=self._listen_loop, args=(on_job,), name="hints", daemon=True
        )
        self._listener.start()

    def close(self) -> None:
        """Ends the listener and lets the connections go."""
        self._closing.set()
        if self._listener is not None:
            self._listener.join(timeout=4 * WAKE_SECONDS)
        if self._is_used:
            self._publisher.close()

    def _listen_loop(self, on_job: Callable[[str], None]) -> None:
        is_away = False
        while not self._closing.is_set():
            try:
                self._listen_while_connected(on_job)
            except Exception as error:
                if not is_away:
                    log.warning("no hints are heard", error=type(error).__name__)
                is_away = True
            self._closing.wait(RECONNECT_SECONDS)

    def _listen_while_connected(self, on_job: Callable[[str], None]) -> None:
        client = redis.Redis.from_url(
            self._url,
            socket_timeout=PING_SECONDS,
            socket_connect_timeout=PING_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        with client, client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(self._channel)
            heard_at = pinged_at = time.monotonic()
            while not self._closing.is_set():
                message = pubsub.get_message(timeout=WAKE_SECONDS)
                now = time.monotonic()
                if message is not None:
                    heard_at = now
                    if message["type"] == "message":
                        on_job(message["data"].decode())
                elif now - heard_at > 3 * PING_SECONDS:
                    raise redis.ConnectionError("no answer")
                elif now - max(heard_at, pinged_at) > PING_SECONDS:
                    pubsub.ping()
                    pinged_at = now


def channel_name(settings: Settings, client: redis.Redis) -> str:
    """One for each installation, also where several share a Redis, whose channels know no database
    numbers. Names and passwords of users do not matter: processes may have one each."""
    number = client.connection_pool.connection_kwargs.get("db", 0)
    url = make_url(settings.database)
    place = f"{url.host}:{url.port}/{url.database}?{sorted(url.query.items())}"
    return f"skipline.{number}.{hashlib.sha256(place.encode()).hexdigest()[:16]}"
