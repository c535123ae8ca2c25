from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from shared.errors import TrainingError
from shared.settings import Settings
from skipline.catalog import BUILTIN_DATASETS
from skipline.specs import IngestSpec
from worker.datasets import builtin, downloads
from worker.datasets.builtin import CIFAR10, CIFAR100, Cifar, open_builtin, open_cifar, open_digits
from worker.datasets.layout import Source
from worker.datasets.sources import open_source

MakeTree = Callable[[Path, Mapping[str, bytes]], Path]
Pixels = npt.NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(downloads, "urlopen", urlopen)


@pytest.fixture
def folder(settings: Settings) -> Path:
    """Where original files are looked for."""
    path = settings.cache_path / "downloads"
    path.mkdir(parents=True)
    return path


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def pixels_of(data: bytes) -> Pixels:
    with Image.open(BytesIO(data)) as picture:
        return np.asarray(picture)


def found(source: Source) -> list[tuple[str, str]]:
    return [(image.split, image.label) for image in source]


def tar_gz(files: Mapping[str, bytes]) -> bytes:
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return file.getvalue()


def test_every_builtin_of_the_catalog_can_be_opened() -> None:
    assert builtin.OPENERS.keys() == BUILTIN_DATASETS.keys()


@pytest.mark.parametrize("name", BUILTIN_DATASETS)
def test_the_catalogs_classes_are_in_the_order_of_a_stored_dataset(name: str) -> None:
    classes = BUILTIN_DATASETS[name].classes
    assert list(classes) == sorted(set(classes))


def test_the_catalog_knows_how_many_classes_and_images_were_published() -> None:
    facts = {
        name: (facts.num_classes, *facts.splits.values())
        for name, facts in BUILTIN_DATASETS.items()
    }
    assert facts["cifar10"] == (10, 50_000, 10_000)
    assert facts["cifar100"] == (100, 50_000, 10_000)
    assert facts["fashion_mnist"] == (10, 60_000, 10_000)
    assert facts["stl10"] == (10, 5_000, 8_000)
    assert all(facts[f"stl10_fold{fold}"] == (10, 1_000, 8_000) for fold in range(10))
    assert facts["tinyimagenet"] == (200, 100_000, 10_000)


@pytest.mark.parametrize("name", [name for name in BUILTIN_DATASETS if name != "digits"])
def test_without_a_network_it_says_which_file_to_put_where(settings: Settings, name: str) -> None:
    with pytest.raises(TrainingError) as caught:
        open_builtin(name, settings)
    assert caught.value.code == "download_failed"
    assert "cache/downloads" in caught.value.hint
    assert "MD5" in caught.value.hint
    assert str(settings.home) not in caught.value.message + caught.value.hint


# ----------------------------------------------------------------------------------------- digits


def test_the_digits_are_as_the_catalog_says(settings: Settings) -> None:
    facts = BUILTIN_DATASETS["digits"]
    images = list(open_source(IngestSpec(source="builtin", name="digits"), settings))
    assert Counter(image.split for image in images) == facts.splits
    assert {image.label for image in images} == set(facts.classes)


def test_every_fifth_digit_of_each_class_is_held_out(settings: Settings) -> None:
    source = open_digits(settings)
    counts = Counter((image.split, image.label) for image in source)
    # The file holds 178 zeros and 182 ones.
    assert (counts["test", "0"], counts["train", "0"]) == (35, 143)
    assert (counts["test", "1"], counts["train", "1"]) == (36, 146)
    assert source.num_images == 1797


def test_the_first_digit_is_a_zero_scaled_to_8_bits(settings: Settings) -> None:
    first = next(iter(open_digits(settings)))
    assert (first.split, first.label, first.path) == ("train", "0", "train/0/00000.png")
    # Its first row is 0 0 5 13 9 1 0 0 of 16.
    assert pixels_of(first.data)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_missing_scikit_learn_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingError) as caught:
        open_digits(settings)
    assert caught.value.code == "dataset_unavailable"


# ------------------------------------------------------------------------------- CIFAR-10 and -100


def python2_pickle(labels_key: bytes, labels: list[int], planes: Pixels) -> bytes:
    """A batch as Python 2 and its NumPy pickled it: planes uint8 [N, 3072]."""

    def text(data: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(data)) + data

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\n"
    array += b"(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) * 2 + b"K\x00tb"
    shape = number(planes.shape[0]) + number(planes.shape[1]) + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(planes.tobytes()) + b"tb"
    numbers = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(labels_key) + numbers + b"u."


