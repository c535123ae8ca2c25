"""Hints over a real Redis, which may be killed at any time."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from shared import hints
from shared.hints import Hints
from shared.settings import Settings
from tests.conftest import make_settings
from tests.e2e.conftest import free_port, wait_for
from tests.soak.servers import Redis


def settings_for(home: Path, url: str | None, **values: Any) -> Settings:
    return make_settings(home=home, broker_url=SecretStr(url) if url else None, **values)


class Heard:
    """What a listener has heard."""

    def __init__(self) -> None:
        self._ids: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, job_id: str) -> None:
        self._ids.put(job_id)

    def next(self, seconds: float = 10) -> str | None:
        try:
            return self._ids.get(timeout=seconds)
        except queue.Empty:
            return None


def hear_first(publisher: Hints, heard: Heard) -> None:
    """Returns once what is published is heard: a listener needs a moment to connect."""

    def is_heard() -> bool:
        publisher.publish("probe")
        return heard.next(0.05) is not None

    wait_for(is_heard, "listener that hears", 20)
    while heard.next(0.3) is not None:  # Probes that were under way.
        pass


def test_a_hint_is_heard_by_every_listener(redis_url: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, redis_url)
    with closing(Hints(settings)) as one, closing(Hints(settings)) as other:
        ears = Heard(), Heard()
        one.listen(ears[0])
        other.listen(ears[1])
        for heard in ears:
            hear_first(one, heard)
        while ears[0].next(0.3) is not None:  # Probes meant for the other one.
            pass
        other.publish("job-1")
        one.publish("job-2")
        for heard in ears:
            assert {heard.next(), heard.next()} == {"job-1", "job-2"}


def test_installations_on_one_redis_do_not_hear_each_other(redis_url: str, tmp_path: Path) -> None:
    postgres = "postgresql://db/skipline"
    ours = settings_for(tmp_path, redis_url, database_url=SecretStr(postgres))
    theirs = [
        settings_for(tmp_path, redis_url, database_url=SecretStr("postgresql://db/other")),
        settings_for(
            tmp_path, redis_url.rpartition("/")[0] + "/0", database_url=SecretStr(postgres)
        ),
    ]
    own_worker = settings_for(
        tmp_path, redis_url, database_url=SecretStr("postgresql://worker:secret@db/skipline")
    )
    with closing(Hints(ours)) as listener, closing(Hints(own_worker)) as own:
        heard = Heard()
        listener.listen(heard)
        hear_first(own, heard)
        for settings in theirs:
            with closing(Hints(settings)) as other:
                other.publish("theirs")
        own.publish("ours")
        assert heard.next() == "ours"


def test_a_redis_that_comes_back_is_heard_again(own_redis: Redis, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, own_redis.url)
    with closing(Hints(settings)) as listener:
        heard = Heard()
        listener.listen(heard)
        with closing(Hints(settings)) as publisher:
            hear_first(publisher, heard)
        own_redis.kill()
        own_redis.start()
        with closing(Hints(settings)) as publisher:
            hear_first(publisher, heard)


def test_a_publisher_goes_on_at_once_after_a_restart_that_it_did_not_notice(
    own_redis: Redis, tmp_path: Path
) -> None:
    settings = settings_for(tmp_path, own_redis.url)
    with closing(Hints(settings)) as publisher:
        publisher.publish("before")
        own_redis.kill()
        own_redis.start()
        with redis.Redis.from_url(own_redis.url) as client, client.pubsub() as pubsub:
            pubsub.psubscribe("skipline.*")
            assert pubsub.get_message(timeout=5)["type"] == "psubscribe"  # type: ignore[index]
            publisher.publish("after")
            message = pubsub.get_message(timeout=5)
            assert message is not None
            assert message["data"] == b"after"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The URL of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@pytest.mark.parametrize("how", ["refuses", "is silent"])
def test_a_dead_redis_costs_a_publisher_next_to_nothing(
    how: str, silent_server: str, tmp_path: Path
) -> None:
    url = silent_server if how == "is silent" else f"redis://127.0.0.1:{free_port()}/0"
    with closing(Hints(settings_for(tmp_path, url))) as publisher:
        began = time.monotonic()
        for _ in range(1000):
            publisher.publish("job")
        assert time.monotonic() - began < 1


def test_after_a_pause_a_publisher_tries_again(
    own_redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "PAUSE_SECONDS", 0.5)
    own_redis.kill()
    settings = settings_for(tmp_path, own_redis.url)
    with closing(Hints(settings)) as publisher, closing(Hints(settings)) as listener:
        publisher.publish("lost")
        own_redis.start()
        heard = Heard()
        listener.listen(heard)
        hear_first(publisher, heard)


def test_a_silent_redis_is_left_for_a_new_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "PING_SECONDS", 0.1)
    monkeypatch.setattr(hints, "WAKE_SECONDS", 0.05)
    monkeypatch.setattr(hints, "RECONNECT_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        url = f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        with closing(Hints(settings_for(tmp_path, url))) as listener:
            listener.listen(lambda job_id: None)
            first, _ = server.accept()
            second, _ = server.accept()
            first.close()
            second.close()


def test_what_a_listener_stumbles_over_does_not_end_it(redis_url: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, redis_url)
    heard = Heard()

    def on_job(job_id: str) -> None:
        if job_id == "bad":
            raise ValueError
        heard(job_id)

    with closing(Hints(settings)) as own:
        own.listen(on_job)
        hear_first(own, heard)
        own.publish("bad")
        hear_first(own, heard)


def test_without_redis_nothing_happens(tmp_path: Path) -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    before = names()
    with closing(Hints(settings_for(tmp_path, None))) as own:
        own.listen(_never)
        own.publish("job")
        assert names() == before


def _never(job_id: str) -> None:
    pytest.fail(f"heard {job_id}")


def test_closing_ends_the_listener_soon(redis_url: str, tmp_path: Path) -> None:
    own = Hints(settings_for(tmp_path, redis_url))
    heard: Callable[[str], None] = Heard()
    own.listen(heard)
    began = time.monotonic()
    own.close()
    assert time.monotonic() - began < 2
    assert not any(thread.name == "hints" for thread in threading.enumerate())
