"""What was accepted runs, and runs once, whatever the clients and the broker do; on both stacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr

from shared.dispatch import MAX_WAITING_MESSAGES, QUEUE, WORK, make_celery
from shared.settings import Settings
from skipline import Skipline
from skipline.client import SkiplineError
from skipline.schemas import Job, JobStatus
from tests.conftest import CLAIM_SECONDS, make_settings
from tests.e2e.conftest import Service, bring_in, running_service, tiny_spec, wait_for

NUM_AT_ONCE = 50
CLAIM = "skipline-tests"
"""With which the tests keep the Redis database to themselves."""


@pytest.fixture
def client(shared_service: Service) -> Iterator[Skipline]:
    with shared_service.client() as client:
        yield client


def settings_of(service: Service) -> Settings:
    """Those of the service's processes, as far as the broker is concerned."""
    url = service.environment.get("SKIPLINE_BROKER_URL")
    return make_settings(home=service.home, broker_url=url and SecretStr(url))


def num_messages(settings: Settings) -> int:
    if settings.broker_url is None:
        return len(list((settings.home_path / "broker" / "messages").glob("*.msg")))
    with redis.Redis.from_url(settings.broker) as server:
        return int(server.llen(QUEUE))


def wipe(settings: Settings) -> None:
    if settings.broker_url is None:
        for message in (settings.home_path / "broker" / "messages").glob("*.msg"):
            message.unlink(missing_ok=True)
    else:
        with redis.Redis.from_url(settings.broker) as server:
            claim = server.get(CLAIM)
            server.flushdb()
            server.set(CLAIM, claim, ex=CLAIM_SECONDS)


def ring_often(settings: Settings, number: int) -> None:
    """Puts so many of the bell's messages into the broker."""
    with make_celery(settings) as app, app.connection_for_write() as connection:
        if settings.broker_url is None:
            for _ in range(number):
                app.send_task(WORK, connection=connection)
            return
        app.send_task(WORK, queue="aside", connection=connection)
    with redis.Redis.from_url(settings.broker) as server:
        server.lpush(QUEUE, *[server.lpop("aside")] * number)


def busy(client: Skipline) -> Job:
    """A job that has the only slot until it is cancelled."""
    job = client.submit(tiny_spec(epochs=10_000, priority=10))
    wait_for(lambda: client.job(job.id).status is JobStatus.running, "running job")
    return job


def assert_each_once(client: Skipline, jobs: list[Job]) -> None:
    for job in jobs:
        ended = client.wait(job.id)
        assert (ended.status, ended.attempt) == (JobStatus.succeeded, 1), ended.error
        assert [attempt.outcome for attempt in client.attempts(job.id)] == ["succeeded"]
        types = Counter(event.type for event in client.events(job.id))
        assert (types["created"], types["started"], types["succeeded"]) == (1, 1, 1)


def test_one_key_is_one_job_however_many_requests_come_at_once(
    shared_service: Service, client: Skipline
) -> None:
    blocker = busy(client)
    num_before = len(list(client.jobs()))

    def post(_: int) -> str:
        with shared_service.client() as own:
            return own.submit(tiny_spec(epochs=1), idempotency_key="fifty at once").id

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        ids = set(pool.map(post, range(NUM_AT_ONCE)))
    assert len(ids) == 1
    assert len(list(client.jobs())) == num_before + 1
    with pytest.raises(SkiplineError) as refused:
        client.submit(tiny_spec(epochs=2), idempotency_key="fifty at once")
    assert (refused.value.status, refused.value.code) == (409, "idempotency_mismatch")
    assert client.submit(tiny_spec(epochs=1), idempotency_key="fifty at once").id in ids
    [job_id] = ids
    client.cancel(job_id)
    client.cancel(blocker.id)
    client.wait(blocker.id)


def test_what_the_broker_forgets_or_repeats_changes_nothing(
    shared_service: Service, client: Skipline
) -> None:
    settings = settings_of(shared_service)
    blocker = busy(client)
    low, high = (client.submit(tiny_spec(epochs=1, priority=priority)) for priority in (-1, 1))
    assert [client.job(job.id).queue_position for job in (low, high)] == [2, 1]
    wipe(settings)
    client.cancel(blocker.id)
    assert client.wait(high.id).status is JobStatus.succeeded
    ring_often(settings, 5)  # While the other one runs, or is about to.
    assert_each_once(client, [high, low])
    first, second = (client.job(job.id).started_at for job in (high, low))
    assert first is not None
    assert second is not None
    assert first < second


def test_messages_for_no_job_are_swept_away_and_hold_up_none(
    shared_service: Service, client: Skipline
) -> None:
    settings = settings_of(shared_service)
    # A folder is read ten times a second: ten thousand files would only try one's patience.
    ring_often(settings, 10_000 if settings.broker_url else 2 * MAX_WAITING_MESSAGES)
    job = client.submit(tiny_spec(epochs=1))
    assert_each_once(client, [job])
    wait_for(lambda: num_messages(settings) <= MAX_WAITING_MESSAGES, "empty broker")


def test_two_slots_run_two_jobs_at_once_the_most_urgent_first(
    tmp_path: Path, stripes: Path
) -> None:
    with running_service(tmp_path, {}, num_slots=2) as service, service.client() as client:
        bring_in(client, stripes)
        blockers = [busy(client) for _ in range(2)]
        assert client.workers()[0].num_slots == 2
        assert sorted(client.workers()[0].job_ids) == sorted(job.id for job in blockers)
        low, normal, high = (
            client.submit(tiny_spec(epochs=2, priority=priority)) for priority in (-5, 0, 5)
        )
        assert [client.job(job.id).queue_position for job in (low, normal, high)] == [3, 2, 1]
        client.cancel(blockers[0].id)  # One slot for three jobs.
        assert_each_once(client, [high, normal, low])
        client.cancel(blockers[1].id)
        began = [client.job(job.id).started_at for job in (high, normal, low)]
        assert began == sorted(began, key=str)
        assert client.wait(blockers[1].id).attempt == 1
