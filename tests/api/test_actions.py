"""What changes a job's course: pause, resume, stop, retry, delete. Cancel is with the jobs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from api import submission
from shared import datasets, repository
from shared.repository import NewPoint
from skipline.schemas import JobStatus


def act(api: Any, job_id: str, action: str, **query: Any) -> Any:
    return api.post(f"/jobs/{job_id}/{action}", params=query)


def status(api: Any, job_id: str) -> str:
    found: str = api.get(f"/jobs/{job_id}").json()["status"]
    return found


def rings(monkeypatch: pytest.MonkeyPatch, api: Any) -> list[None]:
    """Grows with each ring of the bell."""
    heard: list[None] = []
    monkeypatch.setattr(api.server._app.state.services.bell, "ring", lambda: heard.append(None))
    return heard


def test_a_job_that_runs_is_paused_and_resumed_and_goes_on(
    api: Any, worker: Any, wait_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = api.submit()
    attempt = worker.claim()
    for _ in range(2):
        answer = act(api, job["id"], "pause")
        assert (answer.status_code, answer.json()["status"]) == (200, "pausing")
    attempt.release()
    for _ in range(2):
        assert act(api, job["id"], "pause").json()["status"] == "paused"
    heard = rings(monkeypatch, api)
    for _ in range(2):
        resumed = act(api, job["id"], "resume").json()
        assert (resumed["status"], resumed["queue_position"]) == ("queued", 1)
    wait_for(lambda: len(heard) == 2, "ring of the bell")
    worker.claim()
    assert api.get(f"/jobs/{job['id']}").json()["attempt"] == 2


def test_a_training_is_stopped_and_succeeds_by_the_users_wish(api: Any, worker: Any) -> None:
    job = api.submit()
    attempt = worker.claim()
    for _ in range(2):
        answer = act(api, job["id"], "stop")
        assert (answer.status_code, answer.json()["status"]) == (200, "stopping")
    attempt.finish()
    answer = act(api, job["id"], "stop").json()
    assert (answer["status"], answer["stop_reason"]) == ("succeeded", "user")


@pytest.mark.parametrize(
    ("action", "allowed"),
    [
        ("pause", {"running", "pausing", "paused"}),
        ("resume", {"paused", "queued", "running"}),
        ("stop", {"running", "stopping"}),
        (
            "cancel",
            {"queued", "running", "pausing", "paused", "stopping", "cancelling", "cancelled"},
        ),
        ("retry", {"failed", "cancelled"}),
    ],
)
def test_an_action_that_the_state_does_not_allow_changes_nothing(
    api: Any, worker: Any, assert_problem: Callable[..., Any], action: str, allowed: set[str]
) -> None:
    for state, reach in REACH.items():
        job_id = api.submit()["id"]
        reach(api, worker, job_id)
        before = api.get(f"/jobs/{job_id}").json()
        assert before["status"] == state
        answer = act(api, job_id, action)
        if state in allowed:
            assert answer.status_code in (200, 202), (state, answer.text)
        else:
            assert_problem(answer, 409, "illegal_transition")
            assert api.get(f"/jobs/{job_id}").json() == before
        end(api, worker, job_id)


def running(api: Any, worker: Any, job_id: str) -> Any:
    attempt = worker.claim()
    assert attempt.fence.job_id == job_id
    return attempt


def asked(action: str) -> Callable[..., Any]:
    def reach(api: Any, worker: Any, job_id: str) -> Any:
        attempt = running(api, worker, job_id)
        act(api, job_id, action)
        return attempt

    return reach


REACH: dict[str, Callable[..., Any]] = {
    "queued": lambda api, worker, job_id: None,
    "running": running,
    "pausing": asked("pause"),
    "paused": lambda *args: asked("pause")(*args).release(),
    "stopping": asked("stop"),
    "cancelling": asked("cancel"),
    "succeeded": lambda *args: running(*args).finish(),
    "failed": lambda *args: running(*args).finish(JobStatus.failed),
    "cancelled": lambda api, worker, job_id: act(api, job_id, "cancel"),
}
"""How a queued job, the first of the queue, comes into each state."""


def end(api: Any, worker: Any, job_id: str) -> None:
    """So that the next job is the first of the queue: nobody claims what is over."""
    act(api, job_id, "cancel")
    for job in api.get("/jobs", params={"status": "queued"}).json()["items"]:
        act(api, job["id"], "cancel")


# ----------------------------------------------------------------------------------------- retry


def failed_training(api: Any, worker: Any, **keys: Any) -> str:
    """Ten steps in, with a checkpoint at step 5."""
    job_id: str = api.submit(**keys)["id"]
    attempt = worker.claim()
    attempt.write(*(NewPoint("train_loss", step, 1, 1 / step) for step in range(1, 6)))
    attempt.checkpoint(5)
    attempt.write(*(NewPoint("train_loss", step, 2, 1 / step) for step in range(6, 11)))
    attempt.finish(JobStatus.failed)
    return job_id


def test_a_retry_is_a_new_job_that_begins_with_its_parents_last_checkpoint(
    api: Any, worker: Any
) -> None:
    parent = failed_training(api, worker, priority=3, epochs=7)
    before = api.get(f"/jobs/{parent}").json()
    response = act(api, parent, "retry")
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}" != f"/jobs/{parent}"
    assert api.get(f"/jobs/{job['id']}").json() == job
    assert (job["status"], job["attempt"], job["parent_id"]) == ("queued", 0, parent)
    assert job["spec"] == before["spec"] | {"parent_id": parent}
    assert job["spec"]["priority"] == 3
    assert api.get(f"/jobs/{parent}").json() == before
    checkpoints = api.get(f"/jobs/{job['id']}/checkpoints").json()["items"]
    assert {(c["kind"], c["step"]) for c in checkpoints} == {("best", 5), ("last", 5)}
    curve = api.get(f"/jobs/{job['id']}/metrics").json()["series"]["train_loss"]
    assert [point["step"] for point in curve] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("from_start", ["true", "1"])
def test_a_retry_from_the_start_begins_with_nothing(api: Any, worker: Any, from_start: str) -> None:
    parent = failed_training(api, worker)
    job = act(api, parent, "retry", from_start=from_start).json()
    assert job["parent_id"] == parent
    assert api.get(f"/jobs/{job['id']}/checkpoints").json()["items"] == []
    assert api.get(f"/jobs/{job['id']}/metrics").json()["series"] == {}


def test_a_training_without_a_checkpoint_is_retried_from_the_start(api: Any) -> None:
    parent = api.submit()["id"]
    act(api, parent, "cancel")
    job = act(api, parent, "retry").json()
    assert (job["status"], job["parent_id"]) == ("queued", parent)


@pytest.mark.parametrize("kind", ["dry_run", "ingest", "evaluate"])
def test_every_kind_of_job_is_retried_as_what_it_was(
    api: Any, worker: Any, settings: Any, kind: str
) -> None:
    if kind == "dry_run":
        response = api.post("/jobs", params={"dry_run": True}, json={"dataset": "digits"})
    elif kind == "ingest":
        response = api.post("/datasets", json={"source": "builtin", "name": "digits"})
    else:
        training = api.submit()["id"]
        worker.claim().checkpoint(5)
        asked_for = {"kind": "evaluate", "model": training, "dataset": "digits"}
        response = api.post("/jobs", json=asked_for)
    parent = response.json()
    act(api, parent["id"], "cancel")
    job = act(api, parent["id"], "retry").json()
    assert (job["kind"], job["status"], job["parent_id"]) == (kind, "queued", parent["id"])
    assert job["spec"] == parent["spec"] | ({} if kind == "ingest" else {"parent_id": parent["id"]})


def test_a_folder_that_is_gone_is_not_brought_in_again(
    api: Any, settings: Any, assert_problem: Callable[..., Any]
) -> None:
    folder = settings.dataset_roots[0] / "flowers"
    folder.mkdir(parents=True)
    parent = api.post("/datasets", json={"path": "flowers"}).json()["id"]
    act(api, parent, "cancel")
    folder.rmdir()
    document = assert_problem(act(api, parent, "retry"), 422, "invalid_input")
    assert [item["loc"] for item in document["errors"]] == ["path"]


def test_a_retry_waits_for_nobody(api: Any, worker: Any) -> None:
    first = api.submit()["id"]
    second = api.submit(after=first)["id"]
    act(api, first, "cancel")
    assert status(api, second) == "failed"
    job = act(api, second, "retry").json()
    assert (job["spec"]["after"], job["queue_position"]) == (None, 1)


def test_a_retry_needs_the_dataset(
    api: Any, worker: Any, database: Any, assert_problem: Callable[..., Any]
) -> None:
    worker.add_dataset("two", ["a", "b"], train=10, val=4)
    parent = failed_training(api, worker, dataset="two")
    with database.session_scope() as session:
        session.delete(datasets.find_dataset(session, "two"))
    for from_start in (False, True):
        refused = act(api, parent, "retry", from_start=from_start)
        assert_problem(refused, 422, "unknown_dataset")
    assert len(api.get("/jobs").json()["items"]) == 1


def test_a_training_that_goes_on_keeps_its_dataset_whatever_the_name_stands_for_now(
    api: Any, worker: Any, database: Any
) -> None:
    worker.add_dataset("two", ["a", "b"], train=10, val=4)
    parent = failed_training(api, worker, dataset="two")
    worker.add_dataset("newer", ["a", "b"], called="two", train=20, val=4)

    def dataset_id(**query: Any) -> str | None:
        job = act(api, parent, "retry", **query).json()
        with database.read_scope() as session:
            return repository.get_job(session, job["id"]).dataset_id

    assert dataset_id() == "id-of-two"
    assert dataset_id(from_start=True) == "id-of-newer"


def test_a_training_that_goes_on_needs_no_more_the_model_it_started_from(
    api: Any, worker: Any, database: Any
) -> None:
    origin = api.submit()["id"]
    attempt = worker.claim()
    attempt.checkpoint(10)
    parent = failed_training(api, worker, model={"init_from": origin})
    attempt.checkpoint(20)
    with database.session_scope() as session:
        repository.retire_checkpoints(session, origin, {"best": 1, "last": 1})
    assert act(api, parent, "retry").status_code == 202
    assert act(api, parent, "retry", from_start=True).status_code == 422


def test_a_full_queue_takes_no_retry(
    settings: Any, database: Any, start_server: Any, assert_problem: Callable[..., Any]
) -> None:
    api = start_server(settings.model_copy(update={"max_queued_jobs": 1}))
    parent = api.submit()["id"]
    act(api, parent, "cancel")
    assert act(api, parent, "retry").status_code == 202
    assert_problem(act(api, parent, "retry"), 429, "too_many_jobs")


# ---------------------------------------------------------------------------------------- delete


def test_a_deleted_job_is_gone_with_all_that_it_wrote(
    api: Any, worker: Any, wait_for: Callable[..., Any], assert_problem: Callable[..., Any]
) -> None:
    job_id = api.submit()["id"]
    attempt = worker.claim()
    attempt.write(NewPoint("train_loss", 1, 1, 0.5))
    folder: Path = worker.storage.path(attempt.checkpoint(1))
    attempt.finish()
    assert folder.is_dir()
    response = api.delete(f"/jobs/{job_id}")
    assert (response.status_code, response.content) == (204, b"")
    for call in ("", "/metrics", "/checkpoints", "/events", "/attempts", "/logs"):
        assert_problem(api.get(f"/jobs/{job_id}{call}"), 404, "job_not_found")
    assert_problem(api.delete(f"/jobs/{job_id}"), 404, "job_not_found")
    wait_for(lambda: not folder.exists(), "end of the checkpoint's files")


@pytest.mark.parametrize("state", ["running", "pausing", "stopping", "cancelling"])
def test_a_job_that_a_worker_has_is_not_deleted(
    api: Any, worker: Any, state: str, assert_problem: Callable[..., Any]
) -> None:
    job_id = api.submit()["id"]
    REACH[state](api, worker, job_id)
    assert_problem(api.delete(f"/jobs/{job_id}"), 409, "illegal_transition")
    assert status(api, job_id) == state


def test_a_job_that_waits_for_nothing_but_a_worker_is_deleted(api: Any, worker: Any) -> None:
    first, second = api.submit()["id"], api.submit()["id"]
    assert api.delete(f"/jobs/{first}").status_code == 204
    assert worker.claim().fence.job_id == second


def test_a_job_that_another_needs_is_not_deleted(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    training = api.submit()["id"]
    attempt = worker.claim()
    attempt.checkpoint(5)
    waiting = api.submit(after=training)["id"]
    evaluation = api.submit(kind="evaluate", model=training)["id"]
    attempt.finish()
    assert_problem(api.delete(f"/jobs/{training}"), 409, "in_use")
    act(api, evaluation, "cancel")
    assert api.delete(f"/jobs/{training}").status_code == 204
    assert status(api, waiting) == "queued"


def test_files_that_a_retry_goes_on_from_stay_when_its_parent_is_deleted(
    api: Any, worker: Any, wait_for: Callable[..., Any]
) -> None:
    parent = failed_training(api, worker)
    folder = worker.storage.path(f"jobs/{parent}/1/5")
    child = act(api, parent, "retry").json()["id"]
    assert api.delete(f"/jobs/{parent}").status_code == 204
    assert folder.is_dir()
    assert api.get(f"/jobs/{child}").json()["parent_id"] == parent
    assert api.delete(f"/jobs/{child}").status_code == 204
    wait_for(lambda: not folder.exists(), "end of the checkpoint's files")


def test_files_stay_when_a_parent_is_deleted_while_its_retry_is_stored(
    api: Any, worker: Any, database: Any, settings: Any, wait_for: Callable[..., Any]
) -> None:
    parent = failed_training(api, worker)
    folder = worker.storage.path(f"jobs/{parent}/1/5")
    blocked = text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )

    def is_blocked() -> bool:
        with database.read_scope() as session:
            return bool(session.scalar(blocked))

    with ThreadPoolExecutor(1) as thread:
        with database.session_scope() as session:
            submission.store_retry(session, parent, "", settings, from_start=False)
            deleted = thread.submit(api.delete, f"/jobs/{parent}")
            if not database.is_sqlite:  # There a transaction that writes is alone anyway.
                wait_for(is_blocked, "wait of the one for the other")
        assert deleted.result().status_code == 204
    assert folder.is_dir()
