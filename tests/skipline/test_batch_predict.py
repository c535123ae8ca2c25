"""`skipline batch-predict` and `skipline jobs predictions`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from api.examples import BATCH_CSV, BATCH_PREDICTIONS
from skipline import Skipline
from skipline.cli import app
from skipline.client import SkiplineError
from tests.skipline.replay import Answer, Server, answer_json, answer_problem, job_document


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def done(**changes: Any) -> dict[str, Any]:
    return job_document(kind="predict", status="succeeded", result={"num_images": 1}, **changes)


@pytest.fixture
def predicting(server: Server) -> Server:
    """It takes a batch prediction, which is over at once."""
    server.on("POST /jobs", answer_json(job_document(kind="predict"), 202))
    server.on("GET /jobs/job-1", answer_json(done()))
    return server


def test_the_job_is_told_and_how_to_follow_it(predicting: Server) -> None:
    result = run("batch-predict", "--dataset", "digits", "--split", "test", "-k", "2")
    assert result.exit_code == 0, result.output
    assert "skipline jobs watch job-1" in result.output
    [asked] = predicting.asked
    assert json.loads(asked.body) == {
        "kind": "predict",
        "model": "production",
        "dataset": "digits",
        "split": "test",
        "top_k": 2,
    }


def test_the_answers_are_written_in_the_files_format(predicting: Server, tmp_path: Path) -> None:
    table, document = tmp_path / "out.csv", tmp_path / "out.json"
    answer = Answer(BATCH_CSV.encode(), content_type="text/csv; charset=utf-8")
    predicting.on("GET /jobs/job-1/predictions", answer)
    result = run("batch-predict", "--dataset", "digits", "--output", str(table), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["status"] == "succeeded"
    assert table.read_bytes() == BATCH_CSV.encode()
    predicting.on("GET /jobs/job-1/predictions", answer_json(BATCH_PREDICTIONS))
    result = run("jobs", "predictions", "job-1", str(document))
    assert result.exit_code == 0, result.output
    assert json.loads(document.read_text()) == BATCH_PREDICTIONS
    asked = [a.query for a in predicting.asked if a.path.endswith("predictions")]
    assert asked == [{"format": "csv"}, {"format": "json"}]


def test_of_answers_that_are_refused_no_file_is_left(server: Server, tmp_path: Path) -> None:
    server.on(
        "GET /jobs/job-1/predictions", answer_problem(404, "predictions_not_ready", "Not yet")
    )
    with Skipline(server.url) as client, pytest.raises(SkiplineError) as caught:
        client.save_predictions("job-1", tmp_path / "out.csv")
    assert caught.value.code == "predictions_not_ready"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("jobs", "predictions", "job-1"), ("models", "export")])
@pytest.mark.parametrize("place", ["nowhere/out.onnx", "file/out.onnx", "folder.onnx"])
def test_a_file_that_cannot_be_written_is_one_sentence(
    server: Server, tmp_path: Path, command: tuple[str, ...], place: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    server.on("GET /jobs/job-1/predictions", answer_json(BATCH_PREDICTIONS))
    model = Answer(b"a model", content_type="application/octet-stream")
    server.on("GET /models/production/export", model)
    result = run(*command, str(tmp_path / place))
    assert result.exit_code == 1, result.output
    assert f"{place} cannot be written" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.onnx"}


def test_a_folder_is_sent_first(predicting: Server, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(b"an image")
    upload = {
        "id": "up-1",
        "file_name": "photos.tar",
        "num_bytes": 10240,
        "offset": 10240,
        "created_at": "2026-11-27T10:00:00Z",
        "expires_at": "2026-11-28T10:00:00Z",
        "job_id": None,
    }
    predicting.on("POST /uploads", answer_json(upload, 201))
    predicting.on("GET /uploads/up-1", answer_json(upload))
    result = run("batch-predict", str(tmp_path / "photos"), "--model", "candidate")
    assert result.exit_code == 0, result.output
    asked = json.loads(predicting.asked[-1].body)
    assert asked == {"kind": "predict", "model": "candidate", "upload_id": "up-1"}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--dataset", "digits", "."),
        ("--dataset", "digits", "--output", "nowhere/out.csv"),
        ("--dataset", "digits", "--top-k", "0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_sent(
    server: Server, arguments: tuple[str, ...]
) -> None:
    assert run("batch-predict", *arguments).exit_code == 2
    assert server.asked == []


def test_a_key_that_is_wrong_is_named_before_anything_is_sent(server: Server) -> None:
    result = run("batch-predict", "--dataset", "digits", "--set", "colour=red")
    assert result.exit_code == 2
    assert "colour" in result.output
    assert server.asked == []


def test_the_client_reads_the_answers(server: Server) -> None:
    server.on("GET /jobs/job-1/predictions", answer_json(BATCH_PREDICTIONS))
    with Skipline(server.url) as client:
        [prediction] = client.predictions("job-1").predictions
    assert (prediction.image, prediction.top[0].label) == ("test/7/0003.png", "7")


def test_the_client_takes_one_source(server: Server) -> None:
    with Skipline(server.url) as client:
        for sources in ({}, {"source": ".", "dataset": "digits"}):
            with pytest.raises(ValueError, match="either source or dataset"):
                client.predict_all(**sources)
    assert server.asked == []
