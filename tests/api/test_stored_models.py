"""What a client means by a model, as `POST /predict` finds it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sqlalchemy import event

from api import examples
from api.stored_models import StoredModels
from shared.errors import ModelNotFound, NoCheckpointYet
from skipline.schemas import Report

BIAS = [0.0] * 7 + [math.log(8.0), 0.0, 0.0]


@pytest.fixture
def models(database: Any) -> StoredModels:
    return StoredModels(database)


@pytest.fixture
def statements(database: Any) -> Any:
    """What the database was asked from here on."""
    asked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("SELECT"):
            asked.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    yield asked
    event.remove(database.engine, "before_cursor_execute", note)


def report(attempt: Any, checkpoint_id: str, temperature: float) -> None:
    calibration = {**examples.REPORT["calibration"], "temperature": temperature}
    document = examples.REPORT | {"checkpoint_id": checkpoint_id, "calibration": calibration}
    attempt.report(Report.model_validate(document))


def test_a_model_that_is_trained_is_found_again_with_one_question(
    api: Any, worker: Any, models: StoredModels, statements: list[str]
) -> None:
    job = api.submit()
    attempt = worker.claim()
    attempt.checkpoint(10, bias=BIAS)
    [best, _] = sorted(
        api.get(f"/jobs/{job['id']}/checkpoints").json()["items"], key=lambda row: row["kind"]
    )
    # Until its training is over, nobody knows how its answers will be calibrated.
    assert models.find(best["id"]).document.temperature is None
    report(attempt, best["id"], 1.5)
    attempt.finish()
    assert models.find(best["id"]).document.temperature == 1.5
    api.put("/models/production", json={"checkpoint_id": best["id"]})
    statements.clear()
    found = models.find("production")
    assert (found.document.job_id, found.document.temperature) == (job["id"], 1.5)
    assert models.find(best["id"]) == found
    assert len(statements) == 2


def test_a_move_of_an_alias_holds_at_once(api: Any, worker: Any, models: StoredModels) -> None:
    ids = []
    for temperature in (1.5, 2.5):
        api.submit()
        attempt = worker.claim()
        attempt.checkpoint(10, bias=BIAS)
        own = {
            item["kind"]: item["id"]
            for item in api.get(f"/jobs/{attempt.fence.job_id}/checkpoints").json()["items"]
        }
        report(attempt, own["best"], temperature)
        attempt.finish()
        ids.append(own["best"])
    for checkpoint_id, temperature in ((ids[0], 1.5), (ids[1], 2.5), (ids[0], 1.5)):
        api.put("/models/production", json={"checkpoint_id": checkpoint_id})
        document = models.find("production").document
        assert (document.checkpoint_id, document.temperature) == (checkpoint_id, temperature)


def test_what_was_deleted_is_not_found_any_more(
    api: Any, worker: Any, models: StoredModels
) -> None:
    job = api.submit()
    attempt = worker.claim()
    attempt.checkpoint(10, bias=BIAS)
    checkpoint_id = api.get(f"/jobs/{job['id']}/checkpoints").json()["items"][0]["id"]
    report(attempt, checkpoint_id, 1.5)
    attempt.finish()
    models.find(checkpoint_id)
    assert api.delete(f"/jobs/{job['id']}").status_code == 204
    with pytest.raises(ModelNotFound):
        models.find(checkpoint_id)


def test_what_is_not_there_is_named(api: Any, models: StoredModels) -> None:
    for reference in ("nobody", "", "\0", "x" * 65):
        with pytest.raises(ModelNotFound):
            models.find(reference)
    with pytest.raises(NoCheckpointYet):
        models.find(api.submit()["id"])
