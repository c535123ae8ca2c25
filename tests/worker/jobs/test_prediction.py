"""Batch predictions."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared import repository, uploads
from shared.bundle_files import BUNDLE_FILE, WEIGHTS_FILE
from shared.tables import Upload
from shared.vision.bundle import read_bundle
from shared.vision.predictor import Predictor
from skipline.schemas import BatchPredictions, JobStatus
from tests.worker.jobs.conftest import IMAGE_SIZE, NUM_TEST, NUM_TRAIN, Shop, Supervised


def answered(shop: Shop, job_id: str) -> tuple[BatchPredictions, list[dict[str, str]]]:
    """As JSON and as CSV."""
    with shop.database.read_scope() as session:
        folder = shop.storage.path(repository.predictions_key(session, job_id))
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    document = (folder / "predictions.json").read_text(encoding="utf-8")
    return BatchPredictions.model_validate_json(document), rows


@pytest.fixture
def model(shop: Shop) -> str:
    job_id = shop.train(epochs=1)
    assert shop.attempt(job_id).status == JobStatus.succeeded
    return job_id


def test_every_image_of_every_split_is_answered_in_the_datasets_order(
    shop: Shop, model: str
) -> None:
    job = shop.attempt(shop.predict(model, dataset="squares"))
    assert job.status == JobStatus.succeeded, job.error
    document, _ = answered(shop, job.id)
    found = [(p.split, p.index, p.label) for p in document.predictions]
    # A split's images lie class by class.
    assert found == [
        (split, place, ("dark", "light")[place // count])
        for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST))
        for place in range(2 * count)
    ]
    assert job.result is not None
    assert job.result["num_images"] == len(found)
    assert (job.result["num_unreadable"], job.result["checkpoint_id"]) == (0, job.checkpoint_id)
    best = [prediction.top[0].label for prediction in document.predictions]
    assert job.result["counts"] == {label: best.count(label) for label in set(best)}


def test_the_answers_are_the_networks_own_calibrated(
    shop: Shop, model: str, tmp_path: Path
) -> None:
    job = shop.attempt(shop.predict(model, dataset="squares", split="test"))
    document, _ = answered(shop, job.id)
    calibration = shop.report(model).calibration
    assert calibration is not None
    assert document.model.temperature == calibration.temperature
    row = next(r for r in shop.checkpoints(model) if r.id == job.checkpoint_id)
    predictor = Predictor(*read_bundle(shop.storage.path(row.key)))
    for prediction in document.predictions[:: NUM_TEST // 2]:
        with Image.open(tmp_path / "squares" / prediction.image) as picture:
            pixels = np.asarray(picture)
        shares = predictor.predict(pixels[None])[0].astype(np.float64)
        powers = shares ** (1 / calibration.temperature)
        expected = powers / powers.sum()
        for top in prediction.top:
            assert top.probability == pytest.approx(expected[top.index], abs=1e-5)
        assert prediction.confidence == pytest.approx(expected.max(), abs=1e-5)
        assert calibration.reject_below is not None
        assert prediction.unknown is (prediction.confidence < calibration.reject_below)


def test_the_table_says_the_same_as_the_document(shop: Shop, model: str) -> None:
    job = shop.attempt(shop.predict(model, dataset="squares", split="test", top_k=1))
    document, rows = answered(shop, job.id)
    assert len(rows) == len(document.predictions) == 2 * NUM_TEST
    for row, prediction in zip(rows, document.predictions, strict=True):
        [top] = prediction.top
        assert row == {
            "image": prediction.image,
            "split": "test",
            "index": str(prediction.index),
            "label": prediction.label,
            "unknown": json.dumps(prediction.unknown),
            "error": "",
            "class_1": top.label,
            "probability_1": str(top.probability),
        }


def test_an_archive_may_hold_images_anywhere_and_one_that_is_none_fails_alone(
    shop: Shop, model: str, tmp_path: Path
) -> None:
    pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 90, np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    files = {"one.png": png.getvalue(), "b/c/d.png": png.getvalue(), "b/bad.png": b"no image"}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    upload_id = shop.upload("photos.tar", packed.getvalue())
    path = uploads.data_path(shop.storage.root, upload_id)
    assert path.exists()
    job = shop.attempt(shop.predict(model, upload_id=upload_id))
    assert job.status == JobStatus.succeeded, job.error
    document, rows = answered(shop, job.id)
    one, deep, bad = document.predictions
    assert [one.image, deep.image, bad.image] == list(files)
    assert one.top == deep.top
    assert len(one.top) == 2
    assert one.split is one.index is one.label is None
    assert (bad.top, bad.confidence, bad.unknown) == ([], None, None)
    assert bad.error is not None
    assert "Not an image" in bad.error
    assert rows[2]["error"] == bad.error
    assert rows[2]["class_1"] == rows[2]["unknown"] == ""
    assert job.result is not None
    assert (job.result["num_images"], job.result["num_unreadable"]) == (3, 1)
    # As for a dataset, of an upload that was read nothing is left.
    assert not path.exists()
    with shop.database.read_scope() as session:
        assert session.get(Upload, upload_id) is None


def test_an_attempt_that_broke_off_leaves_nothing_behind(shop: Shop, model: str) -> None:
    job_id = shop.predict(model, dataset="squares")
    crashed = shop.attempt(job_id, Supervised(crash_at=1))
    assert crashed.status == JobStatus.queued
    assert shop.attempt(job_id).status == JobStatus.succeeded
    assert shop.storage.keys(f"jobs/{job_id}") == [f"jobs/{job_id}/2/predictions"]
    document, _ = answered(shop, job_id)
    assert len(document.predictions) == 2 * (NUM_TRAIN + NUM_TEST)


@pytest.mark.parametrize("kind", ["predict", "evaluate"])
@pytest.mark.parametrize(
    ("file", "found", "other"),
    [(BUNDLE_FILE, b'"dark"', b'"dank"'), (WEIGHTS_FILE, None, None)],
    ids=["document", "weights"],
)
def test_a_model_of_which_a_byte_has_flipped_answers_nothing(
    shop: Shop, model: str, kind: str, file: str, found: bytes | None, other: bytes | None
) -> None:
    [best] = [row for row in shop.checkpoints(model) if row.kind == "best"]
    path = shop.storage.path(best.key) / file
    data = path.read_bytes()
    if found is None:
        data = data[:-1] + bytes([data[-1] ^ 1])
    else:
        assert data.count(found) == 1
        data = data.replace(found, other or b"")
    path.write_bytes(data)
    post = shop.predict if kind == "predict" else shop.evaluate
    job = shop.attempt(post(model, dataset="squares"))
    assert job.status == JobStatus.failed
    assert job.error is not None
    assert job.error["code"] == "checkpoint_corrupt"
    assert job.error["hint"]


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"dataset": "gone"}, "dataset_gone"),
        ({"dataset": "squares", "split": "val"}, "invalid_spec"),
        ({"upload_id": "gone"}, "upload_gone"),
    ],
)
def test_what_is_not_there_when_the_job_begins_is_named(
    shop: Shop, model: str, keys: dict[str, str], code: str
) -> None:
    job = shop.attempt(shop.predict(model, **keys))
    assert job.status == JobStatus.failed
    assert job.error is not None
    assert job.error["code"] == code
    assert job.error["hint"]
