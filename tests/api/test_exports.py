"""`GET /models/{alias}/export`."""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from api import exporting
from shared.bundle_files import WEIGHTS_FILE
from shared.storage import MANIFEST, Storage
from shared.vision.portable import METADATA_KEY, read_portable
from tests.api.conftest import assert_problem

BIAS = [0.0] * 7 + [math.log(8.0), math.log(2.0), 0.0]
"""Of ten classes 7 is eight times, and 8 twice as likely as any other."""


@pytest.fixture(scope="module")
def settings(sqlite_settings: Any) -> Any:
    """One database is enough here."""
    return sqlite_settings


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are made on their way; in the end nothing is left there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def trained(api: Any, worker: Any) -> tuple[str, str]:
    """A training's id and the storage key of its checkpoint."""
    job = api.submit()
    attempt = worker.claim()
    key = attempt.checkpoint(10, bias=BIAS)
    attempt.finish()
    return str(job["id"]), key


def export(api: Any, model: str, **query: str) -> Any:
    return api.get(f"/models/{model}/export", params=query)


def test_an_alias_is_exported_with_its_weights_and_where_it_comes_from(
    api: Any, trained: tuple[str, str], tmp_path: Path, scratch: Path
) -> None:
    job_id, _ = trained
    promoted = api.put("/models/candidate", json={"checkpoint_id": job_id}).json()
    answer = export(api, "candidate")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    name = f'attachment; filename="resnet18-{promoted["checkpoint_id"]}.safetensors"'
    assert answer.headers["content-disposition"] == name
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert list(scratch.iterdir()) == []
    path = tmp_path / "model.safetensors"
    path.write_bytes(answer.content)
    portable, weights = read_portable(path)
    assert portable.model.checkpoint_id == promoted["checkpoint_id"]
    assert portable.model.job_id == job_id
    assert weights["fc.bias"].tolist() == pytest.approx(BIAS)


def test_a_job_is_exported_as_onnx_which_answers_as_predict_does(
    api: Any, trained: tuple[str, str], png: Any, tmp_path: Path
) -> None:
    job_id, _ = trained
    answer = export(api, job_id, format="onnx")
    assert answer.status_code == 200, answer.text
    session = onnxruntime.InferenceSession(answer.content)
    assert METADATA_KEY in session.get_modelmeta().custom_metadata_map
    [given] = session.get_inputs()
    image = np.zeros([1, *given.shape[1:]], np.uint8)
    [shares] = session.run(None, {"images": image})[0]
    top = api.predict([png()], model=job_id).json()["predictions"][0]["top"]
    for entry in top:
        assert shares[entry["index"]] == pytest.approx(entry["probability"], abs=1e-6)


def test_a_damaged_checkpoint_is_not_exported(
    api: Any, trained: tuple[str, str], settings: Any
) -> None:
    job_id, key = trained
    path = Storage(settings.artifacts_path).path(key) / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert_problem(export(api, job_id), 409, "checkpoint_corrupt")


def test_what_a_training_would_resume_from_may_be_damaged(
    api: Any, trained: tuple[str, str], settings: Any
) -> None:
    job_id, key = trained
    folder = Storage(settings.artifacts_path).path(key)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / "resume").write_bytes(b"")
    manifest["resume"] = {"sha256": "another", "num_bytes": 1}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert export(api, job_id).status_code == 200


def test_what_there_is_not_is_named(api: Any, trained: tuple[str, str]) -> None:
    job_id, _ = trained
    assert_problem(export(api, "nobody"), 404, "model_not_found")
    assert_problem(export(api, "\u2028"), 404, "model_not_found")
    document = assert_problem(export(api, job_id, format="caffe"), 422, "invalid_input")
    assert [error["loc"] for error in document["errors"]] == ["format"]


def test_without_the_packages_for_it_onnx_is_refused_with_what_to_install(
    api: Any, trained: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "onnxscript" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(exporting.importlib.util, "find_spec", without)
    document = assert_problem(export(api, trained[0], format="onnx"), 409, "export_not_possible")
    assert "pip install 'skipline[server,onnx]'" in document["detail"]


def test_a_process_that_fails_leaves_nothing_and_says_where_to_look(
    api: Any, trained: tuple[str, str], monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    monkeypatch.setattr(exporting.sys, "executable", "/bin/false")
    document = assert_problem(export(api, trained[0]), 409, "export_not_possible")
    assert "log" in document["detail"]
    assert list(scratch.iterdir()) == []


def test_a_second_export_at_the_same_time_is_turned_away(
    api: Any, trained: tuple[str, str], monkeypatch: pytest.MonkeyPatch, wait_for: Any
) -> None:
    begun, released = threading.Event(), threading.Event()
    write = exporting.Exporter._write

    async def held(self: Any, *rest: Any) -> None:
        import asyncio

        begun.set()
        while not released.is_set():
            await asyncio.sleep(0.01)
        await write(self, *rest)

    monkeypatch.setattr(exporting.Exporter, "_write", held)
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(export(api, trained[0])))
    first.start()
    try:
        assert begun.wait(20)
        second = export(api, trained[0])
        assert_problem(second, 429, "too_busy")
        assert int(second.headers["retry-after"]) > 0
    finally:
        released.set()
        first.join()
    assert answers[0].status_code == 200


def test_an_export_that_takes_too_long_is_ended(
    api: Any, trained: tuple[str, str], monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    monkeypatch.setattr("api.exports.MAX_SECONDS", 0.05)
    assert_problem(export(api, trained[0], format="onnx"), 504, "export_timeout")
    assert export_is_free(api, trained[0], monkeypatch)
    assert list(scratch.iterdir()) == []


def export_is_free(api: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The process that nobody waited for is gone, and another may begin."""
    monkeypatch.setattr("api.exports.MAX_SECONDS", 60.0)
    while (answer := export(api, model)).status_code == 429:
        pass
    return bool(answer.status_code == 200)
