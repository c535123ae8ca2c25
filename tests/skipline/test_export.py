"""`skipline models export` and `skipline models import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from api.examples import MODEL
from skipline import Skipline
from skipline.cli import app
from tests.skipline.replay import Answer, Server, answer_json, answer_problem, job_document

UPLOAD = {
    "id": "up-1",
    "file_name": "model.safetensors",
    "num_bytes": 9,
    "offset": 9,
    "created_at": "2026-11-27T10:00:00Z",
    "expires_at": "2026-11-28T10:00:00Z",
    "job_id": None,
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", *arguments])


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("m.onnx", "onnx"),
        ("m.safetensors", "safetensors"),
        ("m.pt", "torchscript"),
        ("M.PT2", "torch_export"),
    ],
)
def test_a_files_suffix_says_its_format(
    server: Server, tmp_path: Path, name: str, format: str
) -> None:
    server.on(
        "GET /models/production/export", Answer(b"a model", content_type="application/octet-stream")
    )
    result = run("export", str(tmp_path / name))
    assert result.exit_code == 0, result.output
    assert (tmp_path / name).read_bytes() == b"a model"
    assert [asked.query for asked in server.asked] == [{"format": format}]


def test_the_format_can_be_named_instead(server: Server, tmp_path: Path) -> None:
    server.on(
        "GET /models/job-1/export", Answer(b"a model", content_type="application/octet-stream")
    )
    path = tmp_path / "model.bin"
    assert run("export", str(path)).exit_code == 2
    assert server.asked == []
    result = run("export", str(path), "--model", "job-1", "--format", "onnx")
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == b"a model"


def test_of_an_export_that_is_refused_no_file_is_left(server: Server, tmp_path: Path) -> None:
    refusal = answer_problem(409, "export_not_possible", "The server lacks what writes ONNX")
    server.on("GET /models/production/export", refusal)
    result = run("export", str(tmp_path / "model.onnx"))
    assert result.exit_code == 1
    assert "lacks what writes ONNX" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def taking(server: Server, tmp_path: Path) -> Any:
    """A server that takes a model in, and the file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights {")
    server.on("POST /uploads", answer_json(UPLOAD, 201))
    server.on("GET /uploads/up-1", answer_json(UPLOAD))
    server.on("POST /jobs", answer_json(job_document(kind="import"), 202))
    server.on("GET /jobs/job-1", answer_json(job_document(kind="import", status="succeeded")))
    server.on("PUT /models/candidate", answer_json(MODEL | {"alias": "candidate"}))
    return server, path


def test_a_file_is_sent_taken_in_and_named(taking: Any) -> None:
    server, path = taking
    result = run("import", str(path), "--as", "candidate")
    assert result.exit_code == 0, result.output
    assert "candidate stands for the checkpoint" in " ".join(result.output.split())
    asked = [json.loads(a.body) for a in server.asked if a.path in ("/jobs", "/models/candidate")]
    assert asked == [{"kind": "import", "upload_id": "up-1"}, {"checkpoint_id": "job-1"}]


def test_as_json_it_is_the_job(taking: Any) -> None:
    _, path = taking
    result = run("import", str(path), "--json")
    assert json.loads(result.stdout)["status"] == "succeeded"


def test_a_model_that_is_refused_is_not_named(taking: Any) -> None:
    server, path = taking
    error = {"code": "bad_model_file", "message": "It is damaged", "hint": "Export it again"}
    failed = job_document(kind="import", status="failed", error=error)
    server.on("GET /jobs/job-1", answer_json(failed))
    result = run("import", str(path), "--as", "candidate")
    assert result.exit_code == 1
    assert "It is damaged" in result.output
    assert all(asked.path != "/models/candidate" for asked in server.asked)


def test_the_client_names_the_job_as_it_is_told(taking: Any) -> None:
    server, path = taking
    with Skipline(server.url) as client:
        client.import_model(path, name="from the lab")
    asked = json.loads(server.asked[-1].body)
    assert asked == {"kind": "import", "upload_id": "up-1", "name": "from the lab"}
