from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skipline import ServerUnreachable, Skipline, SkiplineError
from skipline.schemas import EndEvent, Event, Job, JobKind, JobStatus, MetricEvent, RewindEvent
from skipline.specs import AdamW, TrainSpec
from tests.skipline.replay import (
    RECIPE,
    TIME,
    Answer,
    Asked,
    Server,
    answer_events,
    answer_json,
    answer_problem,
    attempt_document,
    event,
    event_document,
    job_document,
    metric_event,
    report_document,
    summary_document,
    worker_document,
)

METRICS = "GET /jobs/job-1/metrics"
LOST = Answer(lost=True)


@pytest.fixture
def refused_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def in_turn(*answers: Answer) -> Any:
    left = list(answers)
    return lambda _asked: left.pop(0)


def test_keyword_arguments_become_a_training_request(server: Server) -> None:
    server.on("POST /jobs", answer_json(job_document(), 202))
    with Skipline() as client:
        job = client.train({"dataset": "digits", "epochs": 9}, epochs=2)
    assert job.status is JobStatus.queued
    assert server.asked[0].json == {"kind": "train", "dataset": "digits", "epochs": 2}


def test_a_spec_is_sent_as_it_was_written_with_the_names_of_its_variants(server: Server) -> None:
    server.on("POST /jobs", answer_json(job_document(), 202))
    with Skipline() as client:
        client.train(TrainSpec(dataset="digits", optimizer=AdamW(lr=0.01)))
    assert server.asked[0].json == {
        "kind": "train",
        "dataset": "digits",
        "optimizer": {"name": "adamw", "lr": 0.01},
    }


def test_a_recipe_is_enough_for_a_training(server: Server) -> None:
    server.on("POST /jobs", answer_json(job_document(), 202))
    with Skipline() as client:
        client.train(recipe="cifar10_resnet18")
        client.train({"recipe": "cifar10_resnet18"}, epochs=3)
    assert [asked.json for asked in server.asked] == [
        {"kind": "train", "recipe": "cifar10_resnet18"},
        {"kind": "train", "recipe": "cifar10_resnet18", "epochs": 3},
    ]
    assert server.asked[0].query == {}


def test_a_dry_run_takes_what_a_training_takes(server: Server) -> None:
    server.on("POST /jobs", answer_json(job_document(kind="dry_run"), 202))
    with Skipline() as client:
        assert client.dry_run(TrainSpec(dataset="digits"), epochs=3).kind is JobKind.dry_run
    assert server.asked[0].query == {"dry_run": "true"}
    assert server.asked[0].json == {"kind": "train", "dataset": "digits", "epochs": 3}


def test_the_key_is_sent_as_a_bearer_token(server: Server) -> None:
    server.on("GET /jobs/job-1", answer_json(job_document()))
    with Skipline(api_key="secret") as client:
        client.job("job-1")
    assert server.asked[0].headers["authorization"] == "Bearer secret"


def test_settings_are_read_from_a_dotenv_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SKIPLINE_API_URL")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"SKIPLINE_API_URL={server.url}/\nSKIPLINE_API_KEY=k\n")
    server.on("GET /jobs/job-1", answer_json(job_document()))
    with Skipline() as client:
        assert client.url == server.url
        client.job("job-1")
    assert server.asked[0].headers["authorization"] == "Bearer k"


def test_a_jobs_id_cannot_reach_another_route(server: Server) -> None:
    with Skipline() as client, pytest.raises(SkiplineError, match="There is no such thing"):
        client.job("../datasets?x=1")
    assert server.asked[0].path == "/jobs/..%2Fdatasets%3Fx%3D1"


