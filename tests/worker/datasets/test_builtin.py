from __future__ import annotations

import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from shared.errors import TrainingError
from shared.settings import Settings
from skipline.catalog import BUILTIN_DATASETS
from skipline.specs import IngestSpec
from worker.datasets.builtin import open_cifar10, open_digits, png_bytes
from worker.datasets.sources import open_source


def pixels_of(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(BytesIO(data)) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("shape", [(8, 8), (5, 9, 3), (1, 1), (32, 32, 3)])
def test_a_stored_png_shows_the_same_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(pixels_of(png_bytes(pixels)), pixels)


def test_a_stored_png_is_not_compressed() -> None:
    data = png_bytes(np.zeros((32, 32, 3), np.uint8))
    assert len(data) > 32 * 32 * 3
    assert zlib.decompress(data[41:-16]) == bytes(32 * 97)


def test_the_digits_are_as_the_catalog_says(settings: Settings) -> None:
    facts = BUILTIN_DATASETS["digits"]
    images = list(open_source(IngestSpec(source="builtin", name="digits"), settings))
    assert Counter(image.split for image in images) == facts.splits
    assert {image.label for image in images} == set(facts.classes)


def test_every_fifth_digit_of_each_class_is_held_out() -> None:
    source = open_digits()
    counts = Counter((image.split, image.label) for image in source)
    # The file holds 178 zeros and 182 ones.
    assert (counts["test", "0"], counts["train", "0"]) == (35, 143)
    assert (counts["test", "1"], counts["train", "1"]) == (36, 146)
    assert source.num_images == 1797


def test_the_first_digit_is_a_zero_scaled_to_8_bits() -> None:
    first = next(iter(open_digits()))
    assert (first.split, first.label, first.path) == ("train", "0", "train/0/00000.png")
    # Its first row is 0 0 5 13 9 1 0 0 of 16.
    assert pixels_of(first.data)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_missing_scikit_learn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingError) as caught:
        open_digits()
    assert caught.value.code == "dataset_unavailable"


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("not found"), OSError()])
def test_a_failed_download_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    with pytest.raises(TrainingError) as caught:
        open_cifar10(tmp_path)
    assert caught.value.code == "download_failed"
    assert "cifar-10-python.tar.gz" in caught.value.hint
    assert str(tmp_path) not in caught.value.hint


def test_cifar10_comes_as_png_files_of_both_splits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)

    def load(root: str, train: bool, download: bool) -> SimpleNamespace:
        assert download
        assert Path(root) == settings.cache_path / "downloads"
        return SimpleNamespace(data=pixels if train else pixels[:1], targets=[9, 0][: 1 + train])

    monkeypatch.setattr("torchvision.datasets.CIFAR10", load)
    images = list(open_source(IngestSpec(source="builtin", name="cifar10"), settings))
    assert [(image.split, image.label) for image in images] == [
        ("train", "truck"),
        ("train", "airplane"),
        ("test", "truck"),
    ]
    assert np.array_equal(pixels_of(images[1].data), pixels[1])
