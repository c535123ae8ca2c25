from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from shared import repository
from shared.repository import NewPoint
from skipline import schemas
from skipline.schemas import JobStatus

WEIRD_IDS = ("nothing", "%00", "a%00b", "%F0%9F%92%A9", "x" * 300, "%ff", "'; --", "%20")


def test_a_submitted_job_is_stored_with_every_default_written_out(api: Any) -> None:
    response = api.post("/jobs", json={"dataset": "digits", "epochs": 8})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert api.get(response.headers["location"]).json() == job
    assert (job["kind"], job["status"], job["attempt"]) == ("train", "queued", 0)
    assert job["queue_position"] == 1
    assert job["created_at"].endswith("Z")
    assert job["spec"]["image_size"] == 32
    assert job["spec"]["optimizer"]["lr"] == 0.1
    assert job["spec"]["scheduler"] == {"name": "cosine", "warmup_epochs": 1.0, "min_lr": 0.0}
    schemas.Job.model_validate(job)


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ('{"dataset": "digits", "lr": 0.1}', "lr"),
        ('{"dataset": "digits", "optimizer": {"lr": NaN}}', "optimizer.lr"),
        ('{"dataset": "digits", "optimizer": {"lr": Infinity}}', "optimizer.lr"),
        ('{"dataset": "digits", "optimizer": {"lr": 1e999}}', "optimizer.lr"),
        ('{"dataset": "digits", "optimizer": {"lr": 0}}', "optimizer.lr"),
        (
            '{"dataset": "digits", "optimizer": {"name": "adam", "momentum": 0}}',
            "optimizer.momentum",
        ),
        ('{"dataset": "digits", "optimizer": {"name": "lion"}}', "optimizer.name"),
        ('{"dataset": "digits", "epochs": 0}', "epochs"),
        ('{"dataset": "digits", "epochs": 1000000000}', "epochs"),
        ('{"dataset": "digits", "epochs": 1e999}', "epochs"),
        ('{"dataset": "digits", "batch_size": -1}', "batch_size"),
        ('{"dataset": "digits", "model": {"arch": "resnet19"}}', "model.arch"),
        ('{"dataset": "digits", "model": {"arch": "vgg11"}, "image_size": 16}', "image_size"),
        ('{"dataset": "digits", "name": "a\\u0000b"}', "name"),
        ('{"dataset": "digits", "name": "' + "n" * 300 + '"}', "name"),
        ('{"dataset": "digits", "kind": "ingest"}', "kind"),
        ('{"recipe": "nothing", "dataset": "digits"}', "recipe"),
        ('{"recipe": "cifar10_resnet18", "epochs": 0}', "epochs"),
        ('{"recipe": "cifar10_resnet18", "dataset": "digits", "lr": 1}', "lr"),
        ("{}", "dataset"),
        ("[]", ""),
        ("null", ""),
    ],
)
def test_a_spec_that_cannot_work_is_refused_with_the_full_key(
    sqlite_api: Any, body: str, loc: str, assert_problem: Callable[..., Any]
) -> None:
    headers = {"Content-Type": "application/json"}
    response = sqlite_api.post("/jobs", content=body.encode(), headers=headers)
    document = assert_problem(response, 422, "invalid_spec")
    assert [item["loc"] for item in document["errors"]] == [loc]


def test_an_unknown_dataset_is_refused(api: Any, assert_problem: Callable[..., Any]) -> None:
    response = api.post("/jobs", json={"dataset": "nothing"})
    document = assert_problem(response, 422, "unknown_dataset")
    assert document["errors"][0]["loc"] == "dataset"
    assert api.get("/jobs").json()["items"] == []


@pytest.mark.parametrize("reference", ["two", "id-of-two"])
def test_a_stored_dataset_is_found_by_name_and_by_id(
    api: Any, worker: Any, database: Any, reference: str
) -> None:
    worker.add_dataset("two", ["a", "b"], train=10, val=4)
    job = api.submit(dataset=reference)
    with database.read_scope() as session:
        assert repository.get_job(session, job["id"]).dataset_id == "id-of-two"


