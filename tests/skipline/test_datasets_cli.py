"""`skipline datasets show | rm | ls | check`: what is asked for, and how it is told."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from skipline.cli import app
from tests.skipline.replay import (
    TIME,
    Answer,
    Server,
    answer_json,
    answer_problem,
    dataset_document,
)

PNG = b"\x89PNG and so on"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["datasets", *arguments], env={"COLUMNS": "160"})


def test_a_dataset_is_shown_with_its_classes_and_problems(server: Server) -> None:
    server.on("GET /datasets/pets%3A2", answer_json(dataset_document()))
    output = run("show", "pets:2").output
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}
    assert rows["names"] == ["pets:2,", "animals:1"]
    assert rows["cat"] == ["700", "12"]
    assert rows["dog"] == ["500", "8"]
    assert rows["mean"] == ["0.5000,", "0.2500,", "0.1250"]
    assert rows["leaked_images"][0] == "3"
    assert "train/cat/1.jpg = test/cat/2.jpg" in output
    assert "3.0 MiB, trained on at 32 px" in output
    assert "8 to 64 px wide" in output
    assert json.loads(run("show", "pets:2", "--json").stdout) == dataset_document()


def test_of_many_classes_some_are_shown(server: Server) -> None:
    names = [f"class{number}" for number in range(30)]
    splits = {"train": {"num_images": 30, "per_class": [1] * 30}}
    document = dataset_document(classes=names, num_classes=30, splits=splits)
    server.on("GET /datasets/many", answer_json(document))
    output = run("show", "many").output
    assert "class19" in output
    assert "class20" not in output
    assert "and 10 more classes" in output


def test_pictures_are_written_where_they_are_wanted(server: Server, tmp_path: Path) -> None:
    server.on("GET /datasets/pets", answer_json(dataset_document()))
    server.on("GET /datasets/pets/classes.png", Answer(PNG + b"1", 200, "image/png"))
    server.on("GET /datasets/pets/samples.png", Answer(PNG + b"2", 200, "image/png"))
    plot, samples = tmp_path / "a.png", tmp_path / "b.png"
    words = ("--plot", str(plot), "--samples", str(samples), "--label", "cat", "--seed", "3")
    assert run("show", "pets", *words).exit_code == 0
    assert (plot.read_bytes(), samples.read_bytes()) == (PNG + b"1", PNG + b"2")
    asked = next(asked for asked in server.asked if asked.path.endswith("samples.png"))
    assert asked.query == {"split": "train", "label": "cat", "seed": "3"}


def test_a_dataset_in_use_is_not_deleted_unless_forced(server: Server) -> None:
    errors = [{"loc": "jobs/job-1", "message": "a job (train) that made a model of it"}]
    server.on("DELETE /datasets/pets", answer_problem(409, "in_use", "Models depend", errors))
    result = run("rm", "pets")
    assert result.exit_code == 1
    assert "jobs/job-1" in result.output
    server.on("DELETE /datasets/pets", answer_json(None, status=204))
    result = run("rm", "pets", "--force")
    assert (result.exit_code, result.output) == (0, "pets is deleted\n")
    assert [asked.query for asked in server.asked] == [{}, {"force": "true"}]


def test_deleted_images_are_marked_in_the_list(server: Server) -> None:
    page = {"items": [dataset_document(dropped_at=TIME)], "next": None, "builtin": []}
    server.on("GET /datasets", answer_json(page))
    row = run("ls").output.splitlines()[1]
    assert "pets:2, animals:1  (images deleted)" in row
    assert row.split()[-2:] == ["1", "d-1"]


def folder_of_images(root: Path, **classes: int) -> Path:
    seed = 0
    for label, count in classes.items():
        (root / label).mkdir(parents=True)
        for place in range(count):
            seed += 37
            file = BytesIO()
            Image.new("RGB", (16, 16), (seed % 256, seed // 256, 9)).save(file, "PNG")
            (root / label / f"{place}.png").write_bytes(file.getvalue())
    return root


def test_a_folder_is_checked_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPLINE_API_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    folder = folder_of_images(tmp_path / "pets", cat=3, dog=2)
    (folder / "dog" / "again.png").write_bytes((folder / "dog" / "0.png").read_bytes())
    result = run("check", str(folder))
    assert result.exit_code == 0, result.output
    assert "2 classes: 6 images in train" in result.output
    assert "train/dog/0.png" not in result.output
    assert "dog/0.png = dog/again.png" in result.output
    document: dict[str, Any] = json.loads(run("check", str(folder), "--json").stdout)
    assert [problem["code"] for problem in document["problems"]] == ["duplicate_images"]
    assert document["dataset"]["splits"]["train"]["per_class"] == [3, 3]
    assert not (tmp_path / ".skipline").exists()


def test_what_could_not_be_trained_on_is_an_error_of_the_check(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "pets", cat=3)
    result = run("check", str(folder), "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["dataset"] is None
    assert [(p["code"], p["level"]) for p in document["problems"]] == [("too_few_classes", "error")]
    assert "too_few_classes" in run("check", str(folder)).output
    assert run("check", str(tmp_path / "nothing")).exit_code == 2
