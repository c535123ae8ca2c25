"""A model has to prove something before an alias stands for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from skipline import schemas

CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture
def pets(api: Any, worker: Any) -> str:
    """The id of a dataset with all three splits."""
    return str(worker.add_dataset("pets", CLASSES, train=100, val=20, test=20))


def report(
    checkpoint_id: str,
    dataset_id: str,
    split: str,
    top1: float,
    lowest: float = 0.5,
    loss: float = 0.25,
) -> schemas.Report:
    """With accuracies of `lowest` and 1 in two classes, and a third one without images."""
    per_class = [
        schemas.ClassReport(
            label=label, num_samples=number, accuracy=accuracy, precision=1, recall=accuracy, f1=1
        )
        for label, number, accuracy in (("0", 10, lowest), ("1", 10, 1.0), ("2", 0, 0.0))
    ]
    return schemas.Report(
        dataset="pets",
        dataset_id=dataset_id,
        split=split,  # type: ignore[arg-type]
        checkpoint_id=checkpoint_id,
        num_samples=20,
        loss=loss,
        top1=top1,
        top5=1.0,
        mean_class_accuracy=0.75,
        per_class=per_class,
        confusion=[[1, 0], [1, 0]],
    )


def trained(api: Any, worker: Any, dataset_id: str, top1: float, **figures: float) -> str:
    """A checkpoint whose training ended with a report on the split `test`."""
    job_id = api.submit(dataset=dataset_id)["id"]
    attempt = worker.claim()
    attempt.checkpoint(1, "best")
    [checkpoint] = api.get(f"/jobs/{job_id}/checkpoints").json()["items"]
    checkpoint_id: str = checkpoint["id"]
    attempt.finish(report=report(checkpoint_id, dataset_id, "test", top1, **figures))
    return checkpoint_id


def evaluated(
    api: Any, worker: Any, checkpoint_id: str, dataset_id: str, split: str, top1: float
) -> None:
    api.submit(kind="evaluate", model=checkpoint_id, dataset=dataset_id, split=split)
    worker.claim().finish(report=report(checkpoint_id, dataset_id, split, top1))


def promote(api: Any, checkpoint_id: str, alias: str = "production", **asked: str) -> Any:
    return api.put(f"/models/{alias}", json={"checkpoint_id": checkpoint_id}, params=asked)


def failing(document: Mapping[str, Any]) -> dict[str, str]:
    return {error["loc"]: error["message"] for error in document["errors"]}


def test_a_model_that_keeps_every_floor_is_promoted(api: Any, worker: Any, pets: str) -> None:
    checkpoint_id = trained(api, worker, pets, 0.9)
    asked = "top1>=0.9, top5>=1,mean_class_accuracy>=0.75,min_class_accuracy>=0.5,loss<=0.25"
    response = promote(api, checkpoint_id, require=asked)
    assert response.status_code == 200, response.text
    assert response.json()["checkpoint_id"] == checkpoint_id


def test_the_floors_that_fail_are_named_and_the_alias_stays(
    api: Any, worker: Any, pets: str, assert_problem: Callable[..., Any]
) -> None:
    first = trained(api, worker, pets, 0.95, lowest=0.9)
    second = trained(api, worker, pets, 0.92, lowest=0.75)
    assert promote(api, first).status_code == 200
    asked = "top1>=0.93,top5>=0.9,min_class_accuracy>=0.8,ece<=0.05"
    document = assert_problem(promote(api, second, require=asked), 409, "promotion_refused")
    assert failing(document) == {
        "top1": "It is 0.92 on pets/test; top1 >= 0.93 is required",
        "min_class_accuracy": "It is 0.75 on pets/test; min_class_accuracy >= 0.8 is required",
        "ece": "It is unknown on pets/test; ece <= 0.05 is required",
    }
    model = api.get("/models/production").json()
    assert (model["checkpoint_id"], model["number"]) == (first, 1)


def test_a_model_must_be_no_worse_than_the_one_it_replaces(
    api: Any, worker: Any, pets: str, assert_problem: Callable[..., Any]
) -> None:
    first = trained(api, worker, pets, 0.9, loss=0.3)
    worse = trained(api, worker, pets, 0.85, loss=0.2)
    surer = trained(api, worker, pets, 0.9, loss=0.4)
    better = trained(api, worker, pets, 0.9, loss=0.3)
    # Nothing to be worse than, yet.
    assert promote(api, first, against="production").status_code == 200
    document = assert_problem(promote(api, worse, against="production"), 409, "promotion_refused")
    assert failing(document) == {"top1": "It is 0.85 on pets/test, and 0.9 for production"}
    response = promote(api, surer, against="production", require="loss<=0.5")
    document = assert_problem(response, 409, "promotion_refused")
    assert failing(document) == {"loss": "It is 0.4 on pets/test, and 0.3 for production"}
    assert promote(api, surer, against="production").status_code == 200
    assert promote(api, better, against=first, require="loss<=0.5").status_code == 200
    assert_problem(promote(api, first, against="nobody"), 404, "model_not_found")


def test_it_is_judged_by_the_images_that_are_named(
    api: Any, worker: Any, pets: str, assert_problem: Callable[..., Any]
) -> None:
    golden = worker.add_dataset("golden", CLASSES, test=20)
    checkpoint_id = trained(api, worker, pets, 0.99)
    asked = {"require": "top1>=0.9", "dataset": "golden"}
    document = assert_problem(promote(api, checkpoint_id, **asked), 409, "not_evaluated")
    assert f"dataset {golden} and split test" in document["detail"]
    evaluated(api, worker, checkpoint_id, golden, "test", 0.8)
    assert_problem(promote(api, checkpoint_id, **asked), 409, "promotion_refused")
    # The newest report counts.
    evaluated(api, worker, checkpoint_id, golden, "test", 0.9)
    assert promote(api, checkpoint_id, **asked).status_code == 200
    other = trained(api, worker, pets, 0.99)
    evaluated(api, worker, other, pets, "val", 0.7)
    assert promote(api, other, "a", require="top1>=0.9").status_code == 200
    refused = promote(api, other, "b", require="top1>=0.9", split="val")
    assert_problem(refused, 409, "promotion_refused")


def test_another_checkpoint_of_the_same_training_has_no_part_in_its_report(
    api: Any, worker: Any, pets: str, assert_problem: Callable[..., Any]
) -> None:
    job_id = api.submit(dataset=pets)["id"]
    attempt = worker.claim()
    attempt.checkpoint(1, "best")
    attempt.checkpoint(2, "last")
    items = api.get(f"/jobs/{job_id}/checkpoints").json()["items"]
    ids = {item["kind"]: item["id"] for item in items}
    attempt.finish(report=report(ids["best"], pets, "test", 0.9))
    assert_problem(promote(api, ids["last"], require="top1>=0.1"), 409, "not_evaluated")
    assert promote(api, ids["best"], require="top1>=0.1").status_code == 200


@pytest.mark.parametrize(
    "require", ["", "top1", "top1>0.9", "top1>=high", "top2>=0.9", "top1>=0.9,", "top1>=-1"]
)
def test_conditions_that_make_no_sense_are_refused(
    api: Any, worker: Any, pets: str, assert_problem: Callable[..., Any], require: str
) -> None:
    checkpoint_id = trained(api, worker, pets, 0.9)
    document = assert_problem(promote(api, checkpoint_id, require=require), 422, "invalid_input")
    assert set(failing(document)) == {"require"}
    assert "min_class_accuracy" in document["detail"]


def test_what_is_judged_has_to_be_there(
    api: Any, worker: Any, pets: str, assert_problem: Callable[..., Any]
) -> None:
    checkpoint_id = trained(api, worker, pets, 0.9)
    worker.add_dataset("golden", CLASSES, test=20)
    asked = {"require": "top1>=0.5"}
    response = promote(api, checkpoint_id, dataset="nothing", **asked)
    assert_problem(response, 404, "dataset_not_found")
    response = promote(api, checkpoint_id, dataset="golden", split="train", **asked)
    assert failing(assert_problem(response, 422, "invalid_input")) == {"split": "golden has test"}
    response = promote(api, checkpoint_id, split="val")
    assert set(failing(assert_problem(response, 422, "invalid_input"))) == {"split"}
    response = api.put("/models/production", json={"notes": "n"}, params=asked)
    assert set(failing(assert_problem(response, 422, "invalid_input"))) == {"checkpoint_id"}
    assert api.get("/models").json()["items"] == []
