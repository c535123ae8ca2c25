"""Live metrics and events over real connections, the same tests over both. A stream is read to its
end, or closed in the middle."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy.exc import OperationalError

from api import feeds, streams
from shared import repository
from shared.hints import Hints
from shared.repository import NewPoint
from skipline.schemas import JobStatus

pytestmark = pytest.mark.timeout(60)  # a stream that says nothing is kept alive for ever

Event = tuple[str, int | None, dict[str, Any]]
"""Kind, number, data."""


@dataclass(frozen=True)
class Followed:
    """One of the two things that can be followed. `tell` has an attempt write the values from
    `first` up to `beyond`, and `value` finds them in what came over the wire; the lifecycle's own
    events have none. A running job has told `num_before` rows of its own, and one that ends tells
    `num_at_end` more."""

    feed: streams.Feed[Any]
    path: str
    reader: str
    tell: Callable[[Any, int, int], None]
    value: Callable[[Event], int | None]
    num_before: int
    num_at_end: int


def tell_points(attempt: Any, first: int, beyond: int) -> None:
    attempt.write(*(NewPoint("train_loss", step, 1, float(step)) for step in range(first, beyond)))


def tell_events(attempt: Any, first: int, beyond: int) -> None:
    with attempt.worker.database.session_scope() as session:
        for value in range(first, beyond):
            data = {"value": value}
            repository.add_event(session, attempt.fence, "info", "told", "For a test", data)


FOLLOWED = {
    "metrics": Followed(
        feeds.METRICS,
        "metrics",
        "points_after",
        tell_points,
        lambda event: event[2]["step"] if event[0] == "metric" else None,
        num_before=0,
        num_at_end=0,
    ),
    "events": Followed(
        feeds.EVENTS,
        "events",
        "events_after",
        tell_events,
        lambda event: event[2]["data"].get("value") if event[0] == "event" else None,
        num_before=2,
        num_at_end=1,
    ),
}


@pytest.fixture(params=FOLLOWED)
def followed(request: pytest.FixtureRequest) -> Followed:
    return FOLLOWED[request.param]


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
def stream(
    api: Any, job_id: str, last: int | None = None, path: str = "metrics"
) -> Iterator[Iterator[Event]]:
    headers = {"Accept": "text/event-stream"}
    if last is not None:
        headers["Last-Event-ID"] = str(last)
    with api.stream("GET", f"/jobs/{job_id}/{path}", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield events_of(response.iter_lines())


def read_all(api: Any, job_id: str, last: int | None = None, path: str = "metrics") -> list[Event]:
    with stream(api, job_id, last, path) as events:
        return list(events)


def numbers(events: list[Event]) -> list[int | None]:
    return [number for kind, number, _ in events if kind != "end"]


def test_a_stream_of_metrics_begins_with_the_history_and_ends_with_the_status(
    api: Any, worker: Any
) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    tell_points(attempt, 1, 4)
    attempt.finish()
    *seen, end = read_all(api, job_id)
    assert numbers(seen) == [1, 2, 3]
    kind, _, data = seen[0]
    assert (kind, data.pop("time")[-1]) == ("metric", "Z")
    assert data == {"name": "train_loss", "step": 1, "epoch": 1, "value": 1.0, "attempt": 1}
    assert end == ("end", None, {"status": "succeeded"})


def test_a_stream_of_events_tells_what_the_list_does_and_ends_with_the_status(
    api: Any, worker: Any
) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    attempt.event("warning", "stalled", "No progress", seconds=300)
    attempt.finish(JobStatus.failed)
    *seen, end = read_all(api, job_id, path="events")
    listed = api.get(f"/jobs/{job_id}/events").json()["items"]
    assert [data for _, _, data in seen] == listed
    assert [(kind, number) for kind, number, _ in seen] == [("event", n) for n in (1, 2, 3, 4)]
    assert [data["type"] for data in listed] == ["created", "started", "stalled", "failed"]
    assert end == ("end", None, {"status": "failed"})


def test_what_a_client_asks_for_is_told_at_once(api: Any) -> None:
    """Not only workers write events."""
    job_id = api.submit()["id"]
    with stream(api, job_id, path="events") as events:
        assert next(events)[2]["type"] == "created"
        api.post(f"/jobs/{job_id}/cancel")
        assert next(events)[2]["type"] == "cancelled"
        assert list(events) == [("end", None, {"status": "cancelled"})]


def test_news_arrive_while_they_are_written(api: Any, worker: Any, followed: Followed) -> None:
    job_id = api.submit()["id"]
    with stream(api, job_id, path=followed.path) as events:
        attempt = worker.claim()
        own = [next(events) for _ in range(followed.num_before)]
        assert numbers(own) == list(range(1, followed.num_before + 1))
        for value in range(1, 4):
            followed.tell(attempt, value, value + 1)
            event = next(events)
            assert (event[1], followed.value(event)) == (followed.num_before + value, value)
        attempt.finish(JobStatus.failed)
        last = [next(events) for _ in range(followed.num_at_end)]
        assert len(numbers(last)) == followed.num_at_end
        assert next(events) == ("end", None, {"status": "failed"})
        assert list(events) == []


def test_a_stream_taken_up_again_and_again_loses_and_doubles_nothing(
    api: Any, worker: Any, followed: Followed
) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()

    def write() -> None:
        for first in range(1, 301, 15):
            followed.tell(attempt, first, first + 15)
        attempt.finish()

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[int | None] = []
    cuts = 0
    while True:
        with stream(api, job_id, seen[-1] if seen else None, followed.path) as events:
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
    assert seen == list(range(1, followed.num_before + 301 + followed.num_at_end))
    assert cuts >= 6


def test_a_long_history_comes_in_many_batches(
    api: Any, worker: Any, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BATCH_ITEMS", 7)
    job_id = api.submit()["id"]
    attempt = worker.claim()
    followed.tell(attempt, 1, 201)
    attempt.finish()
    started = time.monotonic()
    num_rows = followed.num_before + 200 + followed.num_at_end
    assert numbers(read_all(api, job_id, path=followed.path)) == list(range(1, num_rows + 1))
    assert time.monotonic() - started < 5, "29 batches are not paced by the poll interval"


def test_many_listeners_each_have_their_own_place(
    api: Any, worker: Any, followed: Followed
) -> None:
    jobs = [api.submit()["id"] for _ in range(3)]
    attempts = [worker.claim() for _ in jobs]
    for attempt in attempts:
        followed.tell(attempt, 1, 11)
    found: dict[tuple[str, int], list[int | None]] = {}

    def listen(job_id: str, last: int) -> None:
        found[job_id, last] = numbers(read_all(api, job_id, last, followed.path))

    threads = [
        threading.Thread(target=listen, args=(job_id, last))
        for job_id in jobs
        for last in (0, 4, 10)
    ]
    for thread in threads:
        thread.start()
    for attempt in attempts:
        followed.tell(attempt, 11, 16)
        attempt.finish()
    for thread in threads:
        thread.join()
    num_rows = followed.num_before + 15 + followed.num_at_end
    assert found == {
        (job_id, last): list(range(last + 1, num_rows + 1))
        for job_id in jobs
        for last in (0, 4, 10)
    }


def test_both_are_followed_at_once(api: Any, worker: Any) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    with stream(api, job_id) as points, stream(api, job_id, path="events") as events:
        tell_events(attempt, 7, 8)
        tell_points(attempt, 1, 3)
        attempt.finish()
        assert numbers(list(points)) == [1, 2]
        assert numbers(list(events)) == [1, 2, 3, 4]


def test_a_rewind_tells_readers_to_go_back(api: Any, worker: Any) -> None:
    job_id = api.submit()["id"]
    first = worker.claim()
    tell_points(first, 1, 6)
    with stream(api, job_id) as events:
        assert [next(events)[1] for _ in range(5)] == [1, 2, 3, 4, 5]
        first.release()
        second = worker.claim()
        second.rewind(last_point=3, step=3)
        assert next(events) == ("rewind", 6, {"step": 3, "attempt": 2})
        tell_points(second, 4, 5)
        kind, number, data = next(events)
        assert (kind, number, data["step"], data["attempt"]) == ("metric", 7, 4, 2)
        second.finish()
        assert next(events)[0] == "end"
    # Who comes late sees what is left; who was cut off before the rewind learns of it.
    assert numbers(read_all(api, job_id)) == [1, 2, 3, 6, 7]
    assert numbers(read_all(api, job_id, 5)) == [6, 7]


def test_a_reader_ahead_of_the_last_row_is_only_told_the_end(
    api: Any, worker: Any, followed: Followed
) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    followed.tell(attempt, 1, 3)
    with stream(api, job_id, 1000, followed.path) as events:
        attempt.finish(JobStatus.failed)
        assert list(events) == [("end", None, {"status": "failed"})]


def test_a_stream_of_a_job_that_is_deleted_ends(api: Any, worker: Any, followed: Followed) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    followed.tell(attempt, 1, 2)
    attempt.release()
    with stream(api, job_id, path=followed.path) as events:
        next(events)
        assert api.delete(f"/jobs/{job_id}").status_code == 204
        assert "end" not in [kind for kind, _, _ in events]


@pytest.mark.parametrize("path", FOLLOWED)
@pytest.mark.parametrize("last", ["x", "-1", "1.5", str(2**64)])
def test_a_last_event_id_that_is_no_number_is_refused(
    sqlite_api: Any, path: str, last: str, assert_problem: Callable[..., Any]
) -> None:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
    response = sqlite_api.get(f"/jobs/{sqlite_api.submit()['id']}/{path}", headers=headers)
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
    other = url.replace("metrics", "events")
    headers = {"Accept": "text/event-stream"}
    hub = api.server._app.state.services.streams
    with api.stream("GET", url, headers=headers), api.stream("GET", other, headers=headers):
        for third in (url, other):
            response = api.get(third, headers=headers)
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


def test_a_database_that_is_away_for_a_while_loses_nothing(
    api: Any, worker: Any, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    read = getattr(repository, followed.reader)
    failures = iter(range(3))

    def fail_three_times(*args: Any) -> Any:
        if next(failures, None) is not None:
            raise OperationalError("", {}, Exception("away"))
        return read(*args)

    monkeypatch.setattr(repository, followed.reader, fail_three_times)
    followed.tell(attempt, 1, 4)
    attempt.finish()
    num_rows = followed.num_before + 3 + followed.num_at_end
    assert numbers(read_all(api, job_id, path=followed.path)) == list(range(1, num_rows + 1))
    assert next(failures, None) is None


def test_a_listener_that_does_not_read_costs_no_more_than_its_batch(
    api: Any, worker: Any, database: Any, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fed no more, others go on, and it finds everything once it reads again."""
    monkeypatch.setattr(streams, "BATCH_ITEMS", 10)
    job_id = api.submit()["id"]
    attempt = worker.claim()
    followed.tell(attempt, 1, 96)
    attempt.finish()

    async def listen() -> tuple[int, list[int], list[int]]:
        hub = streams.StreamHub(database, max_streams=2)
        slow, quick = (hub.subscribe(followed.feed, job_id, 0) for _ in range(2))
        seen_by_quick = [n async for chunk in quick.chunks() for n in numbers_in(chunk)]
        num_held = len(numbers_in(slow._batch))
        seen_by_slow = [n async for chunk in slow.chunks() for n in numbers_in(chunk)]
        hub.stop()
        hub.join()
        return num_held, seen_by_quick, seen_by_slow

    def numbers_in(chunk: bytes) -> list[int]:
        return [number for _, number, _ in events_of(iter(chunk.decode().split("\n"))) if number]

    everything = list(range(1, followed.num_before + 96 + followed.num_at_end))
    assert asyncio.run(listen()) == (10, everything, everything)


