"""Jobs are stored once, within limits, and may wait for others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import SecretStr

from api import limits, submission
from shared import repository
from skipline.schemas import JobStatus
from skipline.specs import ARCHS, EvaluateSpec, TrainSpec

KEY = "c0ffee" * 8
OTHER_KEY = "decade" * 8
TWO_ON_THE_CPU = {"device": "cpu", "num_processes": 2}


def post(api: Any, key: str | bytes | None = None, path: str = "/jobs", **keys: Any) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return api.post(path, json={"dataset": "digits", **keys}, headers=headers)


def num_jobs(api: Any) -> int:
    return len(api.get("/jobs", params={"limit": 1000}).json()["items"])


# ------------------------------------------------------------------------------ idempotency keys


def test_the_same_request_with_the_same_key_makes_one_job(api: Any, worker: Any) -> None:
    first = post(api, "a key", epochs=3)
    worker.claim()
    again = api.post(  # the same document, written otherwise
        "/jobs",
        content=b'{"epochs":3,  "dataset" : "digits"}',
        headers={"Idempotency-Key": "a key", "Content-Type": "application/json"},
    )
    assert again.status_code == first.status_code == 202
    assert again.headers["location"] == first.headers["location"]
    assert (again.json()["id"], again.json()["status"]) == (first.json()["id"], "running")
    assert num_jobs(api) == 1


def test_another_request_with_the_same_key_is_refused(
    api: Any, assert_problem: Callable[..., Any]
) -> None:
    post(api, "k", epochs=3)
    assert_problem(post(api, "k", epochs=4), 409, "idempotency_mismatch")
    assert_problem(post(api, "k", "/jobs?dry_run=true", epochs=3), 409, "idempotency_mismatch")
    ingest = {"source": "builtin", "name": "digits"}
    other_path = api.post("/datasets", json=ingest, headers={"Idempotency-Key": "k"})
    assert_problem(other_path, 409, "idempotency_mismatch")
    assert num_jobs(api) == 1


def test_requests_without_a_key_or_with_another_make_jobs_of_their_own(api: Any) -> None:
    for key in (None, None, "a", "b", "~" * 255, "!"):
        assert post(api, key).status_code == 202
    assert num_jobs(api) == 6


def test_fifty_at_once_make_one_job(api: Any) -> None:
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda _: post(api, "k"), range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert num_jobs(api) == 1


def test_a_dataset_and_a_retry_take_a_key_too(api: Any, assert_problem: Callable[..., Any]) -> None:
    ingest = {"source": "builtin", "name": "digits"}
    made = [api.post("/datasets", json=ingest, headers={"Idempotency-Key": "d"}) for _ in range(2)]
    assert made[0].headers["location"] == made[1].headers["location"]
    parent = api.submit()["id"]
    api.post(f"/jobs/{parent}/cancel")

    def retry(**query: Any) -> Any:
        headers = {"Idempotency-Key": "r"}
        return api.post(f"/jobs/{parent}/retry", params=query, headers=headers)

    assert retry().headers["location"] == retry().headers["location"]
    assert_problem(retry(from_start=True), 409, "idempotency_mismatch")
    assert num_jobs(api) == 3


def test_a_request_that_was_refused_does_not_use_its_key_up(api: Any) -> None:
    assert post(api, "k", dataset="nothing").status_code == 422
    assert post(api, "k").status_code == 202


def test_the_key_of_a_deleted_job_is_free_again(api: Any) -> None:
    first = post(api, "k").json()["id"]
    api.delete(f"/jobs/{first}")
    assert post(api, "k").json()["id"] != first


@pytest.mark.parametrize("key", [b"", b"x" * 256, "\xe9".encode(), b"\xff", b"a\tb"])
def test_a_key_that_is_none_is_refused(
    sqlite_api: Any, key: bytes, assert_problem: Callable[..., Any]
) -> None:
    document = assert_problem(post(sqlite_api, key), 422, "invalid_input")
    assert [item["loc"] for item in document["errors"]] == ["Idempotency-Key"]


def test_each_submitter_has_keys_of_its_own(
    settings: Any, database: Any, start_server: Any
) -> None:
    made = set()
    for api_key in (KEY, OTHER_KEY):
        keyed = settings.model_copy(update={"api_key": SecretStr(api_key)})
        made.add(post(start_server(keyed, api_key), "k").json()["id"])
    assert len(made) == 2
    with database.read_scope() as session:
        submitters = {repository.get_job(session, job_id).submitter for job_id in made}
    # of the SHA-256 of each key the first digits
    assert submitters == {"9054007d7becf20f", "88cc8d4149b5361d"}


# ---------------------------------------------------------------------------------------- limits


def test_one_key_may_not_fill_the_queue_alone(
    settings: Any, database: Any, start_server: Any, assert_problem: Callable[..., Any]
) -> None:
    limited = settings.model_copy(update={"max_queued_jobs_per_key": 2})
    one, other = (
        start_server(limited.model_copy(update={"api_key": SecretStr(key)}), key)
        for key in (KEY, OTHER_KEY)
    )
    first = one.submit()["id"]
    one.submit()
    refused = post(one)
    assert_problem(refused, 429, "too_many_jobs")
    assert int(refused.headers["retry-after"]) > 0
    other.submit()
    one.post(f"/jobs/{first}/cancel")
    one.submit()


def test_without_keys_only_the_whole_queue_is_limited(
    settings: Any, database: Any, start_server: Any
) -> None:
    api = start_server(settings.model_copy(update={"max_queued_jobs_per_key": 1}))
    for _ in range(3):
        api.submit()


def test_what_other_processes_queue_is_seen_within_a_second(
    settings: Any, database: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = settings.model_copy(update={"max_queued_jobs": 3})
    one, other = start_server(limited), start_server(limited)
    one.submit()
    other.submit()
    other.submit()
    monkeypatch.setattr(limits, "COUNT_SECONDS", 0.0)
    assert post(one).status_code == 429


def test_the_queue_is_not_counted_for_every_job(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    num_counts = 0
    count = repository.num_queued

    def counted(*args: Any) -> int:
        nonlocal num_counts
        num_counts += 1
        return count(*args)

    monkeypatch.setattr(repository, "num_queued", counted)
    monkeypatch.setattr(limits, "COUNT_SECONDS", 3600.0)
    for _ in range(5):
        api.submit()
    assert num_counts <= 1


# ------------------------------------------------------------------- waiting for another job


def stored(database: Any, job: dict[str, Any]) -> Any:
    with database.read_scope() as session:
        return repository.get_job(session, job["id"])


def test_an_evaluation_waits_for_the_training_of_its_model(
    api: Any, worker: Any, database: Any
) -> None:
    training = api.submit()["id"]
    attempt = worker.claim()
    attempt.checkpoint(5)
    evaluation = api.submit(kind="evaluate", model=training, after=training)
    assert evaluation["queue_position"] is None, "it waits for no worker yet"
    assert stored(database, evaluation).checkpoint_id is None, "a better one may come"
    attempt.finish()
    assert api.get(f"/jobs/{evaluation['id']}").json()["queue_position"] == 1
    # The training is over: which checkpoint is meant is known, whether one waits for it or not.
    late = api.submit(kind="evaluate", model=training, after=training)
    assert stored(database, late).checkpoint_id is not None
    assert late["queue_position"] == 2


def test_a_training_waits_for_the_model_it_starts_from(
    api: Any, worker: Any, database: Any
) -> None:
    first = api.submit()["id"]
    second = api.submit(model={"init_from": first}, after=first)
    assert second["spec"]["model"]["init_from"] == first
    # Waiting for one job, of another that is not over either.
    third = api.submit(model={"init_from": first}, after=second["id"])
    for job in (second, third):
        assert (stored(database, job).checkpoint_id, job["queue_position"]) == (None, None)


def test_what_waits_for_its_model_is_checked_at_once(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    training = api.submit()["id"]
    worker.add_dataset("two", ["a", "b"], train=10, test=4)

    def refused(loc: str, **keys: Any) -> None:
        document = assert_problem(post(api, after=training, **keys), 422, "invalid_spec")
        assert [item["loc"] for item in document["errors"]] == [loc]

    refused("dataset", kind="evaluate", model=training, dataset="two")
    refused("model.init_from", model={"arch": "resnet34", "init_from": training})
    refused("model.init_from", model={"init_from": training, "stem": "imagenet"})
    dry_run = api.post("/jobs", params={"dry_run": True}, json={"dataset": "digits"}).json()["id"]
    no_model = post(api, kind="evaluate", model=dry_run, after=dry_run)
    assert_problem(no_model, 409, "no_checkpoint_yet")


@pytest.mark.parametrize("key", ["after", "parent_id"])
def test_a_job_that_is_named_must_exist(
    api: Any, key: str, assert_problem: Callable[..., Any]
) -> None:
    document = assert_problem(post(api, **{key: "nothing"}), 422, "invalid_input")
    assert [item["loc"] for item in document["errors"]] == [key]
    parent = api.submit()["id"]
    job = api.submit(**{key: parent})
    assert job["spec"][key] == parent
    assert job["parent_id"] == (parent if key == "parent_id" else None)


def test_nothing_waits_for_a_job_that_has_failed(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    failed = api.submit()["id"]
    worker.claim().finish(JobStatus.failed)
    document = assert_problem(post(api, after=failed), 422, "invalid_input")
    assert [item["loc"] for item in document["errors"]] == ["after"]


# ---------------------------------------------------------------------------- how long it takes


@pytest.mark.parametrize(
    ("keys", "speed_key", "num_images"),
    [
        # digits has 1442 images of training and 355 of test
        ({"epochs": 3}, "train/resnet18/32/auto/1", 3 * 1442),
        ({"epochs": 2, "val_fraction": 0.25}, "train/resnet18/32/auto/1", 2 * 1081),
        ({"epochs": 2, "sanity_check": True}, "train/resnet18/32/auto/1", 2 * 256),
        (
            {
                "epochs": 1,
                "image_size": 64,
                "model": {"arch": "vgg11"},
                "resources": TWO_ON_THE_CPU,
            },
            "train/vgg11/64/cpu/2",
            1442,
        ),
    ],
)
def test_the_work_of_a_training_is_known_when_it_is_stored(
    api: Any, database: Any, keys: dict[str, Any], speed_key: str, num_images: int
) -> None:
    job = stored(database, api.submit(**keys))
    assert (job.speed_key, job.num_images) == (speed_key, num_images)


def test_the_work_of_an_evaluation_is_its_splits_images(
    api: Any, worker: Any, database: Any
) -> None:
    training = api.submit(image_size=64)["id"]
    worker.claim().checkpoint(5)
    job = stored(database, api.submit(kind="evaluate", model=training, split="train"))
    assert (job.speed_key, job.num_images) == ("evaluate/resnet18/64/auto/1", 1442)


def test_other_jobs_are_as_long_as_their_kind(api: Any, database: Any) -> None:
    dry_run = api.post("/jobs", params={"dry_run": True}, json={"dataset": "digits"}).json()
    ingest = api.post("/datasets", json={"source": "builtin", "name": "digits"}).json()
    for job, kind in ((dry_run, "dry_run"), (ingest, "ingest")):
        assert (stored(database, job).speed_key, stored(database, job).num_images) == (kind, None)


def test_no_speed_key_is_longer_than_its_column() -> None:
    resources = {"device": "cuda", "num_processes": 64}
    for arch in ARCHS:
        training = {"dataset": "d", "model": {"arch": arch}, "image_size": 1024}
        spec = EvaluateSpec.model_validate({"model": "m", "dataset": "d", "resources": resources})
        assert len(submission._speed_key(spec, TrainSpec.model_validate(training))) <= 64


def test_a_job_says_when_it_is_expected_to_start(api: Any, database: Any) -> None:
    with database.session_scope() as session:
        facts = repository.WorkerFacts("host", num_gpus=0, num_cores=2, num_slots=1, devices=())
        repository.see_worker(session, "w", facts)
    first = api.submit()
    assert first["estimated_start_at"] is not None, "a slot is free"
    second = api.submit()
    assert second["estimated_start_at"] is None, "nothing was measured yet"
