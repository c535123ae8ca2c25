from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from skipline.cli import app, watch
from tests.skipline.replay import (
    DRY_RUN_RESULT,
    RECIPE,
    TIME,
    Answer,
    Asked,
    Server,
    answer_events,
    answer_json,
    answer_problem,
    attempt_document,
    dataset_document,
    event,
    event_document,
    job_document,
    metric_event,
    point,
    report_document,
    summary_document,
    worker_document,
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def replay(server: Server, *jobs: dict[str, Any], series: Sequence[dict[str, Any]] = ()) -> None:
    """Shows job-1 as it is at each look, then as it is last, and what is new in its series."""
    looks = list(jobs)
    news = list(series)

    def job(_: Asked) -> Answer:
        return answer_json(looks.pop(0) if len(looks) > 1 else looks[0])

    def metrics(_: Asked) -> Answer:
        new = news.pop(0) if news else {}
        return answer_json(
            {"job_id": "job-1", "status": "running", "series": new, "next": str(9 - len(news))}
        )

    server.on("GET /jobs/job-1", job)
    server.on("GET /jobs/job-1/metrics", metrics)


@pytest.fixture(autouse=True)
def _no_pause_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0)


def progress(step: int, epoch: int) -> dict[str, Any]:
    return {
        "step": step,
        "num_steps": 40,
        "epoch": epoch,
        "num_epochs": 2,
        "eta_seconds": 75.2,
        "images_per_second": 800.0,
    }


FAILURE = {"code": "nan_loss", "message": "The loss became NaN at step 3", "hint": "Lower the lr"}
SUCCEEDED = job_document(
    status="succeeded", attempt=1, started_at=TIME, finished_at="2026-11-01T12:01:05.000Z"
)


