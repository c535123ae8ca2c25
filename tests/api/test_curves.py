"""Long series: the database picks their extremes, and what was picked is kept."""

from __future__ import annotations

import random
from typing import Any

import pytest

from api import curves
from api.curves import Curves
from shared import repository
from shared.repository import NewPoint

LIMIT = 100_000


@pytest.fixture(autouse=True)
def _short_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a thousand points are too many to read them as they are."""
    monkeypatch.setattr(curves, "NUM_READ_WHOLE", 100)


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
    kept: Curves, database: Any, job_id: str, max_points: int, after: int = 0, **only: Any
) -> dict[str, list[tuple[int, float]]]:
    with database.read_scope() as session:
        series, last = kept.read(session, job_id, only.get("names"), after, max_points)
        assert last == repository.get_job(session, job_id).last_point
    return {name: [(p.step, p.value) for p in points] for name, points in series.items()}


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


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers the database looked at, each time that it was asked for extremes."""
    looked_at: list[int] = []
    read_extremes = repository.read_extremes

    def counting(*args: Any, after: int, up_to: int, **keys: Any) -> Any:
        looked_at.append(up_to - after)
        return read_extremes(*args, after=after, up_to=up_to, **keys)

    monkeypatch.setattr(repository, "read_extremes", counting)
    return looked_at


@pytest.mark.parametrize("max_points", [4, 10, 40, 300])
def test_a_long_curve_is_thinned_as_a_short_one_is(
    api: Any, worker: Any, database: Any, max_points: int
) -> None:
    points = noise(1, 1000)
    job_id, _ = stored(api, worker, points)
    found = read(Curves(LIMIT), database, job_id, max_points)
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
    found = read(Curves(LIMIT), database, job_id, 40)["train_loss"]
    assert set(peaks.items()) <= set(found)


def test_a_part_of_a_curve_and_some_of_its_series_are_thinned_too(
    api: Any, worker: Any, database: Any
) -> None:
    points = noise(2, 1000)
    job_id, _ = stored(api, worker, points)
    kept = Curves(LIMIT)
    for after in (0, 777):
        found = read(kept, database, job_id, 20, after=after, names=["val_loss", "train_loss"])
        assert set(found) == {"val_loss", "train_loss"}
        for name in found:
            assert_thinned(found[name], of(points[after:], name), 20)
    assert read(kept, database, job_id, 20, names=["nothing"]) == {}


def test_what_was_picked_once_is_not_read_again(
    api: Any, worker: Any, database: Any, counted: list[int]
) -> None:
    points = noise(3, 1000)
    job_id, attempt = stored(api, worker, points)
    kept = Curves(LIMIT)
    first = read(kept, database, job_id, 50)
    assert read(kept, database, job_id, 50) == first
    more = [NewPoint("train_loss", step, 2, 5.0) for step in range(1001, 1101)]
    attempt.write(*more)
    longer = read(kept, database, job_id, 50)
    assert_thinned(longer["train_loss"], of(points + more, "train_loss"), 50)
    # 2010 numbers in stretches of 64, then the whole stretches among the 100 after them.
    assert counted == [1984, 2110 // 64 * 64 - 1984]


def test_a_curve_that_was_rewound_is_picked_anew(
    api: Any, worker: Any, database: Any, counted: list[int]
) -> None:
    points = [NewPoint("train_loss", step, 1, 100.0 + step) for step in range(1, 1001)]
    job_id, first = stored(api, worker, points)
    kept = Curves(LIMIT)
    read(kept, database, job_id, 50)
    first.release()
    second = worker.claim()
    second.rewind(last_point=400, step=400)
    anew = [NewPoint("train_loss", step, 1, -float(step)) for step in range(401, 1201)]
    second.write(*anew)
    found = read(kept, database, job_id, 50)["train_loss"]
    assert_thinned(found, of(points[:400] + anew, "train_loss"), 50)
    assert found == read(Curves(LIMIT), database, job_id, 50)["train_loss"]
    assert len(counted) == 3, "twice for the one that was kept, once for the other"


def test_an_answer_holds_no_more_than_its_limit(api: Any, worker: Any, database: Any) -> None:
    job_id, _ = stored(api, worker, noise(4, 1000))
    found = read(Curves(60), database, job_id, 1000)
    assert {name: len(points) <= 20 for name, points in found.items()} == {
        "train_loss": True,
        "lr": True,
        "val_loss": True,
    }


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(
    api: Any, worker: Any, database: Any, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MAX_KEPT_POINTS", 60)
    points = noise(5, 300)
    jobs = [stored(api, worker, points)[0] for _ in range(2)]
    kept = Curves(LIMIT)
    for job_id in (*jobs, jobs[1], jobs[0]):
        read(kept, database, job_id, 30)
        assert sum(len(entry.rows) for entry in kept._kept.values()) <= 60
    assert len(counted) == 3, "the second was still there, the first was not"


def test_a_short_curve_costs_no_search_for_extremes(
    api: Any, worker: Any, database: Any, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "NUM_READ_WHOLE", 10_000)
    points = noise(6, 500)
    job_id, _ = stored(api, worker, points)
    found = read(Curves(LIMIT), database, job_id, 50)
    assert_thinned(found["train_loss"], of(points, "train_loss"), 50)
    assert counted == []


def test_metrics_are_answered_from_it(api: Any, worker: Any) -> None:
    points = noise(7, 1000)
    job_id, _ = stored(api, worker, points)
    answer = api.get(f"/jobs/{job_id}/metrics", params={"max_points": 20}).json()
    found = [(p["step"], p["value"]) for p in answer["series"]["train_loss"]]
    assert_thinned(found, of(points, "train_loss"), 20)
    assert answer["next"] == str(len(points))
    nothing = api.get(f"/jobs/{job_id}/metrics", params={"max_points": 20, "after": 10**9})
    assert (nothing.json()["series"], nothing.json()["next"]) == ({}, str(10**9))