def test_a_list_is_followed_to_its_last_page(server: Server) -> None:
    pages = {None: (["a", "b"], "b"), "b": (["c"], None)}

    def answer(asked: Asked) -> Answer:
        ids, following = pages[asked.query.get("after")]
        return answer_json({"items": [job_document(id=name) for name in ids], "next": following})

    server.on("GET /jobs", answer)
    with Skipline() as client:
        assert [job.id for job in client.jobs(status="queued")] == ["a", "b", "c"]
        assert [job.id for job in client.jobs(limit=1)] == ["a"]
    assert server.asked[0].query == {"status": "queued", "limit": "100"}
    assert server.asked[-1].query == {"limit": "1"}


def test_a_problem_document_becomes_an_error_with_its_keys(server: Server) -> None:
    errors = [{"loc": "optimizer.lr", "message": "Input should be greater than 0"}]
    server.on("POST /jobs", answer_problem(422, "invalid_input", "Values are invalid", errors))
    with Skipline() as client, pytest.raises(SkiplineError) as caught:
        client.train(dataset="digits", optimizer={"lr": 0})
    assert (caught.value.code, caught.value.status) == ("invalid_input", 422)
    assert caught.value.errors[0].loc == "optimizer.lr"
    assert str(caught.value) == "Values are invalid; optimizer.lr: Input should be greater than 0"


@pytest.mark.parametrize("status", [200, 404])
def test_an_answer_of_another_server_is_named_as_such(server: Server, status: int) -> None:
    server.on("GET /jobs/job-1", Answer(b"<h1>It works!</h1>", status, "text/html"))
    with Skipline() as client, pytest.raises(SkiplineError, match="not Skipline's") as caught:
        client.job("job-1")
    assert caught.value.code == "unexpected_answer"


def test_a_server_that_is_away_is_named_with_what_to_do(refused_url: str) -> None:
    with Skipline(refused_url) as client, pytest.raises(ServerUnreachable) as caught:
        client.job("job-1")
    assert refused_url in str(caught.value)
    assert "skipline up" in str(caught.value)
    assert "SKIPLINE_API_URL" in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port"])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(SkiplineError, match="is no address of a server"):
        Skipline(url)


def test_a_cut_stream_is_taken_up_without_a_lost_or_doubled_point(server: Server) -> None:
    """The first connection breaks within its third event, the second ends early between two."""
    points = [metric_event(number, number * 10, number / 10) for number in range(1, 7)]
    end = event("end", 6, {"status": "succeeded"})
    server.on(
        METRICS,
        in_turn(
            answer_events(points[0], points[1], points[2][:30], cut=True),
            answer_events(points[2], points[3]),
            answer_events(points[4], points[5], end),
        ),
    )
    with Skipline() as client:
        events = list(client.stream_metrics("job-1"))
    assert [item.id for item in events] == [1, 2, 3, 4, 5, 6, 6]
    assert [item.step for item in events if isinstance(item, MetricEvent)] == [
        10, 20, 30, 40, 50, 60,
    ]  # fmt: skip
    assert events[-1] == EndEvent(status=JobStatus.succeeded, id=6)
    resumed_after = [asked.headers.get("last-event-id") for asked in server.asked]
    assert resumed_after == [None, "2", "4"]
    assert {asked.headers["accept"] for asked in server.asked} == {"text/event-stream"}


def test_a_stream_can_start_after_a_number_and_passes_rewinds_on(server: Server) -> None:
    server.on(
        METRICS,
        answer_events(
            event("rewind", 9, {"step": 40, "attempt": 2}),
            ": keep-alive\n\n",
            event("novelty", None, {"what": "of a newer server"}),
            event("end", None, {"status": "failed"}),
        ),
    )
    with Skipline() as client:
        events = list(client.stream_metrics("job-1", last_event_id=8))
    assert server.asked[0].headers["last-event-id"] == "8"
    assert events == [
        RewindEvent(step=40, attempt=2, id=9),
        EndEvent(status=JobStatus.failed, id=9),
    ]


def test_a_stream_gives_up_when_its_patience_has_run_out(server: Server) -> None:
    server.on(METRICS, answer_events())
    with Skipline(patience=0.3) as client, pytest.raises(ServerUnreachable, match="ended early"):
        list(client.stream_metrics("job-1"))
    assert len(server.asked) >= 2