def test_train_sends_options_over_assignments_over_the_file(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("{dataset: cifar10, epochs: 9, optimizer: {lr: 0.2}}")
    server.on("POST /jobs", answer_json(job_document(queue_position=2), 202))
    result = run(
        "train", "--spec", str(path), "--dataset", "digits", "--arch", "resnet34",
        "--set", "optimizer.lr=1e-3", "--set", "tags=[a]",
    )  # fmt: skip
    assert result.exit_code == 0
    assert server.asked[0].json == {
        "kind": "train",
        "dataset": "digits",
        "epochs": 9,
        "optimizer": {"lr": 0.001},
        "model": {"arch": "resnet34"},
        "tags": ["a"],
    }
    assert "Job job-1 is queued, no. 2 in the queue." in result.output
    assert "skipline jobs watch job-1" in result.output


def test_a_recipe_needs_neither_dataset_nor_network(server: Server) -> None:
    server.on("POST /jobs", answer_json(job_document(), 202))
    assert run("train", "--recipe", "cifar10_resnet18").exit_code == 0
    assert run("train", "--recipe", "cifar10_resnet18", "--dataset", "own").exit_code == 0
    assert [asked.json for asked in server.asked] == [
        {"kind": "train", "recipe": "cifar10_resnet18"},
        {"kind": "train", "recipe": "cifar10_resnet18", "dataset": "own"},
    ]
    assert {str(asked.query) for asked in server.asked} == {"{}"}


def test_an_unknown_recipe_is_named_before_anything_is_sent(server: Server) -> None:
    result = run("train", "--recipe", "nothing", "--dataset", "digits")
    assert result.exit_code == 2
    assert server.asked == []
    assert "recipe  Unknown name; choose one of: cifar10_resnet18" in result.output


def test_the_recipes_are_listed(server: Server) -> None:
    page = {"items": [RECIPE], "next": None}
    server.on("GET /recipes", answer_json(page))
    lines = run("recipes").output.splitlines()
    assert lines[1].split(maxsplit=2) == ["pets_resnet18", "pets", "ResNet-18 on pets"]
    assert "skipline train --recipe NAME" in lines[-1]
    assert json.loads(run("recipes", "--json").stdout) == page


def test_a_dry_run_that_is_watched_prints_what_the_training_would_cost(server: Server) -> None:
    dry_run = SUCCEEDED | {"kind": "dry_run", "result": DRY_RUN_RESULT}
    server.on("POST /jobs", answer_json(job_document(kind="dry_run"), 202))
    replay(server, dry_run)
    result = run("train", "--dataset", "digits", "--dry-run", "--watch")
    assert result.exit_code == 0
    assert (server.asked[0].query, server.asked[0].json["kind"]) == ({"dry_run": "true"}, "train")
    rows = [line.split("  ", 1) for line in result.output.splitlines()[2:]]
    assert {key: value.strip() for key, value in rows} == {
        "num parameters": "11,173,962",
        "multiply adds": "555,422,720",
        "peak memory bytes": "3.0 GiB",
        "seconds per epoch": "1 min 15 s",
        "checkpoint bytes": "85.3 MiB",
        "images per second": "665",
        "device": "cpu",
        "precision": "bf16",
        "data path": "mapped",
    }


def test_a_dry_run_as_json_is_the_job(server: Server) -> None:
    document = job_document(kind="dry_run")
    server.on("POST /jobs", answer_json(document, 202))
    result = run("train", "--dataset", "digits", "--dry-run", "--json")
    assert json.loads(result.stdout) == document


def test_a_summary_is_a_row_a_layer_and_the_totals(server: Server) -> None:
    server.on("GET /jobs/job-1/summary", answer_json(summary_document()))
    rows = [line.split() for line in run("summary", "job-1").output.splitlines()]
    assert rows[1] == ["conv1", "Conv2d", "64", "x", "32", "x", "32", "1,728"]
    assert rows[2] == ["pool", "AvgPool2d", "64", "x", "1", "x", "1"]
    assert rows[3] == ["fc", "Linear", "10", "650"]
    assert rows[5:] == [
        ["parameters", "2,378"],
        ["of", "them", "frozen", "1,728"],
        ["multiply-adds", "1,770,112", "an", "image"],
        ["forward", "memory", "256.5", "KiB", "an", "image"],
    ]
    assert json.loads(run("summary", "job-1", "--json").stdout) == summary_document()


def test_a_wrong_value_is_named_before_anything_is_sent(server: Server) -> None:
    result = run("train", "--dataset", "digits", "--set", "optimizer.lr=0", "--set", "foo=1")
    assert result.exit_code == 2
    assert server.asked == []
    assert "optimizer.lr  Input should be greater than 0" in result.output
    assert "foo           Unknown key" in result.output


def test_what_the_server_refuses_is_shown_with_its_keys(server: Server) -> None:
    errors = [{"loc": "model.stem", "message": "It shrinks 16 px to nothing"}]
    server.on("POST /jobs", answer_problem(422, "invalid_spec", "Values are invalid", errors))
    result = run("train", "--dataset", "digits")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: Values are invalid\n  model.stem  It shrinks 16 px to nothing\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--arch"],
        ["train", "--dataset", "digits", "--set", "epochs"],
        ["train", "--spec", "missing.yaml"],
        ["predict", "missing.png", "--model", "m"],
        ["jobs", "ls", "--status", "asleep"],
        ["datasets", "add"],
        ["metrics", "job-1", "--csv", "--json"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_2(server: Server, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_server_that_is_away_exits_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPLINE_API_URL", "http://127.0.0.1:1")
    result = run("jobs")
    assert result.exit_code == 3
    assert "No Skipline server answers at http://127.0.0.1:1" in result.stderr
    assert "skipline up" in result.stderr


def test_a_refusal_that_is_no_wrong_input_exits_1(server: Server) -> None:
    server.on("POST /jobs/job-1/cancel", answer_problem(409, "illegal_transition", "It has ended"))
    result = run("jobs", "cancel", "job-1")
    assert result.exit_code == 1
    assert "error: It has ended" in result.stderr


def test_watching_prints_a_line_a_flush_and_a_line_an_epoch(server: Server) -> None:
    server.on("POST /jobs", answer_json(job_document(queue_position=1), 202))
    running = job_document(status="running", attempt=1)
    replay(
        server,
        job_document(queue_position=1),
        {**running, "progress": progress(10, 1)},
        {**running, "progress": progress(20, 1)},
        SUCCEEDED | {"progress": progress(40, 2)},
        series=[
            {},
            {"train_top1": [point(10, 0.5)], "train_loss": [point(10, 1.5)]},
            {"val_loss": [point(20, 0.7)], "val_top1": [point(20, 0.8)]},
            {"val_loss": [point(40, 0.6, epoch=2)], "val_top1": [point(40, 0.75, epoch=2)]},
        ],
    )
    result = run("train", "--dataset", "digits", "--watch")
    assert result.exit_code == 0
    assert result.output.splitlines()[:7] == [
        "Job job-1",
        "queued, no. 1 in the queue",
        "step 10/40  epoch 1/2  loss 1.5000  top-1 50.0 %  ETA 1 min 15 s",
        "epoch 1/2 done  val loss 0.7000  val top-1 80.0 %",
        "epoch 2/2 done  val loss 0.6000  val top-1 75.0 %",
        "✓ succeeded in 1 min 5 s   best top-1 80.0 % (epoch 1)",
        "  Classify: skipline predict IMAGE --model job-1",
    ]
    after = [asked.query.get("after") for asked in server.asked if "metrics" in asked.path]
    assert after == [None, "6", "7", "8"]


def test_a_job_that_fails_exits_1_and_says_why(server: Server) -> None:
    replay(server, job_document(status="failed", attempt=1, error=FAILURE))
    result = run("jobs", "watch", "job-1")
    assert result.exit_code == 1
    assert result.output.splitlines()[1:] == [
        "✗ failed",
        "  nan_loss: The loss became NaN at step 3",
        "  Lower the lr",
        "  Output:   skipline jobs logs job-1",
        "  Retry:    skipline jobs retry job-1",
    ]


def test_a_pause_ends_the_watch_and_says_how_to_resume(server: Server) -> None:
    running = job_document(status="running", attempt=1, progress=progress(10, 1))
    paused = {**running, "status": "paused"}
    replay(server, running, {**running, "status": "pausing"}, paused)
    result = run("jobs", "watch", "job-1")
    assert result.exit_code == 1
    assert result.output.splitlines()[1:] == [
        "pausing",
        "· paused",
        "  Resume:   skipline jobs resume job-1",
    ]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("user", "ended early, as asked"),
        ("early_stopping", "ended early, since it did not improve any more"),
        ("time_budget", "ended early, with its time used up"),
    ],
)
def test_an_early_end_is_told_with_its_reason(server: Server, reason: str, words: str) -> None:
    replay(server, SUCCEEDED | {"stop_reason": reason})
    result = run("jobs", "watch", "job-1")
    assert result.exit_code == 0
    assert f"✓ succeeded in 1 min 5 s, {words}" in result.output


def test_watching_follows_a_job_from_one_attempt_to_the_next(server: Server) -> None:
    """The first attempt is lost after epoch 2, the second begins again from epoch 1's end: the
    95 % that the lost one saw are void."""
    running = job_document(status="running", attempt=1, progress=progress(40, 2))
    queued = job_document(attempt=1, progress=progress(40, 2), queue_position=1)
    again = job_document(status="running", attempt=2, progress=progress(30, 2))
    replay(
        server,
        running,
        running,
        queued,
        again,
        SUCCEEDED | {"attempt": 2, "progress": progress(40, 2)},
        series=[
            {"val_loss": [point(20, 0.7)], "val_top1": [point(20, 0.8)]},
            {
                "val_loss": [point(40, 0.1, epoch=2)],
                "val_top1": [point(40, 0.95, epoch=2)],
            },
            {"train_loss": [point(30, 0.5, epoch=2)]},
            {
                "val_loss": [point(40, 0.6, epoch=2)],
                "val_top1": [point(40, 0.85, epoch=2)],
            },
        ],
    )
    result = run("jobs", "watch", "job-1")
    lines = result.output.splitlines()
    assert "queued again, no. 1 in the queue" in lines
    assert "attempt 2 takes over" in lines
    assert lines.index("queued again, no. 1 in the queue") < lines.index("attempt 2 takes over")
    assert "✓ succeeded in 1 min 5 s   best top-1 85.0 % (epoch 2)" in lines


def test_watching_outlasts_a_restart_of_the_server(server: Server) -> None:
    replay(server, job_document(), SUCCEEDED)
    whole = server.routes["GET /jobs/job-1/metrics"]
    answers = [Answer(b"", 502, "text/plain")]
    server.on("GET /jobs/job-1/metrics", lambda asked: answers.pop() if answers else whole(asked))
    result = run("jobs", "watch", "job-1")
    assert result.exit_code == 0
    assert "the server is away (a gateway says 502); trying again" in result.output


def test_detaching_leaves_the_job_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    replay(server, job_document())

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipline.cli.watch.time.sleep", interrupt)
    result = run("jobs", "watch", "job-1")
    assert result.exit_code == 130
    assert "the job goes on" in result.output
    assert {asked.method for asked in server.asked} == {"GET"}


def test_watching_as_json_writes_the_events_as_lines(server: Server) -> None:
    failed = job_document(status="failed", error=FAILURE)
    replay(server, job_document(), failed)
    server.on(
        "GET /jobs/job-1/metrics",
        answer_events(metric_event(7, 10, 1.5), event("end", 7, {"status": "failed"})),
    )
    result = run("jobs", "watch", "job-1", "--json")
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["event"], line["id"]) for line in lines] == [
        ("job", None),
        ("metric", 7),
        ("end", 7),
        ("job", None),
    ]
    assert lines[1]["data"]["value"] == 1.5
    assert lines[-1]["data"]["error"] == FAILURE