def test_an_evaluation_keeps_the_checkpoint_that_was_best_when_it_was_asked_for(
    api: Any, worker: Any, database: Any
) -> None:
    training = api.submit()
    attempt = worker.claim()
    attempt.checkpoint(10)
    asked = {"kind": "evaluate", "model": training["id"], "dataset": "digits"}
    response = api.post("/jobs", json=asked)
    assert response.status_code == 202
    assert response.json()["spec"]["split"] == "test"
    attempt.checkpoint(20)
    checkpoints = api.get(f"/jobs/{training['id']}/checkpoints").json()["items"]
    [first] = [c for c in checkpoints if (c["kind"], c["step"]) == ("best", 10)]
    with database.read_scope() as session:
        assert repository.get_job(session, response.json()["id"]).checkpoint_id == first["id"]


def test_an_evaluation_needs_a_model_that_fits(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    def evaluate(model: str, dataset: str = "digits") -> Any:
        return api.post("/jobs", json={"kind": "evaluate", "model": model, "dataset": dataset})

    assert_problem(evaluate("nothing"), 404, "model_not_found")
    training = api.submit()
    assert_problem(evaluate(training["id"]), 409, "no_checkpoint_yet")
    attempt = worker.claim()
    attempt.checkpoint(10)
    worker.add_dataset("two", ["a", "b"], train=10, test=4)
    document = assert_problem(evaluate(training["id"], "two"), 422, "invalid_spec")
    assert document["errors"][0]["loc"] == "dataset"
    assert_problem(evaluate(training["id"], "nothing"), 422, "unknown_dataset")
    assert evaluate(training["id"]).status_code == 202


def test_the_list_is_newest_first_and_pages_do_not_overlap(
    api: Any, assert_problem: Callable[..., Any]
) -> None:
    ids = [api.submit(name=str(number))["id"] for number in range(5)]
    seen, after = [], None
    for expected in (2, 2, 1):
        query = {"limit": 2} | ({"after": after} if after else {})
        page = api.get("/jobs", params=query).json()
        assert len(page["items"]) == expected
        seen += [job["id"] for job in page["items"]]
        after = page["next"]
    assert after is None
    assert seen == ids[::-1]
    positions = [job["queue_position"] for job in api.get("/jobs").json()["items"]]
    assert positions == [5, 4, 3, 2, 1]
    for cursor in ("nothing", "\x00", "x" * 1000):
        refused = api.get("/jobs", params={"after": cursor})
        assert assert_problem(refused, 422, "invalid_input")["errors"][0]["loc"] == "after"


def test_the_list_can_be_narrowed(api: Any, assert_problem: Callable[..., Any]) -> None:
    first, second = api.submit(), api.submit()
    api.post(f"/jobs/{first['id']}/cancel")

    def ids(**query: str) -> list[str]:
        return [job["id"] for job in api.get("/jobs", params=query).json()["items"]]

    assert ids(status="cancelled") == [first["id"]]
    assert ids(status="queued", kind="train") == [second["id"]]
    assert ids(kind="evaluate") == []
    for query in (
        {"status": "asleep"},
        {"kind": "?"},
        {"limit": 0},
        {"limit": 1001},
        {"limit": "x"},
    ):
        document = assert_problem(api.get("/jobs", params=query), 422, "invalid_input")
        assert document["errors"][0]["loc"] == next(iter(query))


def test_a_job_that_does_not_exist_is_not_found(
    api: Any, assert_problem: Callable[..., Any]
) -> None:
    stream = {"Accept": "text/event-stream"}
    for job_id in WEIRD_IDS:
        for call in (
            "",
            "/metrics",
            "/checkpoints",
            "/report",
            "/summary",
            "/events",
            "/attempts",
            "/logs",
        ):
            assert_problem(api.get(f"/jobs/{job_id}{call}"), 404, "job_not_found")
        for action in ("cancel", "pause", "resume", "stop", "retry"):
            assert_problem(api.post(f"/jobs/{job_id}/{action}"), 404, "job_not_found")
        assert_problem(api.delete(f"/jobs/{job_id}"), 404, "job_not_found")
        for followed in ("metrics", "events"):
            answer = api.get(f"/jobs/{job_id}/{followed}", headers=stream)
            assert_problem(answer, 404, "job_not_found")


def test_a_waiting_job_is_cancelled_at_once_and_twice_is_once(api: Any) -> None:
    job = api.submit()
    for _ in range(2):
        response = api.post(f"/jobs/{job['id']}/cancel")
        assert response.status_code == 200
        assert response.json()["status"] == "cancelled"
        assert response.json()["queue_position"] is None


def test_a_running_job_is_asked_to_cancel(api: Any, worker: Any) -> None:
    job = api.submit()
    attempt = worker.claim()
    for _ in range(2):
        assert api.post(f"/jobs/{job['id']}/cancel").json()["status"] == "cancelling"
    attempt.finish(JobStatus.cancelled)
    assert api.get(f"/jobs/{job['id']}").json()["status"] == "cancelled"


def test_a_job_that_is_over_stays_as_it_is(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    job = api.submit()
    worker.claim().finish()
    before = api.get(f"/jobs/{job['id']}").json()
    assert_problem(api.post(f"/jobs/{job['id']}/cancel"), 409, "illegal_transition")
    assert api.get(f"/jobs/{job['id']}").json() == before


def test_progress_is_shown(api: Any, worker: Any) -> None:
    job = api.submit()
    progress = {"step": 3, "num_steps": 10, "epoch": 1, "num_epochs": 2, "eta_seconds": 1.5}
    worker.claim().write(NewPoint("lr", 3, 1, 0.1), progress=progress)
    shown = api.get(f"/jobs/{job['id']}").json()
    assert (shown["status"], shown["attempt"]) == ("running", 1)
    assert shown["progress"] == progress | {"images_per_second": None}


def test_a_full_queue_takes_no_more(
    settings: Any, database: Any, start_server: Any, assert_problem: Callable[..., Any]
) -> None:
    api = start_server(settings.model_copy(update={"max_queued_jobs": 2}))
    first = api.submit()
    api.submit()
    response = api.post("/jobs", json={"dataset": "digits"})
    assert_problem(response, 429, "too_many_jobs")
    assert int(response.headers["retry-after"]) > 0
    api.post(f"/jobs/{first['id']}/cancel")
    api.submit()


def test_the_bell_rings_once_the_job_is_stored(
    settings: Any,
    database: Any,
    broker_url: str | None,
    start_server: Any,
    wait_for: Callable[..., Any],
    tmp_path: Path,
) -> None:
    url = SecretStr(broker_url) if broker_url else None
    settings = settings.model_copy(update={"broker_url": url, "home": tmp_path})
    start_server(settings).submit()

    def messages() -> int:
        if broker_url is None:
            return len(list(Path(settings.home_path / "broker" / "messages").glob("*.msg")))
        with redis.Redis.from_url(broker_url) as client:
            return int(client.llen("skipline"))

    wait_for(messages, "message")
    assert messages() == 1


def test_a_job_is_accepted_while_the_broker_is_away(
    settings: Any, database: Any, start_server: Any
) -> None:
    url = SecretStr("redis://127.0.0.1:1/0")
    api = start_server(settings.model_copy(update={"broker_url": url}))
    assert api.get(f"/jobs/{api.submit()['id']}").json()["status"] == "queued"


def test_checkpoints_are_listed_newest_first(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    job = api.submit()
    assert api.get(f"/jobs/{job['id']}/checkpoints").json() == {"items": [], "next": None}
    attempt = worker.claim()
    attempt.checkpoint(10, "best")
    attempt.checkpoint(20, "last")
    page = api.get(f"/jobs/{job['id']}/checkpoints").json()
    assert [(c["kind"], c["step"]) for c in page["items"]] == [("last", 20), ("best", 10)]
    assert (page["items"][0]["num_bytes"], page["items"][0]["epoch"]) == (10, 1)
    first = api.get(f"/jobs/{job['id']}/checkpoints", params={"limit": 1}).json()
    assert first["items"] == page["items"][:1]
    query = {"limit": 1, "after": first["next"]}
    second = api.get(f"/jobs/{job['id']}/checkpoints", params=query).json()
    assert second == {"items": page["items"][1:], "next": None}
    refused = api.get(f"/jobs/{job['id']}/checkpoints", params={"after": "nothing"})
    assert_problem(refused, 422, "invalid_input")


def test_a_report_is_there_once_the_job_has_succeeded(
    api: Any, worker: Any, database: Any, assert_problem: Callable[..., Any]
) -> None:
    job = api.submit()
    assert_problem(api.get(f"/jobs/{job['id']}/report"), 404, "report_not_ready")
    report = schemas.Report(
        dataset="digits",
        dataset_id="d",
        split="test",
        selected_on="test",
        checkpoint_id="c",
        num_samples=2,
        loss=0.5,
        top1=0.5,
        top5=1.0,
        mean_class_accuracy=0.5,
        per_class=[
            schemas.ClassReport(
                label='cat, "big"', num_samples=2, accuracy=0.5, precision=1, recall=0.5, f1=0.75
            )
        ],
        confusion=[[1, 0], [1, 0]],
    )
    with database.session_scope() as session:
        repository.add_report(session, job["id"], report)
    worker.claim().finish()
    assert api.get(f"/jobs/{job['id']}/report").json() == report.model_dump(mode="json")
    table = api.get(f"/jobs/{job['id']}/report?format=csv")
    assert table.headers["content-type"].startswith("text/csv")
    header, row = csv.reader(table.text.splitlines())
    assert header[:3] == ["label", "num_samples", "accuracy"]
    assert row == ['cat, "big"', "2", "0.5", "1.0", "0.5", "0.75", "", ""]
    assert_problem(api.get(f"/jobs/{job['id']}/report?format=xml"), 422, "invalid_input")


def test_a_recipe_fills_the_spec_in_and_what_is_given_beside_it_wins(api: Any) -> None:
    response = api.post(
        "/jobs",
        json={"recipe": "cifar10_resnet18", "epochs": 30, "model": {"dropout": 0.5}},
    )
    assert response.status_code == 202
    spec = response.json()["spec"]
    assert (spec["recipe"], spec["dataset"], spec["epochs"]) == ("cifar10_resnet18", "cifar10", 30)
    assert (spec["batch_size"], spec["optimizer"]["weight_decay"]) == (256, 1e-4)
    assert spec["scheduler"]["name"] == "plateau"
    assert spec["model"] | {"dropout": 0.5, "stem": "small", "init": "torch"} == spec["model"]


def see(database: Any, worker_id: str, num_gpus: int) -> None:
    with database.session_scope() as session:
        facts = repository.WorkerFacts("host", num_gpus, num_cores=8, num_slots=1, devices=())
        repository.see_worker(session, worker_id, facts)


def test_what_no_worker_could_run_is_refused(
    api: Any, database: Any, assert_problem: Callable[..., Any]
) -> None:
    pair = {"dataset": "digits", "resources": {"device": "cuda", "num_processes": 2}}
    assert api.post("/jobs", json=pair).status_code == 202, "a job may be there first"
    see(database, "w1", num_gpus=1)
    document = assert_problem(api.post("/jobs", json=pair), 422, "invalid_spec")
    assert [item["loc"] for item in document["errors"]] == ["resources.num_processes"]
    see(database, "w2", num_gpus=2)
    job = api.post("/jobs", json=pair).json()
    with database.read_scope() as session:
        stored = repository.get_job(session, job["id"])
        assert (stored.device, stored.num_processes) == ("cuda", 2)


def starting_from(reference: str, **model: Any) -> dict[str, Any]:
    return {"dataset": "digits", "model": {"init_from": reference, **model}}


def test_a_training_that_starts_from_a_model_keeps_that_models_checkpoint(
    api: Any, worker: Any, database: Any
) -> None:
    training = api.submit()
    attempt = worker.claim()
    attempt.checkpoint(10)
    job = api.post("/jobs", json=starting_from(training["id"])).json()
    checkpoints = api.get(f"/jobs/{training['id']}/checkpoints").json()["items"]
    [best] = [c["id"] for c in checkpoints if c["kind"] == "best"]
    assert job["spec"]["model"]["init_from"] == best
    attempt.checkpoint(20)
    with database.session_scope() as session:
        assert repository.get_job(session, job["id"]).checkpoint_id == best
        assert repository.retire_checkpoints(session, training["id"], {"best": 1}) == []
        assert repository.find_model(session, best).step == 10
    again = api.post("/jobs", json=starting_from(best)).json()
    assert again["spec"]["model"]["init_from"] == best


def test_a_training_starts_only_from_a_model_that_fits(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    def refused(body: dict[str, Any], code: str = "invalid_spec") -> None:
        document = assert_problem(api.post("/jobs", json=body), 422, code)
        assert [item["loc"] for item in document["errors"]] == ["model.init_from"]

    refused(starting_from("nothing"), "model_not_found")
    training = api.submit()
    no_checkpoint = api.post("/jobs", json=starting_from(training["id"]))
    assert_problem(no_checkpoint, 409, "no_checkpoint_yet")
    worker.claim().checkpoint(10)
    refused(starting_from(training["id"], arch="resnet34"))
    refused(starting_from(training["id"], stem="imagenet"))
    refused(starting_from(training["id"]) | {"image_size": 96})
    for fitting in (
        starting_from(training["id"], stem="small"),
        starting_from(training["id"], stem="small") | {"image_size": 96},
        starting_from("imagenet", stem="imagenet"),
    ):
        assert api.post("/jobs", json=fitting).status_code == 202


def test_a_vgg_has_no_stem_that_could_differ(api: Any, worker: Any) -> None:
    training = api.submit(model={"arch": "vgg11"})
    worker.claim().checkpoint(10)
    body = starting_from(training["id"], arch="vgg11") | {"image_size": 96}
    assert api.post("/jobs", json=body).status_code == 202


def test_a_dry_run_is_a_job_of_its_own_kind_with_the_spec_of_a_training(
    api: Any, assert_problem: Callable[..., Any]
) -> None:
    response = api.post("/jobs", params={"dry_run": True}, json={"dataset": "digits"})
    assert response.status_code == 202
    job = response.json()
    assert (job["kind"], job["spec"]["kind"], job["spec"]["image_size"]) == ("dry_run", "train", 32)
    assert api.get("/jobs", params={"kind": "dry_run"}).json()["items"] == [job]
    assert api.get("/jobs", params={"kind": "train"}).json()["items"] == []
    plain = api.post("/jobs", params={"dry_run": False}, json={"dataset": "digits"})
    assert plain.json()["kind"] == "train"
    evaluation = {"kind": "evaluate", "model": "m", "dataset": "digits"}
    refused = api.post("/jobs", params={"dry_run": True}, json=evaluation)
    document = assert_problem(refused, 422, "invalid_input")
    assert [item["loc"] for item in document["errors"]] == ["dry_run"]


def test_the_summary_is_there_once_the_worker_wrote_it(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    job = api.submit()
    attempt = worker.claim()
    assert_problem(api.get(f"/jobs/{job['id']}/summary"), 404, "summary_not_ready")
    layer = {"name": "fc", "type": "Linear", "output_shape": [10], "num_parameters": 5130}
    document = {
        "layers": [layer],
        "num_parameters": 5130,
        "num_trainable_parameters": 0,
        "multiply_adds": 5120,
        "forward_bytes": 40,
    }
    attempt.summarise(schemas.Summary.model_validate(document))
    assert api.get(f"/jobs/{job['id']}/summary").json() == document


def test_events_are_numbered_and_go_on_after_a_number(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    job = api.submit()
    attempt = worker.claim()
    attempt.event("info", "runtime", "Runs on cpu", device="cpu")
    attempt.event("warning", "stalled", "No progress")
    url = f"/jobs/{job['id']}/events"
    page = api.get(url).json()
    assert [(event["id"], event["type"], event["level"]) for event in page["items"]] == [
        (1, "created", "info"),
        (2, "started", "info"),
        (3, "runtime", "info"),
        (4, "stalled", "warning"),
    ]
    assert page["items"][2]["data"] == {"device": "cpu"}
    assert page["items"][0]["time"].endswith("Z")
    assert page["next"] is None
    first = api.get(url, params={"limit": 2}).json()
    assert (first["items"], first["next"]) == (page["items"][:2], "2")
    rest = api.get(url, params={"limit": 2, "after": first["next"]}).json()
    assert (rest["items"], rest["next"]) == (page["items"][2:], None)
    for cursor in ("nothing", "-1", "1" * 30, ""):
        refused = api.get(url, params={"after": cursor})
        assert assert_problem(refused, 422, "invalid_input")["errors"][0]["loc"] == "after"
