from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.errors import TrainingError
from shared.settings import Settings
from worker.datasets import archives, folders
from worker.datasets.folders import open_folder
from worker.datasets.layout import Layout, Listing, Source
from worker.datasets.stl10 import IMAGE_BYTES, find_stl10

OpenTree = Callable[[Mapping[str, bytes]], Source]
MakeTree = Callable[[Path, Mapping[str, bytes]], Path]

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)


def stored(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """Plane by plane, each column by column from the left."""
    columns = (
        image[:, column, channel].tobytes()
        for image in pixels
        for channel in range(3)
        for column in range(96)
    )
    return b"".join(columns)


TREE = {
    "train_X.bin": stored(PIXELS[:3]),
    "train_y.bin": bytes([10, 1, 3]),
    "test_X.bin": stored(PIXELS[3:]),
    "test_y.bin": bytes([1, 2]),
    "unlabeled_X.bin": b"not looked at",
    "fold_indices.txt": b"0 2 \n1 \n" + b"0 1 2\n" * 8,
    "class_names.txt": b"airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n",
}


def pixels_of(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(BytesIO(data)) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("wrapper", ["", "stl10_binary/", "data/stl10_binary/"])
def test_each_image_comes_with_its_split_and_label(open_tree: OpenTree, wrapper: str) -> None:
    source = open_tree({wrapper + path: data for path, data in TREE.items()})
    images = {image.path: image for image in source}
    expected = {
        "train/truck/00000.png": ("train", "truck", PIXELS[0]),
        "train/airplane/00001.png": ("train", "airplane", PIXELS[1]),
        "train/car/00002.png": ("train", "car", PIXELS[2]),
        "test/airplane/00000.png": ("test", "airplane", PIXELS[3]),
        "test/bird/00001.png": ("test", "bird", PIXELS[4]),
    }
    assert images.keys() == expected.keys()
    for path, (split, label, pixels) in expected.items():
        assert (images[path].split, images[path].label) == (split, label)
        assert np.array_equal(pixels_of(images[path].data), pixels)
    assert (source.num_images, source.num_bytes) == (5, 5 * 96 * 96 * 3)
    assert ("train", "car") in source.class_folders
    assert ("test", "car") not in source.class_folders


def test_files_larger_than_an_image_may_be_are_read_in_parts(
    open_tree: OpenTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (archives, folders):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", IMAGE_BYTES)
    assert len(list(open_tree(TREE))) == 5


def test_test_may_be_missing_and_names_have_a_default(open_tree: OpenTree) -> None:
    source = open_tree({name: TREE[name] for name in ("train_X.bin", "train_y.bin")})
    assert [image.label for image in source] == ["truck", "airplane", "car"]


@pytest.mark.parametrize(
    "files",
    [
        {"train_X.bin": TREE["train_X.bin"][:-1]},
        {"train_y.bin": bytes([1, 2])},
        {"train_y.bin": bytes([1, 2, 11])},
        {"test_y.bin": bytes([0, 1])},
        {"class_names.txt": b"one\ntwo\n"},
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    open_tree: OpenTree, files: dict[str, bytes]
) -> None:
    with pytest.raises(TrainingError) as caught:
        open_tree(TREE | files)
    assert caught.value.code == "bad_layout"
    assert caught.value.hint


def fold(tmp_path: Path, tree: MakeTree, settings: Settings, number: int, lines: bytes) -> Source:
    def find(listing: Listing) -> Layout:
        layout = find_stl10(listing, number)
        assert layout is not None
        return layout

    root = tree(tmp_path / "d", TREE | {"fold_indices.txt": lines})
    return open_folder(root, settings, find)


def test_a_fold_is_a_part_of_train_and_all_of_test(
    tmp_path: Path, tree: MakeTree, settings: Settings
) -> None:
    source = fold(tmp_path, tree, settings, 0, TREE["fold_indices.txt"])
    assert {image.path for image in source} == {
        "train/truck/00000.png",
        "train/car/00002.png",
        "test/airplane/00000.png",
        "test/bird/00001.png",
    }
    assert source.num_images == 4


@pytest.mark.parametrize("lines", [b"", b"0 1 2\n0 3\n", b"0\n\n", b"0\n1 x\n", b"0\n-1\n"])
def test_a_fold_of_images_that_are_not_there_is_refused(
    tmp_path: Path, tree: MakeTree, settings: Settings, lines: bytes
) -> None:
    with pytest.raises(TrainingError) as caught:
        fold(tmp_path, tree, settings, 1, lines)
    assert caught.value.code == "bad_layout"
