from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.dataset_files import read_index
from shared.errors import TrainingError
from shared.images import decode_image, to_square
from shared.settings import Settings
from tests.shared.stored import as_first_version, change_classes, change_label
from worker.datasets.cache import bound, lock_path
from worker.datasets.folders import open_folder
from worker.datasets.ingest import ingest
from worker.datasets.locks import Interrupted, exclusive
from worker.datasets.packing import PackedDataset, pack

MakeImage = Callable[..., bytes]
MakeTree = Callable[[Path, Mapping[str, bytes]], Path]

NUM_TRAIN = 160
"""Three batches of 64, the last one ragged."""


@dataclass(frozen=True)
class Stored:
    folder: Path
    hash: str
    files: Mapping[str, bytes]


@pytest.fixture
def stored(tmp_path: Path, tree: MakeTree, image: MakeImage, settings: Settings) -> Stored:
    files = {f"train/{'ab'[i % 2]}/{i}": image(i, (8 + i % 5, 9)) for i in range(NUM_TRAIN)}
    files |= {f"val/a/{i}": image(1000 + i) for i in range(3)}
    folder = tmp_path / "stored"
    folder.mkdir()
    source = open_folder(tree(tmp_path / "source", files), settings)
    record = ingest(source, "x", None, 0, folder, settings)
    return Stored(folder, record.hash, files)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def pack_it(stored: Stored, cache: Path, size: int = 8, **options: Any) -> PackedDataset:
    return pack(stored.folder, size, cache, stored.hash, max_pixels=10_000, **options)


def no_progress(done: int, total: int | None) -> None:
    raise AssertionError("nothing was left to pack")


def assert_is_whole(packed: PackedDataset, stored: Stored) -> None:
    """Every image is what preprocessing makes of its file, and has its label."""
    index = read_index(stored.folder)
    for name, split in index.splits.items():
        images, labels = packed.split(name)
        assert labels.tolist() == split.labels.tolist()
        for row, path in zip(images, split.paths, strict=True):
            expected = to_square(decode_image(stored.files[path], 10_000), packed.image_size)
            assert np.array_equal(row, expected)


@pytest.mark.parametrize("num_threads", [0, 3])
def test_a_packed_dataset_holds_every_image_as_preprocessing_makes_it(
    stored: Stored, cache: Path, num_threads: int
) -> None:
    packed = pack_it(stored, cache, num_threads=num_threads)
    images, labels = packed.split("train")
    assert images.dtype == np.uint8
    assert images.shape == (NUM_TRAIN, 8, 8, 3)
    assert labels.dtype == np.int64
    assert labels.shape == (NUM_TRAIN,)
    assert packed.classes == ("a", "b")
    assert packed.counts == {"train": NUM_TRAIN, "val": 3}
    assert_is_whole(packed, stored)


def test_packed_images_cannot_be_written_to(stored: Stored, cache: Path) -> None:
    images, labels = pack_it(stored, cache).split("val")
    for array in (images, labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_an_unknown_split_is_a_key_error(stored: Stored, cache: Path) -> None:
    with pytest.raises(KeyError):
        pack_it(stored, cache).split("test")


def test_the_second_time_nothing_is_packed(stored: Stored, cache: Path) -> None:
    first = pack_it(stored, cache)
    assert pack_it(stored, cache, progress=no_progress) == first


def test_what_a_process_packed_stays_as_long_as_that_lives(stored: Stored, cache: Path) -> None:
    mine, forgotten = pack_it(stored, cache).folder, cache / stored.hash / "16"
    shutil.copytree(mine, forgotten)
    lock_path(forgotten).touch()
    bound(cache, 0)
    assert (mine.exists(), forgotten.exists()) == (True, False)


def test_each_image_size_is_packed_for_itself(stored: Stored, cache: Path) -> None:
    small, large = pack_it(stored, cache), pack_it(stored, cache, size=16)
    assert small.split("val")[0].shape == (3, 8, 8, 3)
    assert large.split("val")[0].shape == (3, 16, 16, 3)
    assert_is_whole(large, stored)


def test_progress_counts_to_the_total(stored: Stored, cache: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    pack_it(stored, cache, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 163), (128, 163), (160, 163), (163, 163)]


@pytest.mark.parametrize("name", ["train.images", "val.labels", "pack.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_packed_anew(
    stored: Stored, cache: Path, name: str, damage: str
) -> None:
    file = pack_it(stored, cache).folder / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 3)
    else:
        file.unlink()
    assert_is_whole(pack_it(stored, cache), stored)


def test_a_cache_of_another_format_is_packed_anew(stored: Stored, cache: Path) -> None:
    packed = pack_it(stored, cache)
    facts = packed.folder / "pack.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format_version": 0}))
    assert_is_whole(pack_it(stored, cache), stored)


def test_it_stops_when_told_and_leaves_nothing_behind(stored: Stored, cache: Path) -> None:
    with pytest.raises(Interrupted):
        pack_it(stored, cache, should_stop=lambda: True)
    assert [path.name for path in (cache / stored.hash).iterdir()] == [".8.lock"]
    assert_is_whole(pack_it(stored, cache), stored)


def test_it_stops_while_another_packs(stored: Stored, cache: Path) -> None:
    (cache / stored.hash).mkdir(parents=True)
    with exclusive(cache / stored.hash / ".8.lock"), pytest.raises(Interrupted):
        pack_it(stored, cache, should_stop=lambda: True)


