"""A model's card is made of the record, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skipline import schemas

CLASSES = ["cat", "dog|wolf", *(f"c{number}" for number in range(2, 10))]


def row(label: str, num_samples: int, accuracy: float) -> schemas.ClassReport:
    return schemas.ClassReport(
        label=label,
        num_samples=num_samples,
        accuracy=accuracy,
        precision=0.5,
        recall=accuracy,
        f1=1,
    )


def served(api: Any, worker: Any, *, reported: str = "best", **change: Any) -> str:
    """The card of an alias for the best checkpoint of a training that ended with a report on its
    checkpoint of the kind `reported`."""
    dataset_id = worker.add_dataset("pets", CLASSES, train=1200, test=40)
    job_id = api.submit(dataset="pets", optimizer={"name": "sgd", "lr": 0.0625})["id"]
    attempt = worker.claim()
    attempt.checkpoint(7, "best")
    attempt.checkpoint(9, "last")
    items = api.get(f"/jobs/{job_id}/checkpoints").json()["items"]
    ids = {item["kind"]: item["id"] for item in items}
    report = schemas.Report(
        dataset="pets",
        dataset_id=dataset_id,
        split="test",
        selected_on="test",
        checkpoint_id=ids[reported],
        num_samples=40,
        loss=0.5,
        top1=0.875,
        top1_interval=(0.7389, 0.9454),
        top5=1.0,
        mean_class_accuracy=0.8,
        per_class=[row("cat", 30, 0.9), row("dog|wolf", 10, 0.8), row("c2", 0, 0.0)],
        confusion=[[1]],
        confused=[
            schemas.ConfusedPair(
                label="dog|wolf", predicted="cat", num_images=2, share=0.2, images=[]
            )
        ],
    )
    attempt.finish(report=report)
    change = {"checkpoint_id": ids["best"], **change}
    assert api.put("/models/production", json=change).status_code == 200
    answer = api.get("/models/production/card")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/markdown")
    text: str = answer.text
    return text


def test_it_tells_data_training_figures_and_limits(api: Any, worker: Any) -> None:
    lines = served(api, worker, tags=["demo"]).splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert headings == [
        "# production",
        *("## Model", "## Data", "## Training", "## How good it is", "## Limits"),
    ]
    for line in (
        "An image classifier: resnet18, trained on pets, as of epoch 1.",
        "| tags | demo |",
        "| epoch, step | 1, 7 |",
        "| images | train 1,200, test 40 |",
        "| `optimizer.lr` | 0.0625 |",
        '| `augment` | \\["random\\_crop", "horizontal\\_flip"\\] |',
        "Measured on the 40 images of pets/test; test also chose the checkpoint.",
        "| top-1 | 0.8750 (95 %: 0.7389 to 0.9454) |",
        "1 of 2 classes were judged by fewer than 30 images: their figures are rough.",
        "Classes without any image to judge them by: 1.",
    ):
        assert line in lines


def test_the_weakest_class_comes_first_and_names_cannot_break_a_table(
    api: Any, worker: Any
) -> None:
    lines = served(api, worker, notes="# <b>not</b>\n| a | table |").splitlines()
    first = lines.index("| class | accuracy | precision | images |")
    assert lines[first + 2 : first + 4] == [
        "| dog\\|wolf | 0.8000 | 0.5000 | 10 |",
        "| cat | 0.9000 | 0.5000 | 30 |",
    ]
    assert "| dog\\|wolf | cat | 2 | 20.0% |" in lines
    assert "\\# \\<b\\>not\\</b\\> \\| a \\| table \\|" in lines


def test_figures_of_another_checkpoint_are_not_told(api: Any, worker: Any) -> None:
    text = served(api, worker, reported="last")
    assert "Not known: no report is on this checkpoint." in text
    assert "0.8750" not in text


def test_an_alias_that_is_not_there_has_none(api: Any, assert_problem: Callable[..., Any]) -> None:
    assert_problem(api.get("/models/nothing/card"), 404, "alias_not_found")
