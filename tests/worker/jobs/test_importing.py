"""Models that come from another Skipline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared import repository
from shared.answers import predicting_model
from shared.tables import Job
from shared.vision.bundle import read_bundle
from shared.vision.portable import Portable, export
from skipline.schemas import JobStatus
from skipline.specs import ImportSpec
from tests.worker.jobs.conftest import NUM_TEST, Shop


@pytest.fixture
def trained(shop: Shop) -> str:
    job_id = shop.train(epochs=1)
    assert shop.attempt(job_id).status == JobStatus.succeeded
    return job_id


@pytest.fixture
def exported(shop: Shop, trained: str, tmp_path: Path) -> Path:
    """The model in a file."""
    with shop.database.read_scope() as session:
        checkpoint = repository.find_model(session, trained)
        model, _ = predicting_model(session, checkpoint)
        report = repository.own_report(session, checkpoint)
    bundle, weights = read_bundle(shop.storage.path(checkpoint.key))
    path = tmp_path / "model.safetensors"
    export(Portable(model=model, bundle=bundle, report=report), weights, "safetensors", path)
    return path


def take_in(shop: Shop, data: bytes) -> Job:
    spec = ImportSpec(upload_id=shop.upload("model.safetensors", data))
    with shop.database.session_scope() as session:
        job_id = repository.add_job(session, spec).id
    return shop.attempt(job_id)


def test_a_model_comes_in_with_its_weights_its_report_and_how_it_was_trained(
    shop: Shop, trained: str, exported: Path
) -> None:
    job = take_in(shop, exported.read_bytes())
    assert job.status == JobStatus.succeeded, job.error
    with shop.database.read_scope() as session:
        mine, theirs = (repository.find_model(session, name) for name in (job.id, trained))
        model, spec = predicting_model(session, mine)
        origin, trained_by = predicting_model(session, theirs)
    assert spec == trained_by
    assert (model.job_id, model.checkpoint_id) == (job.id, mine.id)
    here = {"job_id": job.id, "checkpoint_id": mine.id}
    assert model == origin.model_copy(update=here)
    report = shop.report(job.id)
    assert report == shop.report(trained).model_copy(update={"checkpoint_id": mine.id})
    assert job.result is not None
    assert (job.result["checkpoint_id"], job.result["top1"]) == (mine.id, report.top1)
    assert job.dataset_id == shop.job(trained).dataset_id
    _, weights = read_bundle(shop.storage.verify(mine.key))
    _, expected = read_bundle(shop.storage.path(theirs.key))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    assert list((shop.storage.root / "uploads").glob("*")) == []


def test_it_can_be_evaluated_and_asked_like_any_other(shop: Shop, exported: Path) -> None:
    job = take_in(shop, exported.read_bytes())
    evaluation = shop.attempt(shop.evaluate(job.id))
    assert evaluation.status == JobStatus.succeeded, evaluation.error
    assert shop.report(evaluation.id).confusion == shop.report(job.id).confusion
    batch = shop.attempt(shop.predict(job.id, dataset="squares", split="test"))
    assert batch.status == JobStatus.succeeded, batch.error
    assert batch.result is not None
    assert batch.result["num_images"] == 2 * NUM_TEST


def test_a_file_with_a_flipped_bit_is_refused_and_leaves_nothing(
    shop: Shop, exported: Path
) -> None:
    data = bytearray(exported.read_bytes())
    data[-5] ^= 4
    job = take_in(shop, bytes(data))
    assert job.status == JobStatus.failed
    assert job.error is not None
    assert job.error["code"] == "bad_model_file"
    assert "damaged" in job.error["message"]
    assert shop.checkpoints(job.id) == []
    assert shop.storage.keys(f"jobs/{job.id}") == []


def test_an_upload_that_is_gone_is_named(shop: Shop) -> None:
    with shop.database.session_scope() as session:
        job_id = repository.add_job(session, ImportSpec(upload_id="gone")).id
    job = shop.attempt(job_id)
    assert job.error is not None
    assert job.error["code"] == "upload_gone"