def test_an_evaluation_that_is_watched_prints_its_report(server: Server) -> None:
    done = SUCCEEDED | {"kind": "evaluate", "spec": {"dataset": "pets", "split": "test"}}
    server.on("POST /jobs", answer_json(job_document(kind="evaluate"), 202))
    replay(server, done)
    server.on("GET /jobs/job-1/report", answer_json(report_document()))
    result = run("evaluate", "--model", "job-0", "--dataset", "pets", "--watch")
    assert result.exit_code == 0
    assert server.asked[0].json == {"kind": "evaluate", "model": "job-0", "dataset": "pets"}
    rows = [line.split() for line in result.output.splitlines()]
    assert ["cat", "4", "75.0", "%", "100.0", "%", "87.5", "%"] in rows
    assert "1 x cat called dog" in result.output


def test_a_dataset_is_waited_for_and_named(server: Server, tmp_path: Path) -> None:
    done = SUCCEEDED | {
        "kind": "ingest",
        "spec": {"path": "/x"},
        "progress": progress(40, 1),
        "result": {"dataset_id": "d-1"},
    }
    server.on("POST /datasets", answer_json(job_document(kind="ingest"), 202))
    replay(server, done)
    server.on("GET /datasets/d-1", answer_json(dataset_document()))
    result = run("datasets", "add", str(tmp_path), "--name", "pets")
    assert result.exit_code == 0
    assert "leaked_images" in result.output
    assert server.asked[0].json == {"source": "path", "path": str(tmp_path), "name": "pets"}
    assert "Dataset d-1 is ready." in result.output


