from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from skipline import ServerUnreachable, Skipline, SkiplineError
from skipline.schemas import EndEvent, JobKind, JobStatus, MetricEvent, RewindEvent
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
    event,
    event_document,
    job_document,
    metric_event,
    report_document,
    summary_document,
)

METRICS = "GET /jobs/job-1/metrics"


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