def test_more_jobs_are_watched_than_one_condition_takes(database: Any, followed: Followed) -> None:
    cursors = {str(number): 0 for number in range(1200)}
    with database.read_scope() as session:
        assert followed.feed.rows_after(session, cursors, 10_000) == []


# ------------------------------------------------------------------------------------------ hints


def test_a_hint_is_a_reason_to_look_at_once(
    api: Any, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "POLL_SECONDS", 3600.0)
    job_id = api.submit()["id"]
    attempt = worker.claim()
    hub = api.server._app.state.services.streams
    with stream(api, job_id) as events:
        tell_points(attempt, 1, 2)
        hub.hint(job_id)
        assert next(events)[1] == 1
        attempt.finish()
        hub.hint(job_id)
        assert next(events)[0] == "end"


def test_many_hints_are_few_looks_and_of_other_jobs_none(
    api: Any, worker: Any, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., Any]
) -> None:
    monkeypatch.setattr(streams, "POLL_SECONDS", 3600.0)
    job_id = api.submit()["id"]
    hub = api.server._app.state.services.streams
    num_looks = 0
    look = hub._look

    def counted() -> None:
        nonlocal num_looks
        num_looks += 1
        look()

    with stream(api, job_id):
        wait_for(lambda: not hub._wake.is_set() and hub._subscriptions, "first look")
        monkeypatch.setattr(hub, "_look", counted)
        hub.hint("another job")
        assert not hub._wake.is_set()
        started = time.monotonic()
        while num_looks < 5:
            hub.hint(job_id)
        assert time.monotonic() - started >= 4 * streams.HINT_SECONDS


def test_a_hint_from_redis_reaches_the_stream(
    settings: Any,
    database: Any,
    worker: Any,
    redis_url: str,
    start_server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "POLL_SECONDS", 3600.0)
    with_redis = settings.model_copy(update={"broker_url": SecretStr(redis_url)})
    api = start_server(with_redis)
    job_id = api.submit()["id"]
    attempt = worker.claim()
    hints = Hints(with_redis)
    done = threading.Event()

    def write_and_hint() -> None:
        tell_points(attempt, 1, 2)
        while not done.wait(0.05):  # The server may not listen yet, and a hint is never kept.
            hints.publish(job_id)

    writer = threading.Thread(target=write_and_hint)
    with stream(api, job_id) as events:
        writer.start()
        assert next(events)[1] == 1
    done.set()
    writer.join()
    hints.close()
