from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from worker.datasets.layout import Source

OpenTree = Callable[[Mapping[str, bytes]], Source]

TREE = {
    "train/n01/images/n01_0.JPEG": b"1a",
    "train/n01/images/n01_1.JPEG": b"1bb",
    "train/n01/n01_boxes.txt": b"n01_0.JPEG\t0\t0\t63\t63\n",
    "train/n02/images/n02_0.JPEG": b"2a",
    "val/images/val_0.JPEG": b"v",
    "val/images/val_1.JPEG": b"vvvv",
    "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t1\t2\t3\t4\n",
    "test/images/test_0.JPEG": b"left out",
    "wnids.txt": b"n02\nn01\n",
    "words.txt": b"n01\tgoldfish, Carassius auratus\nn02\tEgyptian cat\nn99\tgoldfish\n",
}


def found(source: Source) -> set[tuple[str, str, str, bytes]]:
    return {(image.split, image.label, image.path, image.data) for image in source}


def labels(source: Source) -> set[str]:
    return {image.label for image in source}


@pytest.mark.parametrize("wrapper", ["", "tiny-imagenet-200/", "a/b/"])
def test_each_image_comes_with_its_split_and_a_readable_label(
    open_tree: OpenTree, wrapper: str
) -> None:
    source = open_tree({wrapper + path: data for path, data in TREE.items()})
    assert found(source) == {
        ("train", "goldfish", f"{wrapper}train/n01/images/n01_0.JPEG", b"1a"),
        ("train", "goldfish", f"{wrapper}train/n01/images/n01_1.JPEG", b"1bb"),
        ("train", "Egyptian cat", f"{wrapper}train/n02/images/n02_0.JPEG", b"2a"),
        ("val", "Egyptian cat", f"{wrapper}val/images/val_0.JPEG", b"v"),
        ("val", "goldfish", f"{wrapper}val/images/val_1.JPEG", b"vvvv"),
    }
    assert (source.num_images, source.num_bytes) == (5, 12)
    assert source.class_folders == {
        (split, label) for split in ("train", "val") for label in ("goldfish", "Egyptian cat")
    }
    assert source.problems == ()


def test_the_list_of_val_may_come_last(open_tree: OpenTree) -> None:
    assert labels(open_tree(dict(reversed(TREE.items())))) == {"goldfish", "Egyptian cat"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (b"n01\tcrane, bird\nn02\tcrane, machine\n", {"n01", "n02"}),  # tells nothing apart
        (b"n01\tcrane\n", {"crane", "n02"}),
        (b"n01\t\nn02\t, x\n", {"n01", "n02"}),
        (b"n01\tn02\n", {"n01", "n02"}),
        (b"n01\ta\x07b\nn02\t\xff\n", {"n01", "\ufffd"}),
        (b"no tabs at all\n", {"n01", "n02"}),
        (b"n01\tox\r\nn02\tbee\r\n", {"ox", "bee"}),
    ],
)
def test_a_word_is_a_label_only_where_it_is_unique_and_printable(
    open_tree: OpenTree, words: bytes, expected: set[str]
) -> None:
    assert labels(open_tree(TREE | {"words.txt": words})) == expected


def test_without_words_the_ids_are_the_labels(open_tree: OpenTree) -> None:
    small = {path: data for path, data in TREE.items() if path not in ("words.txt", "wnids.txt")}
    assert labels(open_tree(small)) == {"n01", "n02"}


def test_images_that_are_missing_or_have_no_label_are_listed(open_tree: OpenTree) -> None:
    files = TREE | {"val/images/val_7.JPEG": b"unlisted"}
    del files["val/images/val_0.JPEG"]
    source = open_tree(files)
    assert [(problem.code, problem.examples) for problem in source.problems] == [
        ("images_missing", ["val/images/val_0.JPEG"]),
        ("images_without_label", ["val/images/val_7.JPEG"]),
    ]
    assert source.num_images == len(found(source)) == 4


def test_a_class_that_has_no_folder_counts_as_an_empty_one(open_tree: OpenTree) -> None:
    source = open_tree(TREE | {"wnids.txt": b"n01\nn02\nn99\n", "words.txt": b"n99\tlion\n"})
    assert ("train", "lion") in source.class_folders
    assert ("val", "lion") not in source.class_folders


def test_a_val_sorted_into_class_folders_is_read_as_such(open_tree: OpenTree) -> None:
    files = {path.replace("val/images/", "val/n01/"): data for path, data in TREE.items()}
    assert {image.label for image in open_tree(files) if image.split == "val"} == {"n01"}
