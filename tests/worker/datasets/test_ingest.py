from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.dataset_files import read_index
from shared.errors import TrainingError
from shared.settings import Settings
from worker.datasets import ingest as ingest_module
from worker.datasets.folders import open_folder
from worker.datasets.ingest import DatasetRecord, ingest
from worker.datasets.layout import Source
from worker.datasets.locks import Interrupted

MakeImage = Callable[..., bytes]
MakeTree = Callable[[Path, Mapping[str, bytes]], Path]
BringIn = Callable[..., DatasetRecord]


@pytest.fixture
def bring_in(tmp_path: Path, tree: MakeTree, settings: Settings) -> BringIn:
    """`bring_in(files, folder=..., limits=..., **options)` ingests a tree of these files."""

    def run(
        files: Mapping[str, bytes],
        folder: str = "stored",
        limits: Mapping[str, int] | None = None,
        val_fraction: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> DatasetRecord:
        root = tree(tmp_path / f"{folder}-source", files)
        (tmp_path / folder).mkdir()
        limited = settings.model_copy(update=dict(limits or {}))
        source = open_folder(root, limited)
        return ingest(source, "pets", val_fraction, seed, tmp_path / folder, limited, **options)

    return run


def code_of(bring_in: BringIn, files: Mapping[str, bytes], **options: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        bring_in(files, **options)
    assert caught.value.hint
    return caught.value.code


def pets(image: MakeImage, per_class: int) -> dict[str, bytes]:
    return {
        f"{label}/{i}.png": image(start + i)
        for start, label in ((0, "cat"), (100, "dog"))
        for i in range(per_class)
    }


def test_a_dataset_is_counted_split_by_split(bring_in: BringIn, image: MakeImage) -> None:
    record = bring_in(
        {
            "train/dog/1": image(1),
            "train/cat/1": image(2),
            "train/cat/2": image(3),
            "test/cat/1": image(4),
            "test/dog/1": image(5),
        }
    )
    assert record.classes == ["cat", "dog"]
    assert record.num_classes == 2
    assert {name: info.per_class for name, info in record.splits.items()} == {
        "train": [2, 1],
        "test": [1, 1],
    }
    assert record.splits["train"].num_images == 3
    assert list(record.splits) == ["train", "test"]
    assert record.name == "pets"


def test_the_hash_is_over_sorted_lines_of_split_class_and_digest(
    bring_in: BringIn, image: MakeImage
) -> None:
    one, two, three = image(1), image(2), image(3)
    record = bring_in({"train/dog/z": one, "train/cat/a": two, "val/cat/b": three})
    d1, d2, d3 = (hashlib.sha256(data).hexdigest() for data in (one, two, three))
    text = f"train\tcat\t{d2}\ntrain\tdog\t{d1}\nval\tcat\t{d3}\n"
    assert record.hash == hashlib.sha256(text.encode()).hexdigest()
    assert record.id == f"ds_{record.hash[:26]}"


def test_names_of_files_and_folders_do_not_enter_the_hash(
    bring_in: BringIn, image: MakeImage
) -> None:
    one, two = image(1), image(2)
    plain = bring_in({"cat/1": one, "dog/1": two}, folder="a")
    wrapped = bring_in({"w/train/cat/x/9": one, "w/train/dog/7": two, "junk": b""}, folder="b")
    other = bring_in({"cat/1": two, "dog/1": one}, folder="c")
    assert plain.hash == wrapped.hash != other.hash


def test_the_order_of_the_source_changes_nothing_but_places_in_the_file(
    tmp_path: Path, tree: MakeTree, image: MakeImage, settings: Settings
) -> None:
    source = open_folder(tree(tmp_path / "s", pets(image, 20)), settings)
    shuffled = list(source)
    random.Random(0).shuffle(shuffled)
    records, splits = [], []
    for folder, each in (("a", source), ("b", replace(source, read=lambda: iter(shuffled)))):
        (tmp_path / folder).mkdir()
        records.append(ingest(each, "pets", 0.3, 5, tmp_path / folder, settings))
        index = read_index(tmp_path / folder)
        splits.append(
            {n: (list(split.paths), split.labels.tolist()) for n, split in index.splits.items()}
        )
    assert records[0] == records[1]
    assert splits[0] == splits[1]


def test_val_fraction_holds_out_class_by_class_by_seed(bring_in: BringIn, image: MakeImage) -> None:
    files = pets(image, 10)
    first = bring_in(files, folder="a", val_fraction=0.2, seed=1)
    again = bring_in(files, folder="b", val_fraction=0.2, seed=1)
    other = bring_in(files, folder="c", val_fraction=0.2, seed=2)
    assert first.splits["val"].per_class == [2, 2]
    assert first.splits["train"].per_class == [8, 8]
    assert first.hash == again.hash != other.hash


def test_the_stored_bytes_are_the_files_own(
    tmp_path: Path, bring_in: BringIn, image: MakeImage
) -> None:
    files = pets(image, 3)
    bring_in(files, val_fraction=0.4)
    stored = (tmp_path / "stored" / "images.bin").read_bytes()
    index = read_index(tmp_path / "stored")
    found = {}
    for split in index.splits.values():
        for offset, size, label, path in zip(
            split.offsets, split.sizes, split.labels, split.paths, strict=True
        ):
            found[path] = stored[offset : offset + size]
            assert path.startswith(index.classes[label])
    assert found == files
    assert json.loads((tmp_path / "stored" / "index.json").read_text())["format_version"] == 2
    assert sorted(os.listdir(tmp_path / "stored")) == [
        *("images.bin", "index.json", "index.paths", "index.rows"),
    ]


def test_mean_and_std_are_of_the_training_pixels(bring_in: BringIn) -> None:
    def picture(colour: tuple[int, int, int], size: tuple[int, int]) -> bytes:
        file = BytesIO()
        Image.new("RGB", size, colour).save(file, "PNG")
        return file.getvalue()

    record = bring_in(
        {
            "train/cat/1": picture((255, 0, 51), (2, 2)),  # 4 pixels
            "train/dog/1": picture((0, 0, 51), (4, 3)),  # 12 pixels
            "test/dog/1": picture((9, 9, 9), (50, 50)),
        }
    )
    # Red is 1 in a quarter of the pixels: its variance is 1/4 * 3/4.
    assert record.channel_mean == pytest.approx([0.25, 0.0, 0.2])
    assert record.channel_std == pytest.approx([0.1875**0.5, 0.0, 0.0])


def test_mean_and_std_agree_with_numpy(bring_in: BringIn) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    files = {}
    for i, each in enumerate(pixels):
        file = BytesIO()
        Image.fromarray(each).save(file, "PNG")
        files[f"{'cat' if i % 2 else 'dog'}/{i}"] = file.getvalue()
    record = bring_in(files)
    scaled = pixels.reshape(-1, 3) / 255
    assert record.channel_mean == pytest.approx(scaled.mean(0))
    assert record.channel_std == pytest.approx(scaled.std(0))


def test_the_image_std_is_the_mean_of_each_training_images_own(bring_in: BringIn) -> None:
    def picture(*greys: int) -> bytes:
        file = BytesIO()
        Image.fromarray(np.array([greys], dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    record = bring_in(
        {
            "train/cat/1": picture(0, 255),  # deviates by 1/2 from its mean
            "train/dog/1": picture(51, 51, 51),  # not at all
            "train/dog/2": picture(0, 0, 0, 255),  # by the root of 3/16
            "test/dog/1": picture(0, 100),
        }
    )
    assert record.channel_image_std == pytest.approx([(0.5 + 0.1875**0.5) / 3] * 3)


def test_the_image_size_is_the_median_shorter_side_rounded_up(
    bring_in: BringIn, image: MakeImage
) -> None:
    sizes = [(40, 90), (100, 33), (300, 200)]  # shorter sides 40, 33, 200: median 40, then 64
    files = {f"cat/{i}": image(i, size) for i, size in enumerate(sizes)}
    assert bring_in(files | {"dog/1": image(9, (34, 34))}).image_size == 64


def test_unreadable_files_are_left_out_and_listed(bring_in: BringIn, image: MakeImage) -> None:
    broken = {f"cat/broken{i:02}.png": image(i)[:50] for i in range(12)}
    record = bring_in(pets(image, 2) | broken | {"dog/notes.txt": b"text", "dog/void": b""})
    (problem,) = record.problems
    assert (problem.code, problem.level, problem.count) == ("unreadable_images", "warning", 14)
    assert problem.examples == [f"cat/broken{i:02}.png" for i in range(10)]
    assert record.splits["train"].per_class == [2, 2]


def test_images_with_too_many_pixels_are_listed_apart(bring_in: BringIn, image: MakeImage) -> None:
    files = pets(image, 2) | {"cat/large": image(9, (20, 20))}
    (problem,) = bring_in(files, limits={"max_image_pixels": 399}).problems
    assert (problem.code, problem.examples) == ("images_too_large", ["cat/large"])


def test_odd_classes_are_listed_and_do_not_stop_training(
    tmp_path: Path, tree: MakeTree, bring_in: BringIn, image: MakeImage
) -> None:
    (tmp_path / "stored-source" / "train" / "emu").mkdir(parents=True)
    record = bring_in(
        {
            "train/cat/1": image(1),
            "train/cat/2": image(2),
            "train/dog/1": image(3),
            "train/fox/1": b"no image",
            "val/cat/1": image(4),
        }
    )
    assert record.classes == ["cat", "dog"]
    assert {problem.code: problem.examples for problem in record.problems} == {
        "unreadable_images": ["train/fox/1"],
        "empty_classes": ["train/emu", "train/fox"],
        "classes_differ": ["val/dog"],
        "single_image_classes": ["dog"],
    }


@pytest.mark.parametrize(
    ("paths", "code"),
    [
        ([], "no_images"),
        (["1.png", "2.png"], "no_images"),
        (["train/1.png", "val/1.png"], "no_images"),
        (["cat/1"], "too_few_classes"),
        (["train/cat/1", "val/cat/1"], "too_few_classes"),
        (["val/cat/1", "test/cat/1"], "no_train_images"),
        (["train/cat/1", "train/dog/1", "val/emu/1"], "classes_differ"),
        (["train/cat/1", "train/dog/1", "test/Cat/1"], "classes_differ"),
        (["train/cat/1", "val/dog/1"], "classes_differ"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    bring_in: BringIn, image: MakeImage, tmp_path: Path, paths: list[str], code: str
) -> None:
    (tmp_path / "stored-source").mkdir()
    assert code_of(bring_in, {path: image(i) for i, path in enumerate(paths)}) == code


def test_nothing_but_unreadable_files_is_refused(bring_in: BringIn) -> None:
    assert code_of(bring_in, {"cat/1": b"a", "dog/1": b"b"}) == "no_readable_images"


def test_val_fraction_beside_a_val_split_is_refused(bring_in: BringIn, image: MakeImage) -> None:
    files = {"train/cat/1": image(1), "train/dog/1": image(2), "val/cat/1": image(3)}
    assert code_of(bring_in, files, val_fraction=0.5) == "val_exists"


def test_classes_of_one_image_leave_nothing_to_hold_out(
    bring_in: BringIn, image: MakeImage
) -> None:
    assert code_of(bring_in, pets(image, 1), val_fraction=0.5) == "val_fraction_too_large"


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_dataset_classes": 1}, "too_many_classes"),
        ({"max_dataset_bytes": 100}, "dataset_too_large"),
        ({"max_dataset_images": 3}, "dataset_too_large"),
    ],
)
def test_limits_are_kept(
    bring_in: BringIn, image: MakeImage, limits: dict[str, int], code: str
) -> None:
    assert code_of(bring_in, pets(image, 2), limits=limits) == code


def test_a_source_that_grew_since_it_was_listed_is_still_limited(
    tmp_path: Path, tree: MakeTree, image: MakeImage, settings: Settings
) -> None:
    source: Source = open_folder(tree(tmp_path / "s", pets(image, 2)), settings)
    small = settings.model_copy(update={"max_dataset_bytes": 100})
    with pytest.raises(TrainingError) as caught:
        ingest(replace(source, num_bytes=1), "pets", None, 0, tmp_path, small)
    assert caught.value.code == "dataset_too_large"


def test_progress_counts_to_the_total(bring_in: BringIn, image: MakeImage) -> None:
    seen: list[tuple[int, int | None]] = []
    bring_in(pets(image, 50), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 100), (100, 100)]


def test_it_stops_when_told(bring_in: BringIn, image: MakeImage) -> None:
    with pytest.raises(Interrupted):
        bring_in(pets(image, 2), should_stop=lambda: True)


def test_too_little_free_disk_is_told_before_anything_is_written(
    tmp_path: Path, bring_in: BringIn, image: MakeImage
) -> None:
    limits = {"reserved_disk_bytes": 2**60}
    assert code_of(bring_in, pets(image, 2), limits=limits) == "disk_full"
    assert list((tmp_path / "stored").iterdir()) == []


def test_a_disk_that_fills_up_is_told(
    bring_in: BringIn, image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ingest_module, "write_index", fail)
    assert code_of(bring_in, pets(image, 2)) == "disk_full"


def test_one_thread_and_many_bring_in_the_same(
    bring_in: BringIn, image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pets(image, 90)
    one = bring_in(files, folder="a")
    monkeypatch.setattr(ingest_module, "decode_threads", lambda mean, threads: 4)
    assert bring_in(files, folder="b") == one
