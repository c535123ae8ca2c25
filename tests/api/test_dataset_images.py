"""A stored dataset's images, over HTTP: listed, read, seen; and what becomes of it when deleted."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from shared import datasets
from shared.database import Database
from shared.settings import Settings
from shared.storage import Storage
from worker.datasets.folders import open_folder
from worker.datasets.ingest import ingest
from worker.jobs.datasets import dataset_columns

SIDE = 40


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, 2 * SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def bring_in(
    settings: Settings, database: Database, folder: Path, name: str, classes: dict[str, int]
) -> str:
    """Stores a dataset with so many images of each class in train, and one each in test. Returns
    its id."""
    seed = sum(map(ord, name))
    for label, count in classes.items():
        for split, number in (("train", count), ("test", 1)):
            (folder / split / label).mkdir(parents=True)
            for place in range(number):
                seed += 1
                (folder / split / label / f"{place}.png").write_bytes(encoded(picture(seed)))
    return store(settings, database, folder, name)


def store(settings: Settings, database: Database, folder: Path, name: str) -> str:
    storage = Storage(settings.artifacts_path)
    key = f"datasets/{uuid.uuid4().hex}/1"
    with storage.writing(key, "owner") as place:
        record = ingest(open_folder(folder, settings), name, None, 0, place, settings)
    with database.session_scope() as session:
        dataset, _ = datasets.add_dataset(
            session, key=key, num_bytes=storage.num_bytes(key), **dataset_columns(record)
        )
        return dataset.id


@pytest.fixture(autouse=True)
def _no_files_of_other_tests(settings: Settings) -> None:
    """The server of a module has one storage, while the database is empty for each test."""
    shutil.rmtree(settings.artifacts_path / "datasets", ignore_errors=True)


@pytest.fixture
def pets(settings: Settings, database: Database, tmp_path: Path) -> str:
    return bring_in(settings, database, tmp_path / "pets", "pets", {"cat": 3, "dog": 5, "owl": 2})


def items(api: Any, path: str) -> list[dict[str, Any]]:
    response = api.get(path)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["items"]
    return found


def opened(response: Any) -> Image.Image:
    assert response.status_code == 200, response.text
    return Image.open(BytesIO(response.content))


def test_images_are_listed_class_by_class_and_page_by_page(api: Any, pets: str) -> None:
    images = items(api, f"/datasets/{pets}/images")
    assert [image["label"] for image in images] == ["cat"] * 3 + ["dog"] * 5 + ["owl"] * 2
    assert [image["index"] for image in images] == list(range(10))
    dogs = items(api, "/datasets/pets/images?label=dog")
    assert [image["index"] for image in dogs] == [3, 4, 5, 6, 7]
    first = api.get("/datasets/pets:1/images?label=dog&limit=3").json()
    rest = api.get(f"/datasets/pets/images?label=dog&after={first['next']}").json()
    assert first["items"] + rest["items"] == dogs
    assert rest["next"] is None
    assert [image["split"] for image in items(api, "/datasets/pets/images?split=test")] == [
        *("test", "test", "test"),
    ]


def test_an_image_is_read_as_it_was_brought_in(api: Any, pets: str, tmp_path: Path) -> None:
    for image in items(api, f"/datasets/{pets}/images"):
        response = api.get(image["image_url"])
        assert response.content == (tmp_path / "pets" / image["path"]).read_bytes()
        assert len(response.content) == image["num_bytes"]
        assert response.headers["content-type"] == "image/png"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
    again = api.get(image["image_url"], headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_thumbnail_is_small_and_upright(
    api: Any, settings: Settings, database: Database, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for label in ("cat", "dog"):
        (tmp_path / "turned" / label).mkdir(parents=True)
    turned = encoded(picture(1), "JPEG", exif=exif)
    (tmp_path / "turned" / "cat" / "1.jpg").write_bytes(turned)
    (tmp_path / "turned" / "dog" / "1.png").write_bytes(encoded(picture(2)))
    store(settings, database, tmp_path / "turned", "turned")
    [cat, dog] = items(api, "/datasets/turned/images")
    assert opened(api.get(cat["thumbnail_url"])).size == (SIDE, 2 * SIDE)
    assert opened(api.get(dog["thumbnail_url"])).size == (2 * SIDE, SIDE)
    assert opened(api.get(dog["thumbnail_url"] + "?size=20")).size == (20, 10)


def test_samples_are_drawn_by_seed_and_class(api: Any, pets: str) -> None:
    grid = api.get("/datasets/pets/samples.png")
    assert opened(grid).format == "PNG"
    assert api.get(f"/datasets/{pets}/samples.png").content == grid.content
    assert api.get("/datasets/pets/samples.png?seed=1").content != grid.content
    one = opened(api.get("/datasets/pets/samples.png?label=owl&num_images=1"))
    assert one.height < opened(grid).height


def test_classes_are_drawn(api: Any, pets: str) -> None:
    assert opened(api.get("/datasets/pets/classes.png")).format == "PNG"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/datasets/pets/images?split=all", 422, "invalid_input"),
        ("/datasets/pets/images?label=cow", 422, "invalid_input"),
        ("/datasets/pets/images?after=99", 422, "invalid_input"),
        ("/datasets/pets/images?label=dog&after=1", 422, "invalid_input"),
        ("/datasets/pets/images/train/10", 404, "image_not_found"),
        ("/datasets/pets/images/train/-1", 404, "image_not_found"),
        ("/datasets/pets/images/val/0", 404, "image_not_found"),
        ("/datasets/pets/images/train/x", 422, "invalid_input"),
        ("/datasets/pets/images/train/0/thumbnail.png?size=15", 422, "invalid_input"),
        ("/datasets/pets/images/train/0/thumbnail.png?size=513", 422, "invalid_input"),
        ("/datasets/pets/samples.png?label=cow", 422, "invalid_input"),
        ("/datasets/pets/samples.png?num_images=33", 422, "invalid_input"),
        ("/datasets/cats/images", 404, "dataset_not_found"),
        ("/datasets/pets:2/images", 404, "dataset_not_found"),
        ("/datasets/pets%00/images", 404, "dataset_not_found"),
        ("/datasets/cats/classes.png", 404, "dataset_not_found"),
    ],
)
def test_what_is_not_there_is_told(
    api: Any, pets: str, path: str, status: int, code: str, assert_problem: Callable[..., Any]
) -> None:
    assert_problem(api.get(path), status, code)


@pytest.mark.parametrize("file", ["index.json", "images.bin"])
def test_damaged_files_are_a_conflict(
    api: Any,
    pets: str,
    settings: Settings,
    database: Database,
    file: str,
    assert_problem: Callable[..., Any],
) -> None:
    with database.read_scope() as session:
        key = datasets.get_dataset(session, pets).key
    (settings.artifacts_path / key / file).unlink()
    for path in ("images", "images/train/0", "samples.png", "images/train/0/thumbnail.png"):
        if (path, file) != ("images", "images.bin"):
            assert_problem(api.get(f"/datasets/pets/{path}"), 409, "dataset_damaged")


# --------------------------------------------------------------------------------------- versions


def test_each_set_of_images_under_a_name_is_a_version_of_it(
    api: Any, settings: Settings, database: Database, tmp_path: Path, pets: str
) -> None:
    other = bring_in(settings, database, tmp_path / "more", "pets", {"cat": 1, "dog": 1})
    assert other != pets
    assert api.get("/datasets/pets").json()["id"] == other
    assert api.get("/datasets/pets:1").json()["id"] == pets
    assert api.get(f"/datasets/{pets}").json()["labels"] == ["pets:1"]
    # The same images once more: the newest version of that name is another one by now.
    store(settings, database, tmp_path / "pets", "pets")
    store(settings, database, tmp_path / "pets", "pets")
    store(settings, database, tmp_path / "pets", "animals")
    document = api.get(f"/datasets/{pets}").json()
    assert sorted(document["labels"]) == ["animals:1", "pets:1", "pets:3"]
    job = api.submit(dataset="pets:2")
    assert job["dataset_id"] == other
    assert api.submit(dataset="animals")["dataset_id"] == pets


def test_names_given_at_once_are_different_versions(
    settings: Settings, database: Database, worker: Any
) -> None:
    def give(number: int) -> None:
        worker.add_dataset(f"d{number}", ["a", "b"], called="pets", train=2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(give, range(8)))
    with database.read_scope() as session:
        found = [datasets.find_dataset(session, f"pets:{version}") for version in range(1, 9)]
        assert datasets.find_dataset(session, "pets:9") is None
    assert len({dataset.id for dataset in found if dataset}) == 8


# --------------------------------------------------------------------------------------- deletion


def is_stored(settings: Settings) -> bool:
    tree = os.walk(settings.artifacts_path / "datasets")  # which may change meanwhile
    return any("images.bin" in files for _, _, files in tree)


def test_a_dataset_that_nobody_needs_is_deleted_with_its_names_and_files(
    api: Any, settings: Settings, pets: str, wait_for: Any, assert_problem: Callable[..., Any]
) -> None:
    assert api.delete("/datasets/pets:1").status_code == 204
    wait_for(lambda: not is_stored(settings), "end of the files")
    for reference in (pets, "pets", "pets:1"):
        assert_problem(api.get(f"/datasets/{reference}"), 404, "dataset_not_found")
        assert_problem(api.delete(f"/datasets/{reference}"), 404, "dataset_not_found")


def test_what_depends_on_a_dataset_is_listed_before_it_goes(
    api: Any,
    worker: Any,
    settings: Settings,
    database: Database,
    tmp_path: Path,
    pets: str,
    wait_for: Any,
    assert_problem: Callable[..., Any],
) -> None:
    trained = api.submit(dataset="pets")["id"]
    attempt = worker.claim()
    for query in ("", "?force=true"):
        document = assert_problem(api.delete(f"/datasets/pets{query}"), 409, "in_use")
        assert [item["loc"] for item in document["errors"]] == [f"jobs/{trained}"]
    attempt.checkpoint(1)
    attempt.finish()
    waiting = api.submit(dataset="pets")["id"]
    document = assert_problem(api.delete("/datasets/pets"), 409, "in_use")
    assert {item["loc"] for item in document["errors"]} == {f"jobs/{trained}", f"jobs/{waiting}"}

    assert api.delete("/datasets/pets?force=true").status_code == 204
    wait_for(lambda: not is_stored(settings), "end of the files")
    kept = api.get("/datasets/pets").json()
    assert (kept["id"], kept["dropped_at"] is None) == (pets, False)
    assert_problem(api.get("/datasets/pets/images"), 409, "dataset_gone")
    assert_problem(api.get("/datasets/pets/samples.png"), 409, "dataset_gone")
    assert_problem(api.post("/jobs", json={"dataset": "pets"}), 409, "dataset_gone")
    # The same images bring it back, as it was.
    assert store(settings, database, tmp_path / "pets", "pets") == pets
    assert api.get("/datasets/pets").json()["dropped_at"] is None
    assert len(items(api, "/datasets/pets/images")) == 10


def test_a_job_without_a_model_does_not_hold_its_dataset(api: Any, worker: Any, pets: str) -> None:
    api.submit(dataset="pets")
    worker.claim().finish()
    assert api.delete("/datasets/pets").status_code == 204


def test_no_job_is_accepted_for_a_dataset_that_goes_at_that_moment(
    api: Any, worker: Any, database: Database
) -> None:
    for number in range(12):
        worker.add_dataset(f"d{number}", ["a", "b"], train=20, val=4)

        def submit(name: str) -> Any:
            return api.post("/jobs", json={"dataset": name})

        def delete(name: str) -> Any:
            return api.delete(f"/datasets/{name}")

        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(call, f"d{number}") for call in (submit, delete)]
            accepted, deleted = (call.result().status_code for call in calls)
        assert (accepted, deleted) in ((202, 409), (422, 204))
