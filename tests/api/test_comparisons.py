"""Two models are compared on what both said of the same images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shared.comparison import Outcomes
from skipline import schemas

CLASSES = [str(digit) for digit in range(10)]
LABELS = [0, 0, 1, 1]


@pytest.fixture
def pets(api: Any, worker: Any) -> str:
    """The id of a dataset."""
    return str(worker.add_dataset("pets", CLASSES, train=100, test=4))


def judged(
    checkpoint_id: str, dataset_id: str, answers: list[int] | None
) -> tuple[schemas.Report, Outcomes | None]:
    report = schemas.Report(
        dataset="pets",
        dataset_id=dataset_id,
        split="test",
        checkpoint_id=checkpoint_id,
        num_samples=4,
        loss=0.5,
        top1=0.5,
        top5=1.0,
        mean_class_accuracy=0.5,
        per_class=[],
        confusion=[],
    )
    if answers is None:
        return report, None
    columns = (np.array(column, dtype=np.int32) for column in (range(4), LABELS, answers))
    return report, Outcomes("test", *columns)


def trained(api: Any, worker: Any, dataset_id: str, answers: list[int] | None) -> tuple[str, str]:
    """A training and its best checkpoint, which gave these answers to the four images."""
    job_id = api.submit(dataset=dataset_id)["id"]
    attempt = worker.claim()
    attempt.checkpoint(1, "best")
    [checkpoint] = api.get(f"/jobs/{job_id}/checkpoints").json()["items"]
    report, outcomes = judged(checkpoint["id"], dataset_id, answers)
    attempt.finish(report=report, outcomes=outcomes)
    return job_id, checkpoint["id"]


def test_two_models_are_compared_under_any_of_their_names(api: Any, worker: Any, pets: str) -> None:
    job_a, a = trained(api, worker, pets, [0, 0, 0, 0])
    job_b, b = trained(api, worker, pets, [0, 3, 1, 1])
    assert api.put("/models/candidate", json={"checkpoint_id": b}).status_code == 200
    found = api.get("/compare", params={"a": job_a, "b": "candidate"}).json()
    assert found["a"] == {"checkpoint_id": a, "job_id": job_a, "arch": "resnet18", "epoch": 1}
    assert found["b"]["job_id"] == job_b
    assert (found["dataset"], found["dataset_id"], found["split"]) == ("pets", pets, "test")
    assert (found["top1_a"], found["top1_b"], found["difference"]) == (0.5, 0.75, 0.25)
    assert found["lost"] == [
        {"split": "test", "index": 1, "label": "0", "called_a": "0", "called_b": "3"}
    ]
    assert [image["index"] for image in found["gained"]] == [2, 3]
    turned = api.get("/compare", params={"a": b, "b": a}).json()
    assert (turned["difference"], turned["p_value"]) == (-0.25, found["p_value"])
    assert (turned["lost"], turned["num_gained"]) == (
        [image | {"called_a": "1", "called_b": "0"} for image in found["gained"]],
        1,
    )


def test_the_newest_evaluation_counts(api: Any, worker: Any, pets: str) -> None:
    _, a = trained(api, worker, pets, [0, 0, 0, 0])
    _, b = trained(api, worker, pets, None)
    for answers in ([9, 9, 9, 9], [0, 0, 1, 1]):
        api.submit(kind="evaluate", model=b, dataset=pets, split="test")
        report, outcomes = judged(b, pets, answers)
        worker.claim().finish(report=report, outcomes=outcomes)
    assert api.get("/compare", params={"a": a, "b": b}).json()["top1_b"] == 1.0


def test_the_evaluation_that_is_missing_is_named(
    api: Any, worker: Any, pets: str, assert_problem: Callable[..., Any]
) -> None:
    _, a = trained(api, worker, pets, [0, 0, 0, 0])
    _, b = trained(api, worker, pets, None)
    document = assert_problem(api.get("/compare", params={"a": a, "b": b}), 409, "not_evaluated")
    assert f"model {b}, dataset {pets} and split test" in document["detail"]


def test_what_is_compared_has_to_be_there(
    api: Any, worker: Any, pets: str, assert_problem: Callable[..., Any]
) -> None:
    _, a = trained(api, worker, pets, [0, 0, 0, 0])
    for query, status, code in (
        ({"a": a}, 422, "invalid_input"),
        ({"a": a, "b": "nobody"}, 404, "model_not_found"),
        ({"a": a, "b": "\0"}, 404, "model_not_found"),
        ({"a": a, "b": a, "dataset": "nothing"}, 404, "dataset_not_found"),
        ({"a": a, "b": a, "dataset": "\0"}, 404, "dataset_not_found"),
        ({"a": a, "b": a, "split": "golden"}, 422, "invalid_input"),
    ):
        assert_problem(api.get("/compare", params=query), status, code)
