"""Live metrics over real connections. A stream is read to its end, or closed in the middle."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from api import streams
from shared import repository
from shared.repository import NewPoint
from skipline.schemas import JobStatus

pytestmark = pytest.mark.timeout(60)  # a stream that says nothing is kept alive for ever

Event = tuple[str, int | None, dict[str, Any]]
"""Kind, number, data."""


def events_of(lines: Iterator[str]) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "event" in fields:
            number = int(fields["id"]) if "id" in fields else None
            yield fields["event"], number, json.loads(fields["data"])
            fields = {}


@contextmanager
def stream(api: Any, job_id: str, last: int | None = None) -> Iterator[Iterator[Event]]:
    headers = {"Accept": "text/event-stream"}
    if last is not None:
        headers["Last-Event-ID"] = str(last)
    with api.stream("GET", f"/jobs/{job_id}/metrics", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield events_of(response.iter_lines())


def read_all(api: Any, job_id: str, last: int | None = None) -> list[Event]:
    with stream(api, job_id, last) as events:
        return list(events)


def numbers(events: list[Event]) -> list[int | None]:
    return [number for kind, number, _ in events if kind != "end"]


def points(first: int, beyond: int) -> list[NewPoint]:
    return [NewPoint("train_loss", step, 1, float(step)) for step in range(first, beyond)]


def test_a_stream_begins_with_the_history_and_ends_with_the_status(api: Any, worker: Any) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    attempt.write(*points(1, 4))
    attempt.finish()
    *seen, end = read_all(api, job_id)
    assert numbers(seen) == [1, 2, 3]
    kind, _, data = seen[0]
    assert (kind, data.pop("time")[-1]) == ("metric", "Z")
    assert data == {"name": "train_loss", "step": 1, "epoch": 1, "value": 1.0, "attempt": 1}
    assert end == ("end", None, {"status": "succeeded"})


def test_points_arrive_while_they_are_written(api: Any, worker: Any) -> None:
    job_id = api.submit()["id"]
    with stream(api, job_id) as events:
        attempt = worker.claim()
        for step in range(1, 4):
            attempt.write(*points(step, step + 1))
            kind, number, data = next(events)
            assert (kind, number, data["step"]) == ("metric", step, step)
        attempt.finish(JobStatus.failed)
        assert next(events) == ("end", None, {"status": "failed"})
        assert list(events) == []


def test_a_stream_taken_up_again_and_again_loses_and_doubles_nothing(api: Any, worker: Any) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()

    def write() -> None:
        for first in range(1, 601, 3):
            attempt.write(*points(first, first + 3))
        attempt.finish()

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[int | None] = []
    cuts = 0
    while True:
        with stream(api, job_id, seen[-1] if seen else None) as events:
            for kind, number, _ in events:
                if kind == "end":
                    break
                seen.append(number)
                if len(seen) % 50 == 0:
                    cuts += 1
                    break
        if kind == "end":
            break
    writer.join()
    assert seen == list(range(1, 601))
    assert cuts >= 12


def test_a_long_history_comes_in_many_batches(
    api: Any, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BATCH_POINTS", 7)
    job_id = api.submit()["id"]
    attempt = worker.claim()
    attempt.write(*points(1, 201))
    attempt.finish()
    started = time.monotonic()
    assert numbers(read_all(api, job_id)) == list(range(1, 201))
    assert time.monotonic() - started < 5, "29 batches are not paced by the poll interval"


def test_many_listeners_each_have_their_own_place(api: Any, worker: Any) -> None:
    jobs = [api.submit()["id"] for _ in range(3)]
    attempts = [worker.claim() for _ in jobs]
    for attempt in attempts:
        attempt.write(*points(1, 11))
    found: dict[tuple[str, int], list[int | None]] = {}

    def listen(job_id: str, last: int) -> None:
        found[job_id, last] = numbers(read_all(api, job_id, last))

    threads = [
        threading.Thread(target=listen, args=(job_id, last))
        for job_id in jobs
        for last in (0, 4, 10)
    ]
    for thread in threads:
        thread.start()
    for attempt in attempts:
        attempt.write(*points(11, 16))
        attempt.finish()
    for thread in threads:
        thread.join()
    assert found == {
        (job_id, last): list(range(last + 1, 16)) for job_id in jobs for last in (0, 4, 10)
    }


def test_a_rewind_tells_readers_to_go_back(api: Any, worker: Any) -> None:
    job_id = api.submit()["id"]
    first = worker.claim()
    first.write(*points(1, 6))
    with stream(api, job_id) as events:
        assert [next(events)[1] for _ in range(5)] == [1, 2, 3, 4, 5]
        first.release()
        second = worker.claim()
        second.rewind(last_point=3, step=3)
        assert next(events) == ("rewind", 6, {"step": 3, "attempt": 2})
        second.write(*points(4, 5))
        kind, number, data = next(events)
        assert (kind, number, data["step"], data["attempt"]) == ("metric", 7, 4, 2)
        second.finish()
        assert next(events)[0] == "end"
    # Who comes late sees what is left; who was cut off before the rewind learns of it.
    assert numbers(read_all(api, job_id)) == [1, 2, 3, 6, 7]
    assert numbers(read_all(api, job_id, 5)) == [6, 7]


def test_a_reader_ahead_of_the_last_point_is_only_told_the_end(api: Any, worker: Any) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    attempt.write(*points(1, 3))
    with stream(api, job_id, 1000) as events:
        attempt.finish(JobStatus.failed)
        assert list(events) == [("end", None, {"status": "failed"})]


@pytest.mark.parametrize("last", ["x", "-1", "1.5", str(2**64)])
def test_a_last_event_id_that_is_no_number_is_refused(
    sqlite_api: Any, last: str, assert_problem: Callable[..., Any]
) -> None:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
    response = sqlite_api.get(f"/jobs/{sqlite_api.submit()['id']}/metrics", headers=headers)
    document = assert_problem(response, 422, "invalid_input")
    assert document["errors"][0]["loc"].lower() == "last-event-id"


def test_only_so_many_streams_are_open_at_once(
    settings: Any,
    database: Any,
    start_server: Any,
    wait_for: Callable[..., Any],
    assert_problem: Callable[..., Any],
) -> None:
    api = start_server(settings.model_copy(update={"max_streams": 2}))
    url = f"/jobs/{api.submit()['id']}/metrics"
    headers = {"Accept": "text/event-stream"}
    hub = api.server._app.state.services.streams
    with api.stream("GET", url, headers=headers), api.stream("GET", url, headers=headers):
        response = api.get(url, headers=headers)
        assert_problem(response, 429, "too_many_streams")
        assert response.headers["retry-after"] == "2"
    wait_for(lambda: not hub._subscriptions, "end of the streams")
    with api.stream("GET", url, headers=headers) as opened:
        assert opened.status_code == 200


def test_a_silent_stream_is_kept_alive(sqlite_api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEPALIVE_SECONDS", 0.02)
    headers = {"Accept": "text/event-stream"}
    url = f"/jobs/{sqlite_api.submit()['id']}/metrics"
    with sqlite_api.stream("GET", url, headers=headers) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]


def test_streams_end_at_once_when_the_server_stops(
    settings: Any, database: Any, start_server: Any
) -> None:
    api = start_server(settings)
    with stream(api, api.submit()["id"]) as events:
        started = time.monotonic()
        api.server.should_exit = True
        assert list(events) == []
        assert time.monotonic() - started < 3


def test_a_database_that_is_away_for_a_while_loses_no_point(
    api: Any, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    read = repository.points_after
    failures = iter(range(3))

    def fail_three_times(*args: Any) -> Any:
        if next(failures, None) is not None:
            raise OperationalError("", {}, Exception("away"))
        return read(*args)

    monkeypatch.setattr(repository, "points_after", fail_three_times)
    attempt.write(*points(1, 4))
    attempt.finish()
    assert numbers(read_all(api, job_id)) == [1, 2, 3]


def test_a_listener_that_does_not_read_costs_no_more_than_its_batch(
    api: Any, worker: Any, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fed no more, others go on, and it finds everything once it reads again."""
    monkeypatch.setattr(streams, "BATCH_POINTS", 10)
    job_id = api.submit()["id"]
    attempt = worker.claim()
    attempt.write(*points(1, 96))
    attempt.finish()

    async def listen() -> tuple[int, list[int], list[int]]:
        hub = streams.StreamHub(database, max_streams=2)
        slow, quick = hub.subscribe(job_id, 0), hub.subscribe(job_id, 0)
        seen_by_quick = [n async for chunk in quick.chunks() for n in numbers_in(chunk)]
        num_held = len(numbers_in(slow._batch))
        seen_by_slow = [n async for chunk in slow.chunks() for n in numbers_in(chunk)]
        hub.stop()
        hub.join()
        return num_held, seen_by_quick, seen_by_slow

    def numbers_in(chunk: bytes) -> list[int]:
        return [number for _, number, _ in events_of(iter(chunk.decode().split("\n"))) if number]

    everything = list(range(1, 96))
    assert asyncio.run(listen()) == (10, everything, everything)


def test_more_jobs_are_watched_than_one_condition_takes(database: Any) -> None:
    cursors = {str(number): 0 for number in range(1200)}
    with database.read_scope() as session:
        assert repository.points_after(session, cursors, 10_000) == []