def small_cifar(cifar: Cifar, folder: Path, pixels: Pixels, how: str) -> Cifar:
    """Two images in the first file of train and one in that of test, the other files empty of
    images; labels 1, 0 and 1. `how`: an archive, or the folder that comes out of it."""
    planes = pixels.transpose(0, 3, 1, 2).reshape(-1, 3072)
    files, contents = {}, {}
    for split, own in cifar.files.items():
        rows, labels = (planes[:2], [1, 0]) if split == "train" else (planes[2:], [1])
        for name in own:
            contents[f"{cifar.folder}/{name}"] = python2_pickle(cifar.labels_key, labels, rows)
            rows, labels = planes[:0], []
        files[split] = {name: md5(contents[f"{cifar.folder}/{name}"]) for name in own}
    archive = tar_gz({"unrelated": b"", **contents})
    if how == "archive":
        (folder / cifar.archive.path).write_bytes(archive)
    else:
        (folder / cifar.folder).mkdir()
        for name, data in contents.items():
            (folder / name).write_bytes(data)
    return replace(cifar, files=files, archive=replace(cifar.archive, md5=md5(archive)))


@pytest.fixture
def pixels() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("how", ["archive", "folder"])
@pytest.mark.parametrize(
    ("cifar", "first", "second"),
    [(CIFAR10, "automobile", "airplane"), (CIFAR100, "aquarium_fish", "apple")],
)
def test_cifar_is_read_from_its_archive_or_its_folder(
    settings: Settings,
    folder: Path,
    pixels: Pixels,
    cifar: Cifar,
    first: str,
    second: str,
    how: str,
) -> None:
    source = open_cifar(small_cifar(cifar, folder, pixels, how), settings)
    assert found(source) == [("train", first), ("train", second), ("test", first)]
    for image, expected in zip(source, pixels, strict=True):
        assert np.array_equal(pixels_of(image.data), expected)


def test_a_changed_file_in_the_folder_does_not_count(
    settings: Settings, folder: Path, pixels: Pixels
) -> None:
    cifar = small_cifar(CIFAR10, folder, pixels, "folder")
    with (folder / cifar.folder / "test_batch").open("ab") as file:
        file.write(b"x")
    with pytest.raises(TrainingError) as caught:
        open_cifar(cifar, settings)
    assert caught.value.code == "download_failed"


def test_a_pickle_can_run_nothing(settings: Settings, folder: Path, pixels: Pixels) -> None:
    cifar = small_cifar(CIFAR100, folder, pixels, "folder")
    evil = b"\x80\x02cos\nsystem\n" + b"U\x04true\x85R."
    (folder / cifar.folder / "train").write_bytes(evil)
    files = {**cifar.files, "train": {"train": md5(evil)}}
    with pytest.raises(builtin.pickle.UnpicklingError, match=r"os\.system|posix"):
        open_cifar(replace(cifar, files=files), settings)


# ---------------------------------------------------------------------------------- Fashion-MNIST


