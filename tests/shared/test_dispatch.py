"""The bell: heard by a worker on each broker, and never missed when it is silent."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import SecretStr

from shared.dispatch import MAX_WAITING_MESSAGES, QUEUE, WORK, Bell, make_celery
from shared.settings import Settings
from tests.soak.servers import Redis


def settings_for(home: Path, broker_url: str | None) -> Settings:
    secret = SecretStr(broker_url) if broker_url else None
    return Settings(_env_file=None, home=home, broker_url=secret)  # type: ignore[call-arg]


def waiting_messages(settings: Settings) -> list[str]:
    """Takes every waiting message; returns the tasks that they call."""
    names = []
    with make_celery(settings).connection_for_read() as connection:
        queue = connection.SimpleQueue(QUEUE)
        while True:
            try:
                message = queue.get(block=False)
            except queue.Empty:
                break
            message.ack()
            names.append(message.headers["task"])
        queue.close()
    return names


def test_a_ring_is_one_message_that_names_no_job(tmp_path: Path, broker_url: str | None) -> None:
    settings = settings_for(tmp_path, broker_url)
    Bell(settings).ring()
    assert waiting_messages(settings) == [WORK]


def test_messages_for_nobody_do_not_pile_up(tmp_path: Path, broker_url: str | None) -> None:
    settings = settings_for(tmp_path, broker_url)
    bell = Bell(settings)
    for _ in range(MAX_WAITING_MESSAGES + 10):
        bell.ring()
    assert len(waiting_messages(settings)) == MAX_WAITING_MESSAGES
    bell.ring()
    assert waiting_messages(settings) == [WORK]


def test_a_bell_rings_again_once_its_broker_is_back(own_redis: Redis, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, own_redis.url)
    bell = Bell(settings)
    bell.ring()
    own_redis.kill()  # With it goes the message, and the connection that the bell kept.
    bell.ring()
    own_redis.start()
    bell.ring()
    assert waiting_messages(settings) == [WORK]
    bell.close()


def test_a_bell_finds_out_that_its_connection_has_died(own_redis: Redis, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, own_redis.url)
    bell = Bell(settings)
    bell.ring()
    own_redis.kill()
    own_redis.start()
    bell.ring()
    assert waiting_messages(settings) == [WORK]
    bell.close()


def test_a_broker_that_is_down_stops_nobody(tmp_path: Path) -> None:
    bell = Bell(settings_for(tmp_path, "redis://127.0.0.1:1/0"))
    began = time.monotonic()
    bell.ring()
    assert time.monotonic() - began < 10
