"""Jobs of kind `predict`: how they are posted, and how their answers are read."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pytest

from api import examples
from shared import lifecycle, repository
from shared.storage import Storage
from skipline.schemas import JobStatus
from tests.api.conftest import assert_problem


@pytest.fixture
def model(api: Any, worker: Any) -> str:
    """A training that is over, with a checkpoint."""
    job = api.submit()
    attempt = worker.claim()
    attempt.checkpoint(10)
    attempt.finish()
    return str(job["id"])


INVALID = "invalid_spec"


def post(api: Any, **keys: Any) -> Any:
    return api.post("/jobs", json={"kind": "predict", **keys})


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("one.png")
        tar.addfile(member, io.BytesIO(b""))
    return file.getvalue()


def send(api: Any, data: bytes) -> str:
    location: str = api.post("/uploads", headers={"Upload-Length": str(len(data))}).headers[
        "location"
    ]
    headers = {"Content-Type": "application/offset+octet-stream", "Upload-Offset": "0"}
    assert api.patch(location, content=data, headers=headers).status_code == 204
    return location.removeprefix("/uploads/")


def test_a_stored_prediction_names_its_model_and_its_images(
    api: Any, worker: Any, model: str
) -> None:
    answer = post(api, model=model, dataset="digits", split="test", top_k=3)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["kind"] == "predict"
    spec = job["spec"]
    named = (spec["model"], spec["dataset"], spec["split"], spec["top_k"], spec["upload_id"])
    assert named == (model, "digits", "test", 3, None)
    # It holds the model's checkpoint as long as it is not over.
    assert_problem(api.delete(f"/jobs/{model}"), 409, "in_use")


def test_production_is_asked_unless_another_model_is_named(api: Any, model: str) -> None:
    assert_problem(post(api, dataset="digits"), 404, "model_not_found")
    api.put("/models/production", json={"checkpoint_id": model})
    assert post(api, dataset="digits").json()["spec"]["model"] == "production"


@pytest.mark.parametrize(
    ("keys", "loc", "code"),
    [
        ({}, "", INVALID),
        ({"dataset": "digits", "upload_id": "u"}, "", INVALID),
        ({"upload_id": "u", "split": "test"}, "", INVALID),
        ({"dataset": "digits", "top_k": 0}, "top_k", INVALID),
        ({"dataset": "digits", "batch_size": 3}, "batch_size", INVALID),
        ({"dataset": "digits", "split": "val"}, "split", INVALID),
        (
            {"dataset": "digits", "resources": {"num_processes": 2}},
            "resources.num_processes",
            INVALID,
        ),
        ({"upload_id": "gone"}, "upload_id", "invalid_input"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key(
    api: Any, model: str, keys: dict[str, Any], loc: str, code: str
) -> None:
    document = assert_problem(post(api, model=model, **keys), 422, code)
    assert [error["loc"] for error in document["errors"]] == [loc]


def test_an_upload_is_kept_for_the_job_that_reads_it(api: Any, model: str) -> None:
    upload_id = send(api, archive())
    job = post(api, model=model, upload_id=upload_id).json()
    assert api.get(f"/uploads/{upload_id}").json()["job_id"] == job["id"]
    answer = api.delete(f"/uploads/{upload_id}")
    assert_problem(answer, 409, "in_use")


def test_an_upload_that_is_no_archive_is_refused(api: Any, model: str) -> None:
    upload_id = send(api, b"these are no images")
    assert_problem(post(api, model=model, upload_id=upload_id), 422, "bad_archive")


def test_the_answers_can_be_read_once_the_job_has_succeeded_and_go_with_it(
    api: Any, worker: Any, model: str, settings: Any, wait_for: Any
) -> None:
    job_id = post(api, model=model, dataset="digits", split="test").json()["id"]
    url = f"/jobs/{job_id}/predictions"
    assert_problem(api.get(url), 404, "predictions_not_ready")
    attempt = worker.claim()
    storage = Storage(settings.artifacts_path)
    key = f"jobs/{job_id}/1/predictions"
    files = {"json": '{"model": "as it was written"}', "csv": examples.BATCH_CSV}
    with storage.writing(key, "owner") as folder:
        for suffix, text in files.items():
            (folder / f"predictions.{suffix}").write_text(text, newline="")
    with attempt.worker.database.session_scope() as session:
        repository.add_predictions(session, attempt.fence, key)
        lifecycle.finish(session, attempt.fence, JobStatus.succeeded, result={})
    as_json, as_csv = api.get(url), api.get(url, params={"format": "csv"})
    assert as_json.headers["content-type"] == "application/json"
    assert as_csv.headers["content-type"].startswith("text/csv")
    assert (as_json.text, as_csv.text) == (files["json"], files["csv"])
    folder = storage.path(key)
    (folder / "predictions.csv").unlink()
    assert_problem(api.get(url, params={"format": "csv"}), 404, "predictions_not_ready")
    assert_problem(api.get(url, params={"format": "xml"}), 422, "invalid_input")
    assert api.delete(f"/jobs/{job_id}").status_code == 204
    wait_for(lambda: not folder.exists(), "deletion of the files")
    assert_problem(api.get(url), 404, "job_not_found")


def test_a_job_of_another_kind_has_no_answers(api: Any, model: str) -> None:
    document = assert_problem(api.get(f"/jobs/{model}/predictions"), 404, "predictions_not_ready")
    assert "of kind train" in document["detail"]
