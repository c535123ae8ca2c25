"""Long series: they are read by the extremes that were marked when they were written."""

from __future__ import annotations

import random
from typing import Any

import pytest

from api.curves import read_curves
from shared import repository
from shared.repository import NewPoint
from skipline.schemas import JobStatus

LIMIT = 400
"""Points that are read as they are: fewer than these tests write."""


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "STRETCH", 16)


def noise(seed: int, num_points: int) -> list[NewPoint]:
    """Three series that take turns: noise with ties, one that is flat, and one with few points."""
    generator = random.Random(seed)
    points = []
    for step in range(1, num_points + 1):
        points.append(NewPoint("train_loss", step, 1, generator.randrange(50) / 50))
        points.append(NewPoint("lr", step, 1, 0.1))
        if step % 100 == 0:
            points.append(NewPoint("val_loss", step, 1, generator.random()))
    return points


def stored(api: Any, worker: Any, points: list[NewPoint]) -> tuple[str, Any]:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    attempt.write(*points)
    return job_id, attempt


def read(
    database: Any,
    job_id: str,
    max_points: int,
    after: int = 0,
    names: list[str] | None = None,
    limit: int = LIMIT,
) -> dict[str, list[tuple[int, float]]]:
    with database.read_scope() as session:
        series, last = read_curves(
            session, job_id, names, after=after, max_points=max_points, limit=limit
        )
        assert last == repository.get_job(session, job_id).last_point
    return {name: [(p.step, p.value) for p in points] for name, points in series.items()}


def num_read(database: Any, job_id: str) -> int:
    """Rows that reading the whole curve takes."""
    with database.read_scope() as session:
        last = repository.get_job(session, job_id).last_point
        return len(repository.read_curve(session, job_id, after=0, last=last))


def of(points: list[NewPoint], name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in points if point.name == name]


def assert_thinned(
    thinned: list[tuple[int, float]], whole: list[tuple[int, float]], max_points: int
) -> None:
    """No more points than asked for and hardly fewer, none made up, in order, with both ends and
    the extremes."""
    assert min(max_points, len(whole)) // 4 <= len(thinned) <= max_points
    assert [point for point in whole if point in set(thinned)] == thinned
    assert (thinned[0], thinned[-1]) == (whole[0], whole[-1])
    values, kept = [value for _, value in whole], [value for _, value in thinned]
    assert (min(kept), max(kept)) == (min(values), max(values))


@pytest.mark.parametrize("max_points", [4, 10, 40, 300])
def test_a_long_curve_is_thinned_as_a_short_one_is(
    api: Any, worker: Any, database: Any, max_points: int
) -> None:
    points = noise(1, 1000)
    job_id, _ = stored(api, worker, points)
    found = read(database, job_id, max_points)
    for name in ("train_loss", "val_loss"):
        assert_thinned(found[name], of(points, name), max_points)
    flat = found["lr"]
    assert 2 <= len(flat) <= max_points
    assert (flat[0], flat[-1], {value for _, value in flat}) == ((1, 0.1), (1000, 0.1), {0.1})


def test_peaks_are_found_wherever_they_are(api: Any, worker: Any, database: Any) -> None:
    points = [NewPoint("train_loss", step, 1, 1.0) for step in range(1, 2001)]
    peaks = {2: 9.0, 701: -3.0, 1300: 8.0, 1999: 7.0}
    points = [NewPoint(p.name, p.step, p.epoch, peaks.get(p.step, p.value)) for p in points]
    job_id, _ = stored(api, worker, points)
    found = read(database, job_id, 40)["train_loss"]
    assert set(peaks.items()) <= set(found)


def test_a_part_of_a_curve_and_some_of_its_series_are_thinned_too(
    api: Any, worker: Any, database: Any
) -> None:
    points = noise(2, 1000)
    job_id, _ = stored(api, worker, points)
    for after in (0, 777):
        found = read(database, job_id, 20, after=after, names=["val_loss", "train_loss"])
        assert set(found) == {"val_loss", "train_loss"}
        for name in found:
            assert_thinned(found[name], of(points[after:], name), 20)
    assert read(database, job_id, 20, names=["nothing"]) == {}


