"""Aliases: what they stand for, what they keep, and how they go back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shared import repository
from shared.database import Database


def train(api: Any, worker: Any, *labels: int) -> tuple[str, list[str]]:
    """A training that succeeded with a checkpoint for each label, which that one always answers;
    the ids of the checkpoints, in their order."""
    job_id = api.submit()["id"]
    attempt = worker.claim()
    for step, label in enumerate(labels, start=1):
        bias = [float(place == label) for place in range(10)]
        attempt.checkpoint(step, "epoch", bias=bias)
    attempt.finish()
    items = api.get(f"/jobs/{job_id}/checkpoints").json()["items"]
    return job_id, [item["id"] for item in sorted(items, key=lambda item: item["step"])]


def answer(api: Any, png: Any, model: str | None = None) -> tuple[str, str]:
    """The checkpoint that answers, and the label that it finds."""
    document = api.predict([png()], **({"model": model} if model else {})).json()
    top = document["predictions"][0]["top"][0]["label"]
    return document["model"]["checkpoint_id"], top


def put(api: Any, alias: str, **change: Any) -> dict[str, Any]:
    response = api.put(f"/models/{alias}", json=change)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def test_predictions_come_from_where_the_alias_points(api: Any, worker: Any, png: Any) -> None:
    job_id, (first, second) = train(api, worker, 3, 7)
    model = put(api, "production", checkpoint_id=first)
    assert (model["job_id"], model["arch"], model["dataset"]) == (job_id, "resnet18", "digits")
    assert (model["step"], model["number"], model["former_checkpoint_id"]) == (1, 1, None)
    assert answer(api, png) == (first, "3")
    assert put(api, "production", checkpoint_id=second)["former_checkpoint_id"] == first
    assert answer(api, png) == answer(api, png, "production") == (second, "7")
    assert put(api, "candidate", checkpoint_id="production")["checkpoint_id"] == second


def test_without_the_alias_production_a_model_has_to_be_named(
    api: Any, png: Any, assert_problem: Callable[..., Any]
) -> None:
    document = assert_problem(api.predict([png()]), 404, "model_not_found")
    assert "production" in document["detail"]


def test_a_move_is_taken_back_and_the_history_tells_both(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    _, (first, second) = train(api, worker, 3, 7)
    put(api, "production", checkpoint_id=first)
    nowhere = api.post("/models/production/rollback")
    assert_problem(nowhere, 409, "nothing_to_take_back")
    put(api, "production", checkpoint_id=second)
    put(api, "production", checkpoint_id=second)  # changes nothing
    back = api.post("/models/production/rollback").json()
    assert (back["checkpoint_id"], back["former_checkpoint_id"], back["number"]) == (
        *(first, second),
        3,
    )
    assert api.post("/models/production/rollback").json()["checkpoint_id"] == second
    assert api.delete("/models/production").status_code == 204
    put(api, "production", checkpoint_id=first)
    page = api.get("/models/production/history?limit=4").json()
    rest = api.get(f"/models/production/history?after={page['next']}").json()
    moves = [*page["items"], *rest["items"]]
    assert rest["next"] is None
    assert [(move["number"], move["checkpoint_id"]) for move in moves] == [
        *((6, first), (5, None), (4, second), (3, first), (2, second), (1, first)),
    ]


def test_what_an_alias_stands_for_or_did_before_is_kept(
    api: Any, worker: Any, database: Database, assert_problem: Callable[..., Any]
) -> None:
    job_id, (first, second, third) = train(api, worker, 1, 2, 3)
    other, (newer,) = train(api, worker, 4)
    put(api, "production", checkpoint_id=first)
    put(api, "production", checkpoint_id=third)
    with database.session_scope() as session:
        keys = repository.retire_checkpoints(session, job_id, {"epoch": 0})
    assert keys == [f"jobs/{job_id}/1/2"]
    assert_problem(api.delete(f"/jobs/{job_id}"), 409, "in_use")
    put(api, "production", checkpoint_id=newer)
    document = assert_problem(api.delete(f"/jobs/{job_id}"), 409, "in_use")
    assert "production" in document["detail"]
    assert api.delete(f"/models/{'production'}").status_code == 204
    assert api.delete(f"/jobs/{job_id}").status_code == 204
    assert api.delete(f"/jobs/{other}").status_code == 204
    assert second not in (first, third)


def test_a_resumed_attempt_leaves_what_an_alias_stands_for(
    api: Any, worker: Any, database: Database
) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    for step in (1, 2, 3):
        attempt.checkpoint(step, "epoch")
    ids = {c["step"]: c["id"] for c in api.get(f"/jobs/{job_id}/checkpoints").json()["items"]}
    put(api, "production", checkpoint_id=ids[3])
    with database.session_scope() as session:
        keys = repository.forget_checkpoints_after(session, attempt.fence, 1)
    assert keys == [f"jobs/{job_id}/1/2"]
    assert api.get("/models/production").json()["checkpoint_id"] == ids[3]


def test_a_training_starts_from_what_the_alias_stands_for_at_that_moment(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    _, (first, second) = train(api, worker, 3, 7)
    put(api, "production", checkpoint_id=first)
    job = api.submit(model={"init_from": "production"})
    assert job["spec"]["model"]["init_from"] == first
    put(api, "production", checkpoint_id=second)
    assert api.get(f"/jobs/{job['id']}").json()["spec"]["model"]["init_from"] == first
    unknown = api.post("/jobs", json={"dataset": "digits", "model": {"init_from": "staging"}})
    document = assert_problem(unknown, 422, "model_not_found")
    assert [item["loc"] for item in document["errors"]] == ["model.init_from"]


def test_an_evaluation_keeps_to_what_the_alias_stood_for(api: Any, worker: Any) -> None:
    _, (first, second) = train(api, worker, 3, 7)
    put(api, "production", checkpoint_id=first)
    evaluation = {"kind": "evaluate", "model": "production", "dataset": "digits"}
    job = api.post("/jobs", json=evaluation)
    assert job.status_code == 202, job.text
    put(api, "production", checkpoint_id=second)
    with worker.database.read_scope() as session:
        assert repository.get_job(session, job.json()["id"]).checkpoint_id == first


def test_notes_and_tags_stay_until_they_are_changed(api: Any, worker: Any) -> None:
    _, (first, second) = train(api, worker, 3, 7)
    put(api, "production", checkpoint_id=first, notes="Two\nlines", tags=["a", "b"])
    put(api, "production", checkpoint_id=second)
    put(api, "production", tags=[])
    put(api, "candidate", checkpoint_id=first)
    models = api.get("/models").json()["items"]
    assert [(m["alias"], m["notes"], m["tags"]) for m in models] == [
        *(("candidate", "", []), ("production", "Two\nlines", [])),
    ]
    assert api.get("/models?limit=1").json()["next"] == "candidate"


@pytest.mark.parametrize(
    ("alias", "change", "status", "code"),
    [
        ("production", {}, 422, "invalid_spec"),
        ("production", {"checkpoint_id": None}, 404, "alias_not_found"),
        ("production", {"notes": "x"}, 404, "alias_not_found"),
        ("production", {"checkpoint_id": "nothing"}, 404, "model_not_found"),
        ("production", {"checkpoint": "x"}, 422, "invalid_spec"),
        ("production", {"notes": "x" * 4001}, 422, "invalid_spec"),
        ("production", {"notes": "a\u0000b"}, 422, "invalid_spec"),
        ("production", {"tags": ["x"] * 21}, 422, "invalid_spec"),
        ("Production", {"checkpoint_id": "x"}, 422, "invalid_input"),
        ("..%2fx", {"checkpoint_id": "x"}, 404, "not_found"),
        ("x" * 65, {"checkpoint_id": "x"}, 422, "invalid_input"),
        ("imagenet", {"checkpoint_id": "x"}, 422, "invalid_input"),
        ("01a218c3-1fbc-76e7-bb80-a9d218fb2e20", {"checkpoint_id": "x"}, 422, "invalid_input"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(
    sqlite_api: Any,
    alias: str,
    change: dict[str, Any],
    status: int,
    code: str,
    assert_problem: Callable[..., Any],
) -> None:
    assert_problem(sqlite_api.put(f"/models/{alias}", json=change), status, code)


def test_an_alias_that_never_was_is_not_found(
    sqlite_api: Any, assert_problem: Callable[..., Any]
) -> None:
    for request in (
        ("GET", "/models/nothing"),
        ("GET", "/models/nothing/history"),
        ("GET", "/models/a%00b"),
        ("DELETE", "/models/nothing"),
        ("POST", "/models/nothing/rollback"),
    ):
        assert_problem(sqlite_api.request(*request), 404, "alias_not_found")
    unknown = sqlite_api.get("/models/nothing/history?after=x")
    assert_problem(unknown, 422, "invalid_input")


def test_moves_at_once_are_all_made_and_numbered(api: Any, worker: Any) -> None:
    _, checkpoints = train(api, worker, *range(8))

    def move(checkpoint_id: str) -> int:
        number: int = put(api, "production", checkpoint_id=checkpoint_id)["number"]
        return number

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(move, checkpoints))
    assert sorted(numbers) == list(range(1, 9))
    newest = checkpoints[numbers.index(8)]
    former = checkpoints[numbers.index(7)]
    model = api.get("/models/production").json()
    assert (model["checkpoint_id"], model["former_checkpoint_id"]) == (newest, former)


def test_models_in_memory_are_listed_and_their_address_is_no_alias(
    start_server: Any, settings: Any, api: Any, worker: Any, png: Any, assert_problem: Any
) -> None:
    fresh = start_server(settings)
    before = fresh.get("/models/loaded").json()
    assert (before["items"], before["num_bytes"]) == ([], 0)
    _, (first, second) = train(api, worker, 3, 7)
    for checkpoint in (first, second, first):
        answer(fresh, png, checkpoint)
    loaded = fresh.get("/models/loaded").json()
    assert [item["checkpoint_id"] for item in loaded["items"]] == [first, second]
    assert {item["arch"] for item in loaded["items"]} == {"resnet18"}
    assert loaded["num_bytes"] == sum(item["num_bytes"] for item in loaded["items"])
    # A ResNet-18 of ten classes at the least: 11 million numbers of 4 bytes each.
    assert all(44_000_000 < item["num_bytes"] < 46_000_000 for item in loaded["items"])
    assert loaded["max_bytes"] == 2 * 1024**3
    taken = api.put("/models/loaded", json={"checkpoint_id": first})
    assert_problem(taken, 422, "invalid_input")
