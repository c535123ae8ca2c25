from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shared.repository import NewPoint
from skipline import schemas


@pytest.fixture
def trained(api: Any, worker: Any) -> Any:
    """A running job with six points, numbered from 1, and its worker."""
    job = api.submit()
    attempt = worker.claim()
    for step in (1, 2, 3):
        attempt.write(NewPoint("train_loss", step, 1, 3.0 - step / 2), NewPoint("lr", step, 1, 0.1))
    return job["id"], attempt


def test_series_are_in_their_order_and_next_is_the_last_number(api: Any, trained: Any) -> None:
    job_id, _ = trained
    answer = api.get(f"/jobs/{job_id}/metrics")
    assert answer.headers["content-type"] == "application/json"
    metrics = answer.json()
    assert (metrics["job_id"], metrics["status"], metrics["next"]) == (job_id, "running", "6")
    assert set(metrics["series"]) == {"train_loss", "lr"}
    points = metrics["series"]["train_loss"]
    assert [(p["step"], p["epoch"], p["value"]) for p in points] == [
        (1, 1, 2.5),
        (2, 1, 2.0),
        (3, 1, 1.5),
    ]
    assert points[0]["time"].endswith("Z")
    schemas.Metrics.model_validate(metrics)


def test_only_what_is_new_comes_after_a_cursor(api: Any, trained: Any) -> None:
    job_id, attempt = trained
    first = api.get(f"/jobs/{job_id}/metrics").json()
    same = api.get(f"/jobs/{job_id}/metrics", params={"after": first["next"]}).json()
    assert (same["series"], same["next"]) == ({}, "6")
    attempt.write(NewPoint("val_loss", 3, 1, 0.25))
    new = api.get(f"/jobs/{job_id}/metrics", params={"after": same["next"]}).json()
    assert [p["value"] for p in new["series"]["val_loss"]] == [0.25]
    assert (list(new["series"]), new["next"]) == (["val_loss"], "7")


def test_names_choose_the_series(api: Any, trained: Any) -> None:
    job_id, _ = trained

    def names(wanted: str) -> set[str]:
        return set(api.get(f"/jobs/{job_id}/metrics", params={"names": wanted}).json()["series"])

    assert names("lr") == {"lr"}
    assert names("lr,train_loss,other") == {"lr", "train_loss"}
    assert names("") == names("\x00") == names("rewind") == set()


def test_a_long_series_is_thinned_and_keeps_its_extremes(api: Any, trained: Any) -> None:
    job_id, attempt = trained
    values = [1.0] * 500
    values[123], values[321] = 50.0, -50.0
    points = [NewPoint("val_loss", step, 1, value) for step, value in enumerate(values)]
    attempt.write(*points)
    answer = api.get(f"/jobs/{job_id}/metrics", params={"max_points": 10}).json()
    kept = [(p["step"], p["value"]) for p in answer["series"]["val_loss"]]
    assert len(kept) <= 10
    assert {(0, 1.0), (123, 50.0), (321, -50.0), (499, 1.0)} <= set(kept)
    assert len(answer["series"]["train_loss"]) == 3
    assert answer["next"] == "506"


def test_a_job_without_points_has_no_series(api: Any) -> None:
    answer = api.get(f"/jobs/{api.submit()['id']}/metrics").json()
    assert (answer["status"], answer["series"], answer["next"]) == ("queued", {}, None)


def test_one_answer_holds_only_so_many_points(
    settings: Any, start_server: Any, trained: Any
) -> None:
    job_id, _ = trained
    api = start_server(settings.model_copy(update={"max_metric_points": 4}))
    first = api.get(f"/jobs/{job_id}/metrics").json()
    assert sum(map(len, first["series"].values())) == 4
    rest = api.get(f"/jobs/{job_id}/metrics", params={"after": first["next"]}).json()
    assert sum(map(len, rest["series"].values())) == 2


@pytest.mark.parametrize(
    "query",
    [{"after": -1}, {"after": "x"}, {"after": 2**70}, {"max_points": 1}, {"names": "n" * 9999}],
)
def test_a_query_that_makes_no_sense_is_refused(
    sqlite_api: Any, query: dict[str, Any], assert_problem: Callable[..., Any]
) -> None:
    job_id = sqlite_api.submit()["id"]
    document = assert_problem(
        sqlite_api.get(f"/jobs/{job_id}/metrics", params=query), 422, "invalid_input"
    )
    assert document["errors"][0]["loc"] == next(iter(query))