@pytest.mark.parametrize("how", ["archive", "folder"])
def test_fashion_mnist_is_read_from_its_archives_or_its_folder(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    facts = replace(BUILTIN_DATASETS["fashion_mnist"], splits={"train": 2, "test": 1})
    monkeypatch.setitem(BUILTIN_DATASETS, "fashion_mnist", facts)  # type: ignore[misc]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    files = {}
    for start, own, labels in (("train", pixels[:2], [9, 0]), ("t10k", pixels[2:], [3])):
        header = struct.pack(">HBB3I", 0, 8, 3, len(own), 28, 28)
        files[f"{start}-images-idx3-ubyte"] = header + own.tobytes()
        header = struct.pack(">HBBI", 0, 8, 1, len(own))
        files[f"{start}-labels-idx1-ubyte"] = header + bytes(labels)
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, data in files.items():
        packed = gzip.compress(data)
        monkeypatch.setitem(builtin.FASHION_MNIST_MD5, name, md5(packed))
        if how == "archive":
            (raw / name).write_bytes(data[:-1])  # an extraction that broke off
            (raw / f"{name}.gz").write_bytes(packed)
        else:
            (raw / name).write_bytes(data)
    source = open_builtin("fashion_mnist", settings)
    assert found(source) == [
        ("train", "Ankle boot"),
        ("train", "T-shirt/top"),
        ("test", "Dress"),
    ]
    for image, expected in zip(source, pixels, strict=True):
        assert np.array_equal(pixels_of(image.data), expected)


def test_the_numbers_of_fashion_mnist_name_the_catalogs_classes() -> None:
    assert sorted(builtin.FASHION_MNIST_CLASSES) == list(BUILTIN_DATASETS["fashion_mnist"].classes)


# ------------------------------------------------------------------------- STL-10 and TinyImageNet


@pytest.mark.parametrize("how", ["archive", "folder"])
def test_stl10_and_its_folds_are_read_from_its_archive_or_its_folder(
    settings: Settings, folder: Path, tree: MakeTree, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    image = bytes(96 * 96 * 3)
    files = {
        "test_X.bin": image,
        "test_y.bin": b"\x02",
        "train_X.bin": image * 2,
        "train_y.bin": b"\x01\x0a",
        "unlabeled_X.bin": image,
        "fold_indices.txt": b"0\n" * 3 + b"1\n" * 7,
    }
    archive = tar_gz({f"stl10_binary/{name}": data for name, data in files.items()})
    monkeypatch.setattr(builtin, "STL10", replace(builtin.STL10, md5=md5(archive)))
    for name in builtin.STL10_FILES:
        monkeypatch.setitem(builtin.STL10_FILES, name, md5(files[name]))
    if how == "archive":
        (folder / "stl10_binary.tar.gz").write_bytes(archive)
    else:
        tree(folder / "stl10_binary", files)
    expected = {("train", "airplane"), ("train", "truck"), ("test", "bird")}
    assert set(found(open_builtin("stl10", settings))) == expected
    assert set(found(open_builtin("stl10_fold2", settings))) == expected - {("train", "truck")}
    assert set(found(open_builtin("stl10_fold3", settings))) == expected - {("train", "airplane")}


@pytest.fixture
def small_tinyimagenet(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    files = {
        "train/n01/images/n01_0.JPEG": b"one",
        "train/n01/n01_boxes.txt": b"",
        "train/n02/images/n02_0.JPEG": b"two",
        "val/images/val_0.JPEG": b"three",
        "val/val_annotations.txt": b"val_0.JPEG\tn02\n",
        "words.txt": b"n01\tgoldfish, x\nn02\tox\n",
    }
    facts = replace(BUILTIN_DATASETS["tinyimagenet"], splits={"train": 2, "val": 1})
    monkeypatch.setitem(BUILTIN_DATASETS, "tinyimagenet", facts)  # type: ignore[misc]
    return {f"tiny-imagenet-200/{name}": data for name, data in files.items()}


def put_zip(files: Mapping[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    (folder / "tiny-imagenet-200.zip").write_bytes(file.getvalue())
    known = replace(builtin.TINYIMAGENET, md5=md5(file.getvalue()))
    monkeypatch.setattr(builtin, "TINYIMAGENET", known)


def test_tinyimagenet_comes_as_the_files_of_its_archive(
    settings: Settings,
    folder: Path,
    small_tinyimagenet: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_zip(small_tinyimagenet, folder, monkeypatch)
    images = [(i.split, i.label, i.data) for i in open_builtin("tinyimagenet", settings)]
    assert images == [
        ("train", "goldfish", b"one"),
        ("train", "ox", b"two"),
        ("val", "ox", b"three"),
    ]


def test_a_folder_of_tinyimagenet_counts_when_all_its_images_are_there(
    settings: Settings,
    folder: Path,
    tree: MakeTree,
    small_tinyimagenet: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree(folder, small_tinyimagenet)
    assert open_builtin("tinyimagenet", settings).num_images == 3
    (folder / "tiny-imagenet-200" / "train" / "n01" / "images" / "n01_0.JPEG").unlink()
    with pytest.raises(TrainingError) as caught:
        open_builtin("tinyimagenet", settings)
    assert caught.value.code == "download_failed"
    put_zip(small_tinyimagenet, folder, monkeypatch)
    assert open_builtin("tinyimagenet", settings).num_images == 3
