from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from skipline import schemas
from skipline.catalog import ARCHITECTURES


@pytest.fixture(scope="module")
def folder(sqlite_settings: Any) -> Any:
    """A dataset's folder below the one root."""
    [root] = sqlite_settings.dataset_roots
    path = root / "flowers"
    path.mkdir(parents=True)
    (root / "link").symlink_to("/etc")
    return path


@pytest.mark.parametrize("relative", [True, False])
def test_a_folder_below_the_roots_becomes_an_ingest_job(
    sqlite_api: Any, folder: Any, relative: bool
) -> None:
    path = folder.name if relative else str(folder)
    response = sqlite_api.post("/datasets", json={"path": path, "val_fraction": 0.25})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert (job["kind"], job["status"]) == ("ingest", "queued")
    assert (job["spec"]["path"], job["spec"]["val_fraction"]) == (path, 0.25)
    assert job["spec"]["seed"] == 0


@pytest.mark.parametrize(
    "path", ["/etc", "../../..", "flowers/../../..", "link", "link/passwd", "/", "/nowhere/at/all"]
)
def test_what_lies_outside_the_roots_is_not_read(
    sqlite_api: Any, folder: Any, path: str, assert_problem: Callable[..., Any]
) -> None:
    response = sqlite_api.post("/datasets", json={"path": path})
    document = assert_problem(response, 422, "path_not_allowed")
    assert [item["loc"] for item in document["errors"]] == ["path"]
    assert str(folder.parent) not in response.text


def test_a_folder_that_is_not_there_is_told_without_the_servers_path(
    sqlite_api: Any, folder: Any, assert_problem: Callable[..., Any]
) -> None:
    response = sqlite_api.post("/datasets", json={"path": "nothing"})
    assert_problem(response, 422, "invalid_input")
    assert str(folder.parent) not in response.text


@pytest.mark.parametrize(
    ("body", "code", "loc"),
    [
        ({}, "invalid_spec", ""),
        ({"source": "url", "path": "x"}, "invalid_spec", "source"),
        ({"path": "flowers", "colour": 1}, "invalid_spec", "colour"),
        ({"path": "flo\x00wers"}, "invalid_spec", "path"),
        ({"path": "flowers", "val_fraction": 1}, "invalid_spec", "val_fraction"),
        ({"path": "flowers", "name": "n" * 300}, "invalid_spec", "name"),
        ({"path": "flowers", "name": "digits"}, "invalid_spec", "name"),
        ({"path": "somewhere/cifar10.tar.gz"}, "invalid_spec", "name"),
        ({"source": "builtin"}, "invalid_spec", ""),
        ({"source": "builtin", "name": "imagenet"}, "unknown_dataset", "name"),
    ],
)
def test_a_request_that_cannot_work_is_refused_with_its_key(
    sqlite_api: Any,
    folder: Any,
    body: dict[str, Any],
    code: str,
    loc: str,
    assert_problem: Callable[..., Any],
) -> None:
    document = assert_problem(sqlite_api.post("/datasets", json=body), 422, code)
    assert [item["loc"] for item in document["errors"]] == [loc]


def test_a_builtin_can_be_brought_in_by_name(sqlite_api: Any) -> None:
    response = sqlite_api.post("/datasets", json={"source": "builtin", "name": "cifar10"})
    assert response.status_code == 202
    assert response.json()["name"] == "cifar10"


def test_datasets_are_listed_newest_first_beside_the_builtin_ones(api: Any, worker: Any) -> None:
    for name in ("one", "two", "three"):
        worker.add_dataset(name, ["a", "b"], train=10, val=2)
    first = api.get("/datasets", params={"limit": 2}).json()
    second = api.get("/datasets", params={"limit": 2, "after": first["next"]}).json()
    listed = [dataset["name"] for page in (first, second) for dataset in page["items"]]
    assert listed == ["three", "two", "one"]
    assert second["next"] is None
    builtin = {dataset["name"]: dataset for dataset in first["builtin"]}
    assert builtin["digits"]["splits"] == {"train": 1442, "test": 355}
    assert builtin["cifar10"]["needs_network"] is True
    schemas.DatasetPage.model_validate(first)


def test_a_dataset_is_shown_by_id_and_by_name(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    dataset_id = worker.add_dataset("röses & more", ["a", "b"], train=10)
    for reference in (dataset_id, "röses & more"):
        dataset = api.get(f"/datasets/{reference}").json()
        assert (dataset["id"], dataset["num_classes"]) == (dataset_id, 2)
        assert dataset["splits"]["train"] == {"num_images": 10, "per_class": [10, 0]}
    for unknown in ("nothing", "digits", "%00", "x" * 500):
        assert_problem(api.get(f"/datasets/{unknown}"), 404, "dataset_not_found")


def test_every_architecture_is_listed_with_the_images_it_takes(sqlite_api: Any) -> None:
    items = sqlite_api.get("/architectures").json()["items"]
    assert [item["name"] for item in items] == list(ARCHITECTURES)
    sizes = {item["name"]: item["min_image_size"] for item in items}
    assert sizes["resnet18"] == {"small": 8, "imagenet": 32}
    page = sqlite_api.get("/architectures", params={"limit": 5, "after": "resnet34"}).json()
    assert [item["name"] for item in page["items"]][:2] == ["resnet50", "resnet101"]
    assert page["next"] == page["items"][-1]["name"]