def test_a_cut_stream_of_events_is_taken_up_like_one_of_metrics(server: Server) -> None:
    happened = [event("event", number, event_document(number)) for number in (1, 2, 3)]
    server.on(
        "GET /jobs/job-1/events",
        in_turn(
            answer_events(happened[0], happened[1][:20], cut=True),
            answer_events(*happened[1:], event("end", None, {"status": "cancelled"})),
        ),
    )
    with Skipline() as client:
        events = list(client.stream_events("job-1"))
    assert [item.message for item in events if isinstance(item, Event)] == [
        "Event 1", "Event 2", "Event 3",
    ]  # fmt: skip
    assert events[-1] == EndEvent(status=JobStatus.cancelled, id=3)
    assert [asked.headers.get("last-event-id") for asked in server.asked] == [None, "1"]


def test_a_stream_of_an_unknown_job_is_refused_at_once(server: Server) -> None:
    with Skipline() as client, pytest.raises(SkiplineError, match="no such thing"):
        list(client.stream_metrics("job-1"))
    assert len(server.asked) == 1


def test_waiting_outlasts_a_gateway_without_its_server(server: Server) -> None:
    server.on(
        "GET /jobs/job-1",
        in_turn(
            answer_json(job_document(status="running")),
            Answer(b"bad gateway", 502, "text/plain"),
            answer_json(job_document(status="succeeded")),
        ),
    )
    with Skipline() as client:
        assert client.wait("job-1").status is JobStatus.succeeded