def test_a_curve_that_grows_by_single_points_is_marked_as_one_written_at_once(
    api: Any, worker: Any, database: Any
) -> None:
    points = noise(3, 300)
    job_id, _ = stored(api, worker, points)
    other, attempt = stored(api, worker, points[:5])
    generator = random.Random(3)
    place = 5
    while place < len(points):
        beyond = place + generator.randrange(1, 40)
        attempt.write(*points[place:beyond])
        place = beyond
    assert read(database, other, 50) == read(database, job_id, 50)
    assert num_read(database, other) == num_read(database, job_id)


def test_of_a_long_curve_few_points_are_read(api: Any, worker: Any, database: Any) -> None:
    # 1600 numbers: 2 stretches as they are, and 98 with a lowest and a highest of both series.
    points = [
        NewPoint(name, step, 1, value)
        for step in range(1, 801)
        for name, value in (("train_loss", 1 / step), ("lr", float(step)))
    ]
    job_id, _ = stored(api, worker, points)
    assert num_read(database, job_id) == 16 + 99 * 4


def test_a_curve_that_was_rewound_shows_what_was_written_anew(
    api: Any, worker: Any, database: Any
) -> None:
    points = [NewPoint("train_loss", step, 1, 100.0 + step) for step in range(1, 1001)]
    job_id, first = stored(api, worker, points)
    first.release()
    second = worker.claim()
    second.rewind(last_point=405, step=405)
    # Of the stretch that was cut, 401 to 416, the highest is now the last that is left.
    with database.read_scope() as session:
        rows = repository.read_curve(session, job_id, after=0, last=1001)
    assert [row.number for row in rows if row.number > 390] == [400, 401, 405]
    anew = [NewPoint("train_loss", step, 1, -float(step)) for step in range(406, 1201)]
    second.write(*anew)
    found = read(database, job_id, 50)["train_loss"]
    assert_thinned(found, of(points[:405] + anew, "train_loss"), 50)


def test_the_curve_of_a_retry_shows_the_peaks_of_its_parent(
    api: Any, worker: Any, database: Any
) -> None:
    values = [1.0] * 500
    for step, peak in ((3, 9.0), (250, -7.0), (470, 8.0), (489, 7.0)):
        values[step - 1] = peak
    points = [NewPoint("train_loss", step, 1, value) for step, value in enumerate(values, 1)]
    job_id, first = stored(api, worker, points[:200])
    first.release()
    second = worker.claim()
    second.rewind(last_point=190, step=190)  # From here on numbers and steps differ.
    second.write(*points[190:490])
    second.checkpoint(490, "last")
    second.finish(JobStatus.failed)
    retry = api.post(f"/jobs/{job_id}/retry").json()["id"]
    third = worker.claim()
    third.write(*points[490:])
    found = read(database, retry, 60)["train_loss"]
    assert {(3, 9.0), (250, -7.0), (470, 8.0), (489, 7.0)} <= set(found)


def test_an_answer_holds_no_more_than_its_limit(api: Any, worker: Any, database: Any) -> None:
    job_id, _ = stored(api, worker, noise(4, 1000))
    found = read(database, job_id, 1000, limit=60)
    assert {name: len(points) <= 20 for name, points in found.items()} == {
        "train_loss": True,
        "lr": True,
        "val_loss": True,
    }


def test_metrics_are_answered_from_it(api: Any, worker: Any) -> None:
    points = noise(7, 1000)
    job_id, _ = stored(api, worker, points)
    answer = api.get(f"/jobs/{job_id}/metrics", params={"max_points": 20}).json()
    found = [(p["step"], p["value"]) for p in answer["series"]["train_loss"]]
    assert_thinned(found, of(points, "train_loss"), 20)
    assert answer["next"] == str(len(points))
    nothing = api.get(f"/jobs/{job_id}/metrics", params={"max_points": 20, "after": 10**9})
    assert (nothing.json()["series"], nothing.json()["next"]) == ({}, str(10**9))
