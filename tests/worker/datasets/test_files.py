from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import TrainingError
from shared.settings import Settings
from tests.shared.stored import change_classes, change_label
from worker.datasets.files import FileDataset, FileImages, open_files
from worker.datasets.folders import open_folder
from worker.datasets.ingest import ingest
from worker.datasets.locks import Interrupted, exclusive
from worker.datasets.packing import pack

MakeImage = Callable[..., bytes]
MakeTree = Callable[[Path, Mapping[str, bytes]], Path]

NUM_TRAIN = 130
"""Three batches of 64, the last one ragged, together with the three of val."""


@dataclass(frozen=True)
class Stored:
    folder: Path
    hash: str


@pytest.fixture
def stored(tmp_path: Path, tree: MakeTree, image: MakeImage, settings: Settings) -> Stored:
    files = {f"train/{'ab'[i % 2]}/{i}": image(i, (8 + i % 5, 9)) for i in range(NUM_TRAIN)}
    files |= {f"val/b/{i}": image(1000 + i) for i in range(3)}
    folder = tmp_path / "stored"
    folder.mkdir()
    source = open_folder(tree(tmp_path / "source", files), settings)
    return Stored(folder, ingest(source, "x", None, 0, folder, settings).hash)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def open_it(stored: Stored, cache: Path, **options: Any) -> FileDataset:
    return open_files(stored.folder, 8, cache, stored.hash, max_pixels=10_000, **options)


def code_of(stored: Stored, cache: Path) -> str:
    with pytest.raises(TrainingError) as caught:
        open_it(stored, cache)
    assert caught.value.hint
    return caught.value.code


def no_progress(done: int, total: int | None) -> None:
    raise AssertionError("nothing was left to hash")


def test_images_and_labels_equal_the_packed_ones(stored: Stored, cache: Path) -> None:
    packed = pack(stored.folder, 8, cache, stored.hash, max_pixels=10_000)
    dataset = open_it(stored, cache)
    assert dataset.classes == packed.classes
    assert dataset.counts == packed.counts == {"train": NUM_TRAIN, "val": 3}
    for name, count in packed.counts.items():
        images, labels = packed.split(name)
        split = dataset.split(name)
        assert len(split) == count
        assert split.image_size == 8
        assert split.labels.dtype == np.int64
        assert np.array_equal(split.labels, labels)
        rows = np.random.default_rng(0).permutation(count)
        found = split.read(rows)
        assert found.dtype == np.uint8
        assert np.array_equal(found, images[rows])


def test_no_rows_are_no_images(stored: Stored, cache: Path) -> None:
    rows = np.array([], dtype=np.int64)
    assert open_it(stored, cache).split("val").read(rows).shape == (0, 8, 8, 3)


def test_an_unknown_split_is_a_key_error(stored: Stored, cache: Path) -> None:
    with pytest.raises(KeyError):
        open_it(stored, cache).split("test")


def total_of(images: FileImages) -> int:
    return int(images.read(np.arange(len(images))).sum())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of threads, from 3.12 on
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(stored: Stored, cache: Path, method: str) -> None:
    images = open_it(stored, cache).split("val")
    expected = total_of(images)
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.apply(total_of, (images,)) == expected


def test_a_copy_through_pickle_is_small_and_reads_the_same(stored: Stored, cache: Path) -> None:
    images = open_it(stored, cache).split("train")
    data = pickle.dumps(images)
    assert len(data) < NUM_TRAIN * 3 * 8 + 2000
    assert total_of(pickle.loads(data)) == total_of(images)


def test_the_files_are_hashed_once(stored: Stored, cache: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    open_it(stored, cache, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 133), (128, 133), (130, 133), (133, 133)]
    open_it(stored, cache, progress=no_progress)


@pytest.mark.parametrize("name", ["images.bin", "index.json", "index.rows"])
def test_files_with_another_time_are_hashed_again(stored: Stored, cache: Path, name: str) -> None:
    open_it(stored, cache)
    os.utime(stored.folder / name, ns=(0, 1))
    with pytest.raises(AssertionError, match="nothing was left"):
        open_it(stored, cache, progress=no_progress)
    open_it(stored, cache)


def test_a_damaged_note_of_the_hash_is_made_anew(stored: Stored, cache: Path) -> None:
    open_it(stored, cache)
    marker = cache / stored.hash / "verified.json"
    marker.write_text("{")
    open_it(stored, cache)
    assert set(json.loads(marker.read_text())) == {"images.bin", "index.json", "index.rows"}


@pytest.mark.parametrize("what", ["an image", "a label", "a class"])
def test_a_stored_dataset_that_is_another_is_told(stored: Stored, cache: Path, what: str) -> None:
    open_it(stored, cache)
    if what == "an image":
        data = bytearray((stored.folder / "images.bin").read_bytes())
        data[-1] ^= 1
        (stored.folder / "images.bin").write_bytes(data)
    elif what == "a label":
        change_label(stored.folder, "train")
    else:
        change_classes(stored.folder, ["a", "c"])
    assert code_of(stored, cache) == "dataset_changed"
    assert code_of(stored, cache) == "dataset_changed"  # and not only the first time
    assert [path.name for path in (cache / stored.hash).iterdir()] == [".verified.json.lock"]


@pytest.mark.parametrize("damage", ["cut", "gone", "no index"])
def test_a_damaged_stored_dataset_is_told(stored: Stored, cache: Path, damage: str) -> None:
    images = stored.folder / "images.bin"
    if damage == "cut":
        os.truncate(images, images.stat().st_size - 1)
    elif damage == "gone":
        images.unlink()
    else:
        (stored.folder / "index.json").write_text("{")
    assert code_of(stored, cache) == "dataset_damaged"


def test_an_image_that_stops_to_decode_is_told(stored: Stored, cache: Path) -> None:
    split = open_it(stored, cache).split("val")
    images = stored.folder / "images.bin"
    images.write_bytes(bytes(images.stat().st_size))
    with pytest.raises(TrainingError) as caught:
        split.read(np.array([0]))
    assert caught.value.code == "dataset_damaged"
    images.unlink()
    with pytest.raises(TrainingError) as caught:
        split.read(np.array([0]))
    assert caught.value.code == "dataset_damaged"


def test_it_stops_when_told(stored: Stored, cache: Path) -> None:
    with pytest.raises(Interrupted):
        open_it(stored, cache, should_stop=lambda: True)
    assert [path.name for path in (cache / stored.hash).iterdir()] == [".verified.json.lock"]


def test_it_stops_while_another_hashes(stored: Stored, cache: Path) -> None:
    (cache / stored.hash).mkdir(parents=True)
    with exclusive(cache / stored.hash / ".verified.json.lock"), pytest.raises(Interrupted):
        open_it(stored, cache, should_stop=lambda: True, progress=no_progress)
