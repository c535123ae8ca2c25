from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from shared.errors import TrainingError
from shared.settings import Settings
from skipline.specs import IngestSpec
from worker.datasets import folders
from worker.datasets.folders import open_folder
from worker.datasets.sources import dataset_name, open_source

MakeTree = Callable[[Path, Mapping[str, bytes]], Path]


def test_files_come_sorted_by_path_with_split_class_and_bytes(
    tmp_path: Path, tree: MakeTree, settings: Settings
) -> None:
    root = tree(
        tmp_path / "d", {"train/b/2": b"22", "train/b/1": b"1", "train/a/x/9": b"9", "val/a/1": b""}
    )
    source = open_folder(root, settings)
    found = [(image.split, image.label, image.path, image.data) for image in source]
    assert found == [
        ("train", "a", "train/a/x/9", b"9"),
        ("train", "b", "train/b/1", b"1"),
        ("train", "b", "train/b/2", b"22"),
        ("val", "a", "val/a/1", b""),
    ]
    assert (source.num_images, source.num_bytes) == (4, 4)
    assert list(source) == list(source)


def test_junk_and_files_outside_classes_are_ignored(
    tmp_path: Path, tree: MakeTree, settings: Settings
) -> None:
    junk = {".DS_Store", "cat/.hidden", "cat/Thumbs.db", "__MACOSX/cat/1", ".git/x/y", "README"}
    root = tree(tmp_path / "d", dict.fromkeys(junk, b"") | {"cat/1": b"", "dog/1": b""})
    assert [image.path for image in open_folder(root, settings)] == ["cat/1", "dog/1"]


def test_an_empty_class_folder_is_known(tmp_path: Path, tree: MakeTree, settings: Settings) -> None:
    root = tree(tmp_path / "d", {"cat/1": b"", "dog/1": b""})
    (root / "emu").mkdir()
    assert open_folder(root, settings).class_folders == {
        ("train", "cat"),
        ("train", "dog"),
        ("train", "emu"),
    }


def test_links_are_not_followed_out_of_the_folder(
    tmp_path: Path, tree: MakeTree, settings: Settings
) -> None:
    tree(tmp_path / "private", {"secret": b"s", "more/x": b"x"})
    root = tree(tmp_path / "d", {"cat/1": b"one", "dog/1": b"two"})
    (root / "cat" / "out").symlink_to(tmp_path / "private" / "secret")
    (root / "cat" / "up").symlink_to("../../private/secret")
    (root / "emu").symlink_to(tmp_path / "private" / "more")
    (root / "cat" / "loop").symlink_to("..")
    (root / "cat" / "dangling").symlink_to("nowhere")
    (root / "dog" / "same").symlink_to("../cat/1")
    source = open_folder(root, settings)
    assert [(image.path, image.data) for image in source] == [
        ("cat/1", b"one"),
        ("dog/1", b"two"),
        ("dog/same", b"one"),
    ]
    (problem,) = source.problems
    assert (problem.code, problem.count) == ("links_left_out", 5)
    assert problem.examples == ["cat/dangling", "cat/loop", "cat/out", "cat/up", "emu"]


def test_fifos_are_not_opened(tmp_path: Path, tree: MakeTree, settings: Settings) -> None:
    root = tree(tmp_path / "d", {"cat/1": b"", "dog/1": b""})
    os.mkfifo(root / "cat" / "fifo")
    assert [image.path for image in open_folder(root, settings)] == ["cat/1", "dog/1"]


def test_more_files_than_allowed_are_refused_while_listing(
    tmp_path: Path, tree: MakeTree, settings: Settings
) -> None:
    root = tree(tmp_path / "d", {f"cat/{i}": b"" for i in range(4)})
    with pytest.raises(TrainingError) as caught:
        open_folder(root, settings.model_copy(update={"max_dataset_images": 3}))
    assert caught.value.code == "dataset_too_large"


def test_a_huge_file_is_refused_by_name(
    tmp_path: Path, tree: MakeTree, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MAX_FILE_BYTES", 3)
    root = tree(tmp_path / "d", {"cat/1": b"123", "dog/film": b"1234"})
    with pytest.raises(TrainingError, match="dog/film") as caught:
        list(open_folder(root, settings))
    assert caught.value.code == "file_too_large"


def test_a_file_that_vanishes_is_reported_by_its_relative_path(
    tmp_path: Path, tree: MakeTree, settings: Settings
) -> None:
    root = tree(tmp_path / "d", {"cat/1": b"", "dog/1": b""})
    source = open_folder(root, settings)
    (root / "dog" / "1").unlink()
    with pytest.raises(TrainingError, match="dog/1") as caught:
        list(source)
    assert caught.value.code == "unreadable_file"
    assert str(tmp_path) not in caught.value.message


def test_a_spec_opens_a_folder_or_an_archive_below_the_roots(
    tmp_path: Path, tree: MakeTree, settings: Settings
) -> None:
    tree(tmp_path / "d", {"cat/1": b"", "dog/1": b""})
    (tmp_path / "not-an-archive").write_bytes(b"hello")
    assert open_source(IngestSpec(path="d"), settings).num_images == 2
    for path, code in (
        ("not-an-archive", "bad_archive"),
        ("missing", "invalid_input"),
        ("/", "path_not_allowed"),
    ):
        with pytest.raises(TrainingError) as caught:
            open_source(IngestSpec(path=path), settings)
        assert caught.value.code == code
        assert caught.value.hint


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (IngestSpec(path="photos/pets"), "pets"),
        (IngestSpec(path="photos/pets.tar.gz"), "pets"),
        (IngestSpec(path="pets.v2.zip"), "pets.v2"),
        (IngestSpec(path="."), "dataset"),
        (IngestSpec(path="pets", name="Our pets"), "Our pets"),
        (IngestSpec(source="builtin", name="digits"), "digits"),
    ],
)
def test_a_dataset_is_named_after_its_path_unless_told_otherwise(
    spec: IngestSpec, name: str
) -> None:
    assert dataset_name(spec) == name


def test_an_unknown_builtin_is_refused(settings: Settings) -> None:
    with pytest.raises(TrainingError) as caught:
        open_source(IngestSpec(source="builtin", name="mnist"), settings)
    assert caught.value.code == "unknown_dataset"
