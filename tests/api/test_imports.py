"""Jobs of kind `import`: how they are posted, and what is refused at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared import lifecycle, repository
from skipline.schemas import JobStatus
from skipline.specs import dump_spec, load_spec
from tests.api.conftest import assert_problem

HEADER = json.dumps({"__metadata__": {}}).encode()
MODEL_FILE = len(HEADER).to_bytes(8, "little") + HEADER


def uploaded(api: Any, data: bytes) -> str:
    headers = {"Upload-Length": str(len(data))}
    location: str = api.post("/uploads", headers=headers).headers["location"]
    part = {"Content-Type": "application/offset+octet-stream", "Upload-Offset": "0"}
    assert api.patch(location, content=data, headers=part).status_code == 204
    return location.removeprefix("/uploads/")


def post(api: Any, upload_id: str) -> Any:
    return api.post("/jobs", json={"kind": "import", "upload_id": upload_id})


def test_an_import_keeps_its_upload_until_it_is_read(api: Any) -> None:
    upload_id = uploaded(api, MODEL_FILE)
    answer = post(api, upload_id)
    assert answer.status_code == 202, answer.text
    assert (answer.json()["kind"], answer.json()["spec"]["upload_id"]) == ("import", upload_id)
    assert_problem(api.delete(f"/uploads/{upload_id}"), 409, "in_use")


@pytest.mark.parametrize("data", [b"PK\3\4 an archive", MODEL_FILE[:4], b"\xff" * 8 + b"{"])
def test_a_file_that_cannot_be_a_model_is_refused_at_once(api: Any, data: bytes) -> None:
    assert_problem(post(api, uploaded(api, data)), 422, "bad_model_file")


def test_an_upload_that_is_not_there_is_named(api: Any) -> None:
    document = assert_problem(post(api, "gone"), 422, "invalid_input")
    assert [error["loc"] for error in document["errors"]] == ["upload_id"]


def test_a_model_whose_dataset_is_elsewhere_can_be_named_judged_and_gone_on_from(
    api: Any, worker: Any
) -> None:
    """What its training was is in the job's result; here it was a training of digits."""
    training = load_spec(api.submit()["spec"])
    worker.claim().finish()
    job_id = post(api, uploaded(api, MODEL_FILE)).json()["id"]
    attempt = worker.claim()
    with worker.database.session_scope() as session:
        repository.register_checkpoint(
            session,
            attempt.fence,
            kinds=["best"],
            key=f"jobs/{job_id}/1/10",
            epoch=1,
            step=10,
            metrics={},
            num_bytes=10,
        )
        result = {"trained": dump_spec(training)}
        lifecycle.finish(session, attempt.fence, JobStatus.succeeded, result=result)
    model = api.put("/models/production", json={"checkpoint_id": job_id}).json()
    assert (model["arch"], model["dataset"], model["dataset_id"]) == ("resnet18", "digits", None)
    card = api.get("/models/production/card")
    assert card.status_code == 200
    assert "resnet18" in card.text
    # Which classes it has, the worker finds in the model.
    pets = worker.add_dataset("pets", ("cat", "dog"), train=8, test=4)
    for request in (
        {"kind": "evaluate", "model": job_id, "dataset": pets},
        {"kind": "predict", "model": job_id, "dataset": pets},
        {"dataset": "digits", "model": {"init_from": job_id}},
    ):
        answer = api.post("/jobs", json=request)
        assert answer.status_code == 202, answer.text
    refused = api.put("/models/candidate?require=top1>=0.5", json={"checkpoint_id": job_id})
    assert_problem(refused, 422, "invalid_input")