@pytest.mark.parametrize("damage", ["cut", "overwritten", "no index", "other version", "gone"])
def test_a_damaged_stored_dataset_is_told(stored: Stored, cache: Path, damage: str) -> None:
    images, index = stored.folder / "images.bin", stored.folder / "index.json"
    if damage == "cut":
        os.truncate(images, images.stat().st_size - 1)
    elif damage == "overwritten":
        images.write_bytes(bytes(images.stat().st_size))
    elif damage == "no index":
        index.write_text("{")
    elif damage == "other version":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"format_version": 99}))
    else:
        images.unlink()
    with pytest.raises(TrainingError) as caught:
        pack_it(stored, cache)
    assert caught.value.code == "dataset_damaged"
    assert [path.name for path in (cache / stored.hash).iterdir()] == [".8.lock"]


def change(stored: Stored, what: str) -> None:
    """Changes the stored dataset so that everything in it still reads."""
    images = stored.folder / "images.bin"
    if what == "an image":
        data = bytearray(images.read_bytes())
        one, other = (stored.files[path] for path in ("train/a/0", "train/a/10"))
        assert len(one) == len(other)
        data[data.index(one) : data.index(one) + len(one)] = other
        images.write_bytes(data)
    elif what == "a label":
        change_label(stored.folder, "val")
    else:
        change_classes(stored.folder, ["a", "c"])


@pytest.mark.parametrize("what", ["an image", "a label", "a class"])
def test_a_stored_dataset_that_is_another_is_told_and_not_packed(
    stored: Stored, cache: Path, what: str
) -> None:
    change(stored, what)
    with pytest.raises(TrainingError) as caught:
        pack_it(stored, cache)
    assert caught.value.code == "dataset_changed"
    assert [path.name for path in (cache / stored.hash).iterdir()] == [".8.lock"]


def test_too_little_free_disk_is_told_in_bytes(stored: Stored, cache: Path) -> None:
    needed = 2**60 + 163 * (8 * 8 * 3 + 8)
    with pytest.raises(TrainingError, match=f"{needed} bytes are needed") as caught:
        pack_it(stored, cache, reserved_bytes=2**60)
    assert caught.value.code == "disk_full"


def test_a_disk_that_fills_up_is_told(stored: Stored, cache: Path) -> None:
    def fill(done: int, total: int | None) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError) as caught:
        pack_it(stored, cache, progress=fill)
    assert caught.value.code == "disk_full"


PACKER = """
import sys
from pathlib import Path
from worker.datasets.packing import pack

folder, cache, content_hash = sys.argv[1:]

def progress(done, total):
    print("packing", flush=True)
    sys.stdin.readline()

def should_stop():
    print("looking", flush=True)
    return False

packed = pack(Path(folder), 8, Path(cache), content_hash, max_pixels=10_000,
              progress=progress, should_stop=should_stop)
print("done", len(packed.split("train")[0]), flush=True)
"""

Process = subprocess.Popen[str]


@pytest.fixture
def start(stored: Stored, cache: Path) -> Iterator[Callable[[], Process]]:
    """Starts a process that packs, tells each step, and after a batch waits for a line."""
    started: list[Process] = []

    def run() -> Process:
        command = [sys.executable, "-c", PACKER, str(stored.folder), str(cache), stored.hash]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for(process: Process, line: str) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(f"the process ended before it said {line!r}")


def test_of_two_processes_one_packs_and_the_other_waits_and_uses_it(
    stored: Stored, cache: Path, start: Callable[[], Process]
) -> None:
    first, second = start(), start()
    lines = {process: _first_lines(process) for process in (first, second)}
    packer, waiter = (first, second) if "packing" in lines[first] else (second, first)
    assert "packing" in lines[packer]
    assert lines[waiter] == ["looking"] * 3  # the lock is taken
    said, _ = packer.communicate("\n" * 10)
    assert said.split()[-2:] == ["done", str(NUM_TRAIN)]
    said, _ = waiter.communicate("\n" * 10)
    assert "packing" not in said
    assert said.split()[-2:] == ["done", str(NUM_TRAIN)]
    assert_is_whole(pack_it(stored, cache, progress=no_progress), stored)


def _first_lines(process: Process) -> list[str]:
    """What it says until it has packed a batch, or has looked three times whether to go on."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1] == "packing" or len(lines) == 3:
            break
    return lines


def test_what_a_killed_packer_left_is_cleared_away(
    stored: Stored, cache: Path, start: Callable[[], Process]
) -> None:
    killed = start()
    wait_for(killed, "packing")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    parent = cache / stored.hash
    assert (parent / ".8.partial" / "train.images").exists()
    assert not (parent / "8").exists()
    assert_is_whole(pack_it(stored, cache), stored)
    assert sorted(path.name for path in parent.iterdir()) == [".8.lock", "8"]


def test_a_dataset_of_the_first_version_is_packed_as_ever(stored: Stored, cache: Path) -> None:
    as_first_version(stored.folder)
    assert_is_whole(pack_it(stored, cache), stored)


@pytest.mark.parametrize("name", ["index.rows", "index.paths"])
def test_an_index_that_is_cut_short_is_told(stored: Stored, cache: Path, name: str) -> None:
    file = stored.folder / name
    for length in (0, file.stat().st_size - 1, file.stat().st_size - 32):
        os.truncate(file, length)
        with pytest.raises(TrainingError) as caught:
            pack_it(stored, cache)
        assert caught.value.code == "dataset_damaged"
