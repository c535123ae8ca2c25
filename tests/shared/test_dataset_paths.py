from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.dataset_paths import check_dataset_path
from shared.errors import InvalidInput, PathNotAllowed
from shared.settings import Settings


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "pets").mkdir(parents=True)
    second.mkdir()
    (second / "pets.zip").write_bytes(b"PK")
    (tmp_path / "private").mkdir()
    return first, second


@pytest.fixture
def settings(roots: tuple[Path, Path]) -> Settings:
    return Settings(dataset_roots=roots)


def test_a_relative_path_is_relative_to_the_first_root(
    settings: Settings, roots: tuple[Path, Path]
) -> None:
    assert check_dataset_path("pets", settings) == (roots[0] / "pets").resolve()


def test_an_absolute_path_may_lie_below_any_root(
    settings: Settings, roots: tuple[Path, Path]
) -> None:
    archive = roots[1] / "pets.zip"
    assert check_dataset_path(str(archive), settings) == archive.resolve()


@pytest.mark.parametrize("path", ["..", "../private", "pets/../../private", "/", "/etc/passwd"])
def test_paths_outside_the_roots_are_refused(settings: Settings, path: str) -> None:
    with pytest.raises(PathNotAllowed) as caught:
        check_dataset_path(path, settings)
    assert caught.value.code == "path_not_allowed"
    assert caught.value.errors[0]["loc"] == "path"


def test_a_sibling_whose_name_begins_like_a_root_is_outside(
    settings: Settings, roots: tuple[Path, Path]
) -> None:
    Path(f"{roots[0]}-secret").mkdir()
    with pytest.raises(PathNotAllowed):
        check_dataset_path(f"{roots[0]}-secret", settings)


def test_a_link_counts_as_what_it_leads_to(settings: Settings, roots: tuple[Path, Path]) -> None:
    (roots[0] / "out").symlink_to(roots[0].parent / "private")
    (roots[0] / "across").symlink_to(roots[1])
    with pytest.raises(PathNotAllowed):
        check_dataset_path("out", settings)
    assert check_dataset_path("across/pets.zip", settings) == (roots[1] / "pets.zip").resolve()


@pytest.mark.parametrize("path", ["missing", "a\0b", "x" * 5000, "pets/missing/deep"])
def test_what_cannot_be_read_is_invalid_and_the_answer_holds_no_server_path(
    settings: Settings, roots: tuple[Path, Path], path: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_dataset_path(path, settings)
    assert caught.value.code == "invalid_input"
    assert str(roots[0].parent) not in caught.value.detail


def test_a_loop_of_links_and_a_fifo_are_invalid(
    settings: Settings, roots: tuple[Path, Path]
) -> None:
    (roots[0] / "loop").symlink_to("loop")
    os.mkfifo(roots[0] / "fifo")
    for path in ("loop", "fifo"):
        with pytest.raises(InvalidInput):
            check_dataset_path(path, settings)