def test_a_relative_path_of_a_dataset_is_made_absolute(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.on("POST /datasets", answer_json(job_document(kind="ingest"), 202))
    with Skipline() as client:
        client.add_dataset("photos/../pets", val_fraction=0.2)
        client.add_dataset(builtin="cifar10")
        with pytest.raises(ValueError, match="either path or builtin"):
            client.add_dataset("pets", builtin="cifar10")
    assert server.asked[0].json == {
        "source": "path",
        "path": str(tmp_path / "pets"),
        "val_fraction": 0.2,
    }
    assert server.asked[1].json == {"source": "builtin", "name": "cifar10"}


def test_images_are_sent_by_path_and_as_bytes(server: Server, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"first")
    model = {"checkpoint_id": "c", "job_id": "j", "arch": "resnet18", "epoch": 1, "step": 1}
    server.on("POST /predict", answer_json({"model": model, "predictions": [], "timing_ms": {}}))
    with Skipline() as client:
        client.predict([photo, b"second"], model="job-1", top_k=2)
    body = server.asked[0].body
    for part in (
        b'name="image"; filename="photo.png"',
        b"first",
        b'name="image"; filename="1"',
        b"second",
        b'name="model"\r\n\r\njob-1',
        b'name="top_k"\r\n\r\n2',
    ):
        assert part in body


def test_readiness_is_told_also_when_it_is_missing(server: Server) -> None:
    checks = {"database": "ok", "broker": "refused"}
    server.on("GET /readyz", answer_json({"status": "not_ready", "checks": checks}, 503))
    with Skipline() as client:
        assert client.ready().checks["broker"] == "refused"


def test_reports_checkpoints_datasets_and_architectures_are_typed(server: Server) -> None:
    checkpoint = {
        "id": "c", "kind": "best", "epoch": 1, "step": 9, "metrics": {"val_top1": 0.5},
        "num_bytes": 100, "created_at": TIME,
    }  # fmt: skip
    arch = {
        "name": "resnet18", "family": "resnet", "depth": 18, "batch_norm": True,
        "min_image_size": {"small": 8}, "description": "ResNet-18",
    }  # fmt: skip
    server.on("GET /jobs/job-1/report", answer_json(report_document()))
    server.on("GET /jobs/job-1/checkpoints", answer_json({"items": [checkpoint], "next": None}))
    server.on("GET /datasets", answer_json({"items": [], "next": None, "builtin": []}))
    server.on("GET /architectures", answer_json({"items": [arch], "next": None}))
    with Skipline() as client:
        assert client.report("job-1").confusion == [[3, 1], [0, 4]]
        assert client.checkpoints("job-1")[0].metrics["val_top1"] == 0.5
        assert client.datasets().items == []
        assert client.architectures()[0].min_image_size == {"small": 8}


def test_summaries_recipes_and_pictures_are_typed(server: Server) -> None:
    server.on("GET /jobs/job-1/summary", answer_json(summary_document()))
    server.on("GET /recipes", answer_json({"items": [RECIPE], "next": None}))
    server.on("GET /jobs/job-1/plots/loss.png", Answer(b"png", 200, "image/png"))
    server.on("GET /jobs/job-1/plots/lr.png", Answer(b"<h1>", 200, "text/html"))
    with Skipline() as client:
        assert client.summary("job-1").layers[0].output_shape == [64, 32, 32]
        assert client.recipes()[0].spec["epochs"] == 3
        assert client.plot("job-1", "loss") == b"png"
        with pytest.raises(SkiplineError, match="not Skipline's"):
            client.plot("job-1", "lr")
        with pytest.raises(SkiplineError, match="no such thing"):
            client.plot("job-1", "nothing")


def test_events_are_followed_to_the_last_page(server: Server) -> None:
    server.on(
        "GET /jobs/job-1/events",
        in_turn(
            answer_json({"items": [event_document(1), event_document(2)], "next": "2"}),
            answer_json({"items": [event_document(3, level="warning")], "next": None}),
        ),
    )
    with Skipline() as client:
        events = client.events("job-1")
    assert [(event.id, event.level) for event in events] == [
        (1, "info"),
        (2, "info"),
        (3, "warning"),
    ]
    assert server.asked[1].query["after"] == "2"


POSTING: dict[str, Callable[[Skipline], Job]] = {
    "train": lambda client: client.train(dataset="digits"),
    "dry_run": lambda client: client.dry_run(dataset="digits"),
    "evaluate": lambda client: client.evaluate("job-0", "digits"),
    "submit": lambda client: client.submit({"dataset": "digits"}),
    "add_dataset": lambda client: client.add_dataset(builtin="digits"),
    "retry": lambda client: client.retry("job-0", from_start=True),
}
WITH_KEY: dict[str, Callable[[Skipline], Job]] = {
    "train": lambda client: client.train(dataset="digits", idempotency_key="mine"),
    "dry_run": lambda client: client.dry_run(dataset="digits", idempotency_key="mine"),
    "evaluate": lambda client: client.evaluate("job-0", "digits", idempotency_key="mine"),
    "submit": lambda client: client.submit({"dataset": "digits"}, idempotency_key="mine"),
    "add_dataset": lambda client: client.add_dataset(builtin="digits", idempotency_key="mine"),
    "retry": lambda client: client.retry("job-0", idempotency_key="mine"),
}


def on_every_posting(server: Server, answer: Callable[[Asked], Answer] | Answer) -> None:
    for path in ("/jobs", "/datasets", "/jobs/job-0/retry"):
        server.on(f"POST {path}", answer)


@pytest.mark.parametrize("name", POSTING)
def test_a_lost_answer_makes_no_second_job(server: Server, name: str) -> None:
    """What is sent again has the key of the first time; another call has a key of its own."""
    made: dict[str, int] = {}

    def answer(asked: Asked) -> Answer:
        key = asked.headers["idempotency-key"]
        made[key] = made.get(key, 0) + 1
        return LOST if made[key] == 1 else answer_json(job_document(id=key), 202)

    on_every_posting(server, answer)
    with Skipline() as client:
        first = POSTING[name](client)
        second = POSTING[name](client)
    assert made == {first.id: 2, second.id: 2}
    assert server.asked[0].body == server.asked[1].body
    assert server.asked[0].query == server.asked[1].query


@pytest.mark.parametrize("name", WITH_KEY)
def test_a_given_key_is_sent(server: Server, name: str) -> None:
    on_every_posting(server, answer_json(job_document(), 202))
    with Skipline() as client:
        WITH_KEY[name](client)
    assert [asked.headers["idempotency-key"] for asked in server.asked] == ["mine"]
    assert b"mine" not in server.asked[0].body


def test_a_new_job_is_given_up_when_the_patience_has_run_out(server: Server) -> None:
    server.on("POST /jobs", LOST)
    with Skipline(patience=0.3) as client, pytest.raises(ServerUnreachable):
        client.train(dataset="digits")
    assert len(server.asked) >= 2


def test_a_new_job_waits_for_no_server_that_was_never_there(refused_url: str) -> None:
    began = time.monotonic()
    with Skipline(refused_url, patience=60) as client, pytest.raises(ServerUnreachable):
        client.train(dataset="digits")
    assert time.monotonic() - began < 10


def test_a_refused_job_is_not_sent_again(server: Server) -> None:
    server.on("POST /jobs", answer_problem(409, "idempotency_mismatch", "Another request"))
    with Skipline() as client, pytest.raises(SkiplineError) as caught:
        client.train(dataset="digits", idempotency_key="mine")
    assert caught.value.code == "idempotency_mismatch"
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("action", "status"),
    [
        ("cancel", "cancelling"),
        ("pause", "pausing"),
        ("resume", "queued"),
        ("stop", "stopping"),
    ],
)
def test_an_action_returns_the_job_as_it_is_then(server: Server, action: str, status: str) -> None:
    server.on(f"POST /jobs/job-1/{action}", answer_json(job_document(status=status)))
    with Skipline() as client:
        job: Job = getattr(client, action)("job-1")
    assert job.status == status


