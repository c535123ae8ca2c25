from __future__ import annotations

import os
import signal
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from skipline.cli import app, demo
from skipline.specs import parse_request
from tests.skipline.replay import (
    TIME,
    Server,
    answer_json,
    job_document,
    point,
    report_document,
)


def test_the_demos_spec_is_valid() -> None:
    assert parse_request(demo.DEMO_SPEC).dataset == "digits"


def test_the_sample_is_a_held_out_digit_in_its_full_range_of_grey() -> None:
    image = Image.open(BytesIO(demo.held_out_digit(7)))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
    assert np.asarray(image).max() == 255


def serve_demo(server: Server, top1: float) -> None:
    """Job 1 trains, job 2 evaluates, and both have ended at the first look."""
    done = {"status": "succeeded", "attempt": 1, "started_at": TIME, "finished_at": TIME}
    evaluation = done | {"kind": "evaluate", "spec": {"dataset": "digits"}}
    jobs = {"1": job_document(id="1", **done), "2": job_document(id="2", **evaluation)}
    series = {"val_loss": [point(5, 0.1)], "val_top1": [point(5, 0.99)]}
    top = [{"label": "7", "index": 7, "probability": 0.98}]
    answers: dict[str, Any] = {
        "GET /readyz": {"status": "ready", "checks": {}},
        "GET /jobs/1": jobs["1"],
        "GET /jobs/2": jobs["2"],
        "GET /jobs/1/metrics": {
            "job_id": "1", "status": "succeeded", "series": series, "next": "2",
        },
        "GET /jobs/2/report": report_document() | {"top1": top1},
        "POST /predict": {
            "model": {"checkpoint_id": "c", "job_id": "1", "arch": "r", "epoch": 1, "step": 5},
            "predictions": [{"image": "0", "top": top, "confidence": 0.98}],
            "timing_ms": {},
        },
    }  # fmt: skip
    for route, document in answers.items():
        server.on(route, answer_json(document))
    kinds = {"train": "1", "evaluate": "2"}
    server.on("POST /jobs", lambda asked: answer_json(jobs[kinds[asked.json["kind"]]], 202))


@pytest.mark.parametrize(("top1", "code"), [(0.985, 0), (0.5, 1)])
def test_the_demo_goes_the_whole_way_and_judges_the_result(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top1: float, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    serve_demo(server, top1)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == code
    assert f"top-1 {top1:.1%}".replace("%", " %") in result.output
    assert f"{server.url}/docs" in result.output
    assert (tmp_path / "skipline-demo.png").read_bytes().startswith(b"\x89PNG")
    assert ("top-1 is 50.0 %, below 97.0 %" in result.stderr) == bool(code)


def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Lets the demo start a shell script in place of the service."""
    path = tmp_path / "service"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKIPLINE_API_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_service_that_does_not_start_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service(tmp_path, monkeypatch, "echo the home folder cannot be written; exit 1")
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "The service ended with exit code 1" in result.stderr
    assert "  the home folder cannot be written" in result.stderr


def test_an_interrupted_demo_leaves_no_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service writes its process id and then ends the demo with SIGTERM."""
    service(
        tmp_path,
        monkeypatch,
        f"echo $$ > pid.new; mv pid.new pid; kill -TERM {os.getpid()}; exec sleep 600",
    )
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 130
    assert "nothing is left running" in result.output
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before
