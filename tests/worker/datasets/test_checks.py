"""Problems planted among real images, found as they are and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from shared.settings import Settings
from skipline.schemas import Problem
from tests.worker.datasets.test_perceptual import as_jpeg, photos
from worker.datasets import checks
from worker.datasets.check_path import check_dataset
from worker.datasets.folders import open_folder
from worker.datasets.ingest import ingest

PHOTOS = photos(24)


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def clean() -> dict[str, bytes]:
    """Two classes, two splits, and nothing wrong."""
    files = {}
    for number, picture in enumerate(PHOTOS):
        split = "train" if number < 16 else "test"
        files[f"{split}/{'cat' if number % 2 else 'dog'}/{number}.png"] = encoded(picture)
    return files


@pytest.fixture
def find(tmp_path: Path, settings: Settings) -> Callable[..., dict[str, Problem]]:
    """`find(files)`: the problems of a tree of these files, by code."""

    def run(files: Mapping[str, bytes], val_fraction: float | None = None) -> dict[str, Problem]:
        root = tmp_path / "tree"
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        (tmp_path / "stored").mkdir()
        source = open_folder(root, settings)
        record = ingest(source, "pets", val_fraction, 0, tmp_path / "stored", settings)
        assert len({problem.code for problem in record.problems}) == len(record.problems)
        assert all(problem.level == "warning" for problem in record.problems)
        return {problem.code: problem for problem in record.problems}

    return run


def only(found: dict[str, Problem], code: str) -> tuple[int, list[str]]:
    """Count and examples of the one problem there is."""
    assert set(found) == {code}
    return found[code].count, found[code].examples


def test_where_nothing_is_wrong_nothing_is_found(find: Any) -> None:
    assert find(clean()) == {}


def test_the_same_file_in_two_splits_is_found(find: Any) -> None:
    files = clean()
    files["test/dog/copy.png"] = files["train/dog/2.png"]
    assert only(find(files), "leaked_images") == (1, ["train/dog/2.png = test/dog/copy.png"])


def test_the_same_file_twice_in_a_split_is_found(find: Any) -> None:
    files = clean()
    files["train/dog/a.png"] = files["train/dog/b.png"] = files["train/dog/2.png"]
    count, examples = only(find(files), "duplicate_images")
    assert count == 2
    assert examples == ["train/dog/2.png = train/dog/a.png", "train/dog/2.png = train/dog/b.png"]


def test_the_same_file_in_two_classes_is_found(find: Any) -> None:
    files = clean()
    files["train/cat/odd.png"] = files["train/dog/2.png"]
    found = find(files)
    assert set(found) == {"duplicate_images", "conflicting_labels"}
    assert found["conflicting_labels"].examples == ["train/cat/odd.png = train/dog/2.png"]


def test_an_image_that_looks_like_one_of_another_split_is_found(find: Any) -> None:
    files = clean()
    files["test/dog/alike.jpg"] = encoded(PHOTOS[2].resize((80, 80)), "JPEG", quality=70)
    count, examples = only(find(files), "leaked_near_duplicates")
    assert (count, examples) == (1, ["train/dog/2.png ~ test/dog/alike.jpg"])


def test_images_of_a_split_that_look_alike_are_found(find: Any) -> None:
    files = clean()
    files["train/dog/alike.png"] = encoded(as_jpeg(PHOTOS[2]))
    count, examples = only(find(files), "near_duplicates")
    assert (count, examples) == (1, ["train/dog/2.png ~ train/dog/alike.png"])


def test_what_is_held_out_of_train_is_another_split(find: Any) -> None:
    files = {path.removeprefix("train/"): data for path, data in clean().items() if "train" in path}
    pairs = {f"{path[:-4]}-again.jpg": data for path, data in files.items()}
    found = find(files | pairs, val_fraction=0.5)
    assert found["leaked_images"].count + found["duplicate_images"].count == len(files)
    assert found["leaked_images"].count > 0


def test_small_and_flat_images_are_not_said_to_look_alike(find: Any) -> None:
    files = clean()
    for level in range(6):
        picture = Image.new("RGB", (64, 64), (level * 30, 10, 10))
        files[f"train/dog/flat{level}.png"] = encoded(picture)
    noise = np.random.default_rng(1).integers(0, 60, (10, 10, 3), dtype=np.uint8)
    for shift in range(3):
        files[f"train/dog/small{shift}.png"] = encoded(Image.fromarray(noise + shift))
    assert find(files) == {}


def test_too_many_candidates_are_cut_and_said_to_be(
    find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "MAX_COMPARED_PAIRS", 2)
    files = clean()
    for quality in (60, 70, 80, 90):
        files[f"train/dog/q{quality}.jpg"] = encoded(PHOTOS[2], "JPEG", quality=quality)
    found = find(files)
    assert found["near_duplicates"].count <= 2
    assert "not all were compared" in found["near_duplicates"].message


def test_forms_of_images_are_listed(find: Any) -> None:
    files = clean()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    extra = photos(8 + len(PHOTOS))[len(PHOTOS) :]
    grey16 = Image.fromarray(np.asarray(extra[3].convert("L")).astype(np.uint16) * 257)
    planted = {
        "rotated_images": ("r.jpg", encoded(extra[0], "JPEG", exif=exif)),
        "wrong_suffix": ("w.jpg", encoded(extra[1])),
        "transparent_images": ("t.png", encoded(extra[2].convert("RGBA"))),
        "deep_images": ("d.png", encoded(grey16)),
        "cmyk_images": ("c.jpg", encoded(extra[4].convert("CMYK"), "JPEG")),
        "animated_images": (
            "a.gif",
            encoded(extra[5], "GIF", save_all=True, append_images=[extra[6]]),
        ),
        "tiny_images": ("y.png", encoded(extra[7].resize((40, 7)))),
        "unreadable_images": ("u.png", encoded(extra[6])[:-50]),
    }
    for name, data in planted.values():
        files[f"train/cat/{name}"] = data
    found = find(files)
    for code, (name, _) in planted.items():
        assert found[code].examples == [f"train/cat/{name}"], code
    assert found["grey_images"].examples == ["train/cat/d.png"]
    assert set(found) == {*planted, "grey_images"}


def test_a_dataset_that_is_all_grey_is_not_odd(find: Any) -> None:
    grey = {
        f"{'cat' if number % 2 else 'dog'}/{number}.png": encoded(picture.convert("L"))
        for number, picture in enumerate(PHOTOS)
    }
    assert find(grey) == {}


def test_classes_without_images_or_with_few_are_listed(find: Any) -> None:
    files = clean()
    del files["test/cat/17.png"], files["test/cat/19.png"]
    del files["test/cat/21.png"], files["test/cat/23.png"]
    more = photos(64)[24:]
    for number, picture in enumerate(more):
        files[f"train/dog/more{number}.png"] = encoded(picture)
    files["train/owl/1.png"] = encoded(photos(65)[64])
    found = find(files)
    assert set(found) == {"classes_differ", "single_image_classes", "imbalanced_classes"}
    assert found["classes_differ"].examples == ["test/cat", "test/owl"]
    assert found["single_image_classes"].examples == ["owl"]
    assert found["imbalanced_classes"].examples == ["owl: 1"]


def test_a_path_is_checked_without_leaving_anything(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for path, data in clean().items():
        (tmp_path / "pets" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / path).write_bytes(data)
    record, problems = check_dataset(tmp_path / "pets", settings)
    assert record is not None
    assert (record.name, record.classes, problems) == ("pets", ["cat", "dog"], [])
    assert record.splits["train"].num_images == 16
    (tmp_path / "text").write_text("hello")
    record, [problem] = check_dataset(tmp_path / "text", settings)
    assert (record, problem.code, problem.level) == (None, "bad_archive", "error")
    assert list(temporary.iterdir()) == []