def test_a_retry_is_a_new_job_from_the_last_checkpoint_or_from_the_start(server: Server) -> None:
    server.on("POST /jobs/job-0/retry", answer_json(job_document(parent_id="job-0"), 202))
    with Skipline() as client:
        assert client.retry("job-0").parent_id == "job-0"
        client.retry("job-0", from_start=True)
    assert [asked.query for asked in server.asked] == [{}, {"from_start": "true"}]


def test_a_deletion_is_done_or_refused(server: Server) -> None:
    server.on("DELETE /jobs/job-1", Answer(b"", 204))
    server.on("DELETE /jobs/job-2", answer_problem(409, "in_use", "The job job-3 waits for it"))
    with Skipline() as client:
        client.delete("job-1")
        with pytest.raises(SkiplineError, match="job-3 waits") as caught:
            client.delete("job-2")
    assert (caught.value.code, caught.value.status) == ("in_use", 409)


def test_attempts_logs_and_workers_are_typed(server: Server) -> None:
    attempts = [attempt_document(1, outcome="lost", reason="killed"), attempt_document(2)]
    server.on("GET /jobs/job-1/attempts", answer_json({"items": attempts, "next": None}))
    text = Answer("épilogue\n".encode(), 200, "text/plain; charset=utf-8")
    server.on("GET /jobs/job-1/logs", text)
    server.on("GET /jobs/job-2/logs", Answer(b"<h1>", 200, "text/html"))
    server.on("GET /workers", answer_json({"items": [worker_document()], "next": None}))
    with Skipline() as client:
        assert [attempt.outcome for attempt in client.attempts("job-1")] == ["lost", "succeeded"]
        assert client.logs("job-1") == "épilogue\n"
        client.logs("job-1", attempt=2)
        with pytest.raises(SkiplineError, match="not Skipline's"):
            client.logs("job-2")
        (worker,) = client.workers()
    assert [asked.query for asked in server.asked[1:3]] == [{}, {"attempt": "2"}]
    assert [device.job_id for device in worker.devices] == [None, None, "job-1"]
