from __future__ import annotations

import pytest

from shared.errors import TrainingError
from worker.datasets.layout import (
    MAX_NOTE_BYTES,
    MAX_NOTES,
    ClassFolders,
    Listing,
    check_class_names,
    find_class_folders,
    is_junk,
    printable,
    warning,
)


def layout_of(*paths: str) -> ClassFolders:
    return find_class_folders(tuple(path.split("/")) for path in paths)


def test_train_with_val_or_test_beside_it_are_splits() -> None:
    layout = layout_of("train/cat", "test/cat")
    assert layout == ClassFolders((), has_splits=True)
    assert layout.place(("train", "cat")) == ("train", "cat")
    assert layout.place(("test", "cat")) == ("test", "cat")
    assert layout.place(("train",)) is None


def test_folders_that_are_no_splits_are_classes_of_train() -> None:
    layout = layout_of("cat", "dog")
    assert layout.place(("cat",)) == ("train", "cat")
    assert layout.place(()) is None


def test_folders_below_a_class_count_as_that_class() -> None:
    assert layout_of("cat/day", "dog").place(("cat", "day", "one")) == ("train", "cat")
    assert layout_of("train/cat/day").place(("train", "cat", "day")) == ("train", "cat")


def test_a_wrapper_around_the_layout_is_taken_away() -> None:
    assert layout_of("data/train/cat", "data/val/cat").place(("data", "val", "cat")) == (
        "val",
        "cat",
    )
    assert layout_of("a/b/cat", "a/b/dog").wrapper == ("a", "b")


def test_a_single_class_without_subfolders_is_no_wrapper() -> None:
    assert layout_of("cat") == ClassFolders((), has_splits=False)


def test_a_train_among_other_vehicles_is_a_class() -> None:
    assert layout_of("train", "bus", "car").place(("train",)) == ("train", "train")


def test_other_folders_beside_splits_are_ignored() -> None:
    layout = layout_of("train/cat", "val/cat", "docs")
    assert layout.has_splits
    assert layout.place(("docs",)) is None


def test_validation_is_another_name_of_val() -> None:
    for name in ("val", "valid", "validation"):
        assert layout_of("train/cat", f"{name}/cat").place((name, "cat")) == ("val", "cat")


def test_an_empty_tree_has_no_place() -> None:
    assert layout_of().place(()) is None


def test_hidden_files_and_leftovers_of_systems_are_junk() -> None:
    assert all(map(is_junk, [".DS_Store", "._cat.jpg", "Thumbs.db", "__MACOSX", "desktop.ini"]))
    assert not any(map(is_junk, ["cat.jpg", "thumbs", "_cat"]))


@pytest.mark.parametrize("name", ["a\nb", "\x7f", "x" * 201, "\udcff"])
def test_class_names_that_cannot_be_labels_are_refused(name: str) -> None:
    with pytest.raises(TrainingError) as caught:
        check_class_names(["cat", name])
    assert caught.value.code == "bad_class_name"
    caught.value.message.encode()


def test_class_names_may_be_in_any_script() -> None:
    check_class_names(["猫", "کلاغ‌ها", "chien noir"])


def test_paths_that_are_no_unicode_become_printable() -> None:
    assert printable("cat/\udcff.png") == "cat/?.png"


def test_only_small_files_of_known_names_are_read_while_listing() -> None:
    listing, asked = Listing(), []

    def read(size: int) -> bytes:
        asked.append(size)
        return b"n01\tox\n"

    listing.add_file(("d", "words.txt"), MAX_NOTE_BYTES, read)
    listing.add_file(("e", "words.txt"), MAX_NOTE_BYTES + 1, read)
    listing.add_file(("d", "1.png"), 5, read)
    assert listing.notes == {("d", "words.txt"): b"n01\tox\n"}
    assert asked == [-1]
    assert (listing.num_files[("d",)], listing.num_bytes[("d",)]) == (2, MAX_NOTE_BYTES + 5)


def test_no_more_than_a_few_notes_are_kept() -> None:
    listing = Listing()
    for i in range(MAX_NOTES + 5):
        listing.add_file((str(i), "wnids.txt"), 0, lambda size: b"")
    assert len(listing.notes) == MAX_NOTES


def test_a_warning_counts_all_its_paths_and_shows_the_first_ten() -> None:
    (problem,) = warning("odd", "Odd files", (f"{i:02}" for i in reversed(range(12))))
    assert (problem.code, problem.level, problem.count) == ("odd", "warning", 12)
    assert problem.examples == [f"{i:02}" for i in range(10)]
    assert warning("odd", "Odd files", []) == ()