def test_jobs_are_listed_with_what_they_are_about(server: Server) -> None:
    jobs = [
        job_document(id="a", status="queued", queue_position=3),
        job_document(id="b", kind="ingest", spec={"path": "/photos"}, status="running"),
        job_document(id="c", name="[bold]mine", status="running", progress=progress(10, 1)),
    ]
    server.on("GET /jobs", answer_json({"items": jobs, "next": None}))
    lines = [line.rstrip() for line in run("jobs").output.splitlines()]
    assert lines[1].split()[:4] == ["a", "queued", "no.", "3"]
    assert lines[1].endswith("train: resnet18 on digits")
    assert lines[2].endswith("ingest: /photos")
    assert "25 %" in lines[3]
    assert lines[3].endswith("train: [bold]mine")
    assert "\x1b" not in "".join(lines)


def soon(seconds: float) -> str:
    """A time that far from now, as the server writes it."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def test_waiting_jobs_are_listed_with_when_they_start(server: Server) -> None:
    jobs = [
        job_document(id="a", queue_position=1, estimated_start_at=soon(0)),
        job_document(id="b", queue_position=2, estimated_start_at=soon(240)),
        job_document(id="c", spec=job_document()["spec"] | {"after": "b"}),
    ]
    server.on("GET /jobs", answer_json({"items": jobs, "next": None}))
    lines = run("jobs").output.splitlines()
    assert "queued  no. 1, any moment  " in lines[1]
    assert "queued    no. 2, in 4 min  " in lines[2]
    assert lines[3].split()[:3] == ["c", "queued", "waits"]


def test_a_new_job_is_told_when_it_starts_or_what_it_waits_for(server: Server) -> None:
    queued = job_document(queue_position=3, estimated_start_at=soon(7200))
    server.on("POST /jobs", answer_json(queued, 202))
    result = run("train", "--dataset", "digits", "--priority", "-2")
    assert "Job job-1 is queued, no. 3 in the queue, starts in 2 h." in result.output
    waiting = job_document(spec={"dataset": "digits", "after": "job-0"}, kind="evaluate")
    server.on("POST /jobs", answer_json(waiting, 202))
    result = run("evaluate", "-m", "job-0", "-d", "digits", "--after", "job-0", "--priority", "7")
    assert "Job job-1 is queued, waits for job job-0." in result.output
    assert [asked.json for asked in server.asked] == [
        {"kind": "train", "dataset": "digits", "priority": -2},
        {
            "kind": "evaluate",
            "model": "job-0",
            "dataset": "digits",
            "after": "job-0",
            "priority": 7,
        },
    ]
    assert run("train", "--dataset", "digits", "--priority", "11").exit_code == 2
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("action", "status", "hint"),
    [
        ("cancel", "cancelling", None),
        ("pause", "pausing", "Resume it:  skipline jobs resume job-1"),
        ("resume", "queued", "Watch it:  skipline jobs watch job-1"),
        ("stop", "stopping", "Watch it:  skipline jobs watch job-1"),
    ],
)
def test_an_action_tells_the_state_it_leads_to(
    server: Server, action: str, status: str, hint: str | None
) -> None:
    document = job_document(status=status)
    server.on(f"POST /jobs/job-1/{action}", answer_json(document))
    result = run("jobs", action, "job-1")
    assert result.exit_code == 0
    assert result.output.splitlines() == [f"Job job-1 is {status}."] + ([hint] if hint else [])
    assert json.loads(run("jobs", action, "job-1", "--json").stdout) == document


def test_a_retry_is_announced_or_watched(server: Server) -> None:
    new = job_document(id="job-1", parent_id="job-0", queue_position=1)
    server.on("POST /jobs/job-0/retry", answer_json(new, 202))
    replay(server, SUCCEEDED | {"parent_id": "job-0"})
    assert "Job job-1 is queued" in run("jobs", "retry", "job-0").output
    assert json.loads(run("jobs", "retry", "job-0", "--from-start", "--json").stdout) == new
    watched = run("jobs", "retry", "job-0", "--watch")
    assert watched.exit_code == 0
    assert "✓ succeeded" in watched.output
    posts = [asked.query for asked in server.asked if asked.method == "POST"]
    assert posts == [{}, {"from_start": "true"}, {}]


def test_several_jobs_are_deleted_and_each_refusal_is_told(server: Server) -> None:
    refusal = "The job is running: cancel it, then delete it"
    server.on("DELETE /jobs/a", Answer(b"", 204))
    server.on("DELETE /jobs/b", answer_problem(409, "illegal_transition", refusal))
    server.on("DELETE /jobs/c", Answer(b"", 204))
    result = run("jobs", "rm", "a", "b", "c")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["Job a is deleted.", "Job c is deleted."]
    assert result.stderr == f"error: b: {refusal}\n"
    as_json = run("jobs", "rm", "b", "c", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout) == {
        "deleted": ["c"],
        "refused": [{"id": "b", "code": "illegal_transition", "detail": refusal}],
    }
    assert run("jobs", "rm", "a", "c").exit_code == 0
    assert run("jobs", "rm").exit_code == 2


def test_a_deletion_stops_at_a_server_that_is_away(server: Server) -> None:
    server.on("DELETE /jobs/a", Answer(b"", 502, "text/plain"))
    assert run("jobs", "rm", "a", "b").exit_code == 3
    assert len(server.asked) == 1


def test_logs_are_printed_as_they_are(server: Server) -> None:
    text = "epoch [1] of 2\nKilled"
    server.on("GET /jobs/job-1/logs", Answer(text.encode(), 200, "text/plain; charset=utf-8"))
    assert run("jobs", "logs", "job-1").stdout == f"{text}\n"
    as_json = run("jobs", "logs", "job-1", "--attempt", "2", "--json")
    assert json.loads(as_json.stdout) == {"job_id": "job-1", "attempt": 2, "text": text}
    assert [asked.query for asked in server.asked] == [{}, {"attempt": "2"}]
    server.on("GET /jobs/job-1/logs", Answer(b"", 200, "text/plain; charset=utf-8"))
    nothing = run("jobs", "logs", "job-1")
    assert (nothing.stdout, nothing.exit_code) == ("", 0)
    assert nothing.stderr == "Its trainer has printed nothing.\n"
    assert run("jobs", "logs", "job-1", "--attempt", "0").exit_code == 2


def test_workers_are_listed_with_their_devices_and_who_uses_them(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {"items": [worker_document()], "next": None}
    server.on("GET /workers", answer_json(document))
    monkeypatch.setenv("COLUMNS", "120")  # How long ago it was seen is wider from day to day.
    rows = [line.rstrip() for line in run("workers").output.splitlines()]
    assert rows[0].split() == ["host", "status", "slots", "devices", "running", "seen"]
    assert rows[1].split()[:3] == ["alpha", "active", "1/2"]
    assert "CPU: AMD EPYC, 16 cores, 128.0 GiB" in rows[1]
    assert rows[1].split("128.0 GiB")[1].split()[0] == "job-1"
    assert rows[2].strip() == "GPU 0: NVIDIA H100, 80.0 GiB, free"
    assert rows[3].strip() == "GPU 1: NVIDIA H100, 80.0 GiB, job job-1"
    assert json.loads(run("workers", "--json").stdout) == document
    server.on("GET /workers", answer_json({"items": [], "next": None}))
    assert "Start one: skipline worker" in run("workers").output


def test_lists_are_printed_as_json_on_request(server: Server) -> None:
    server.on("GET /jobs", answer_json({"items": [job_document()], "next": None}))
    server.on("GET /datasets", answer_json({"items": [], "next": None, "builtin": []}))
    assert json.loads(run("jobs", "ls", "--json").stdout)["items"] == [job_document()]
    assert json.loads(run("datasets", "ls", "--json").stdout)["builtin"] == []


def test_a_job_is_shown_with_its_error_and_spec(server: Server) -> None:
    server.on("GET /jobs/job-1", answer_json(job_document(status="failed", error=FAILURE)))
    server.on("GET /jobs/job-1/checkpoints", answer_json({"items": [], "next": None}))
    odd = {"level": "warning", "type": "dataset_problems", "message": "The dataset is odd"}
    events = [event_document(1, **odd)]
    events += [event_document(number) for number in range(2, 10)]
    events.append(event_document(10, level="error", type="failed"))
    server.on("GET /jobs/job-1/events", answer_json({"items": events, "next": None}))
    output = run("jobs", "show", "job-1").output
    assert "nan_loss: The loss became NaN at step 3" in output
    assert "model: {arch: resnet18}" in output
    assert output.count("The dataset is odd") == 1  # though it happened long before
    last = [line.split()[-3:] for line in output.splitlines()[-8:]]
    assert last == [
        *(["created", "Event", str(number)] for number in range(3, 10)),
        ["failed", "Event", "10"],
    ]


def test_a_job_is_shown_with_where_it_comes_from_and_how_its_attempts_ended(
    server: Server,
) -> None:
    spec = job_document()["spec"] | {"priority": 3, "after": "job-9"}
    job = job_document(
        spec=spec, parent_id="job-0", attempt=2, queue_position=2, estimated_start_at=soon(240)
    )
    attempts = [
        attempt_document(1, gpus=[0, 2], outcome="lost", reason="Killed by signal 9"),
        attempt_document(2, host="beta", ended_at=soon(0), outcome="released", reason="Draining"),
    ]
    server.on("GET /jobs/job-1", answer_json(job))
    server.on("GET /jobs/job-1/attempts", answer_json({"items": attempts, "next": None}))
    for path in ("checkpoints", "events"):
        server.on(f"GET /jobs/job-1/{path}", answer_json({"items": [], "next": None}))
    rows = [line.split() for line in run("jobs", "show", "job-1").output.splitlines()]
    for row in (
        ["status", "queued", "no.", "2", "in", "the", "queue"],
        ["starts", "in", "4", "min"],
        ["priority", "3"],
        ["parent", "job-0"],
    ):
        assert row in rows
    first, second = rows[-2:]
    assert first[:4] == ["1", "alpha", "0,", "2"]
    assert " ".join(first).endswith("1 min 5 s lost Killed by signal 9")
    assert (second[:3], second[-2:]) == (["2", "beta", "-"], ["released", "Draining"])
    waiting = job_document(spec=spec)
    server.on("GET /jobs/job-1", answer_json(waiting))
    assert "queued  waits for job job-9" in run("jobs", "show", "job-1").output


def test_metrics_are_a_table_csv_json_or_a_picture(server: Server, tmp_path: Path) -> None:
    series = {"train_loss": [point(1, 2.0), point(2, 0.5)], "val_top1": [point(2, 0.9)]}
    document = {"job_id": "job-1", "status": "running", "series": series, "next": "3"}
    server.on("GET /jobs/job-1/metrics", answer_json(document))
    server.on("GET /jobs/job-1", answer_json(job_document()))
    table = [line.split() for line in run("metrics", "job-1").output.splitlines()]
    assert table[1] == ["train_loss", "0.5000", "0.5000", "2.0000", "2", "█▁"]
    assert table[2] == ["val_top1", *["90.0", "%"] * 3, "1", "▄"]
    rows = list(csv.reader(run("metrics", "job-1", "--csv").stdout.splitlines()))
    assert rows[1] == ["train_loss", "1", "1", "2.0", TIME]
    assert len(rows) == 4
    assert json.loads(run("metrics", "job-1", "--json").stdout) == document
    picture = tmp_path / "out.png"
    assert run("metrics", "job-1", "--plot", str(picture)).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_sample_images_are_written_as_the_server_sends_them(
    server: Server, tmp_path: Path
) -> None:
    document = {"job_id": "job-1", "status": "running", "series": {}, "next": None}
    server.on("GET /jobs/job-1/metrics", answer_json(document))
    server.on("GET /jobs/job-1/plots/samples.png", Answer(b"png", 200, "image/png"))
    picture = tmp_path / "out.png"
    result = run("metrics", "job-1", "--samples", str(picture))
    assert result.output == f"Wrote {picture}\n"
    assert picture.read_bytes() == b"png"
    refused = run("metrics", "job-1", "--samples", str(tmp_path / "missing" / "out.png"))
    assert refused.exit_code == 1
    assert "cannot be written" in refused.stderr


def test_predictions_are_listed_from_the_likeliest(server: Server, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"image")
    top = [
        {"label": "cat", "index": 0, "probability": 0.75},
        {"label": "dog", "index": 1, "probability": 0.25},
    ]
    model = {"checkpoint_id": "c", "job_id": "j", "arch": "resnet18", "epoch": 1, "step": 1}
    found: list[dict[str, Any]] = [{"image": "photo.png", "top": top, "confidence": 0.75}]
    server.on("POST /predict", answer_json({"model": model, "predictions": found, "timing_ms": {}}))
    lines = run("predict", str(photo), "--model", "j").output.splitlines()
    assert lines[0] == "photo.png"
    assert lines[1].split() == ["cat", "75.0", "%", "█" * 18]
    assert lines[2].split() == ["dog", "25.0", "%", "█" * 6]
    found[0]["unknown"] = True
    server.on("POST /predict", answer_json({"model": model, "predictions": found, "timing_ms": {}}))
    lines = run("predict", str(photo), "--model", "j").output.splitlines()
    assert lines[0] == "photo.png  unknown: less sure than right answers are"


def test_explanations_are_written_one_for_each_image(server: Server, tmp_path: Path) -> None:
    model = {"checkpoint_id": "c", "job_id": "j", "arch": "resnet18", "epoch": 1, "step": 1}
    top = [{"label": "cat", "index": 0, "probability": 0.75}]

    def predictions(*texts: bytes) -> dict[str, Any]:
        found = [
            {
                **{"image": f"{place}.png", "top": top, "confidence": 0.75},
                "explanation": base64.b64encode(text).decode(),
            }
            for place, text in enumerate(texts)
        ]
        return {"model": model, "predictions": found, "timing_ms": {}}

    photos = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for photo in photos:
        Path(photo).write_bytes(b"image")
    why = tmp_path / "why.png"
    server.on("POST /predict", answer_json(predictions(b"one")))
    assert run("predict", photos[0], "--explain", str(why)).exit_code == 0
    assert why.read_bytes() == b"one"
    assert b'name="explain"' in server.asked[0].body
    server.on("POST /predict", answer_json(predictions(b"one", b"two")))
    assert run("predict", *photos, "--explain", str(why)).exit_code == 0
    assert (tmp_path / "why-1.png").read_bytes() == b"one"
    assert (tmp_path / "why-2.png").read_bytes() == b"two"
