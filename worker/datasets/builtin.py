"""The built-in datasets, from their original files: the archives as they were published, or the
folders that torchvision or a user extracted from them.

What is no file yet becomes PNG bytes, so that all that follows sees files. Libraries are only
imported, and files only downloaded, when a built-in is used.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from shared.errors import TrainingError
from shared.settings import Settings
from skipline.catalog import BUILTIN_DATASETS, NUM_STL10_FOLDS, Split
from worker.datasets.archives import open_archive
from worker.datasets.downloads import Original, fetch, has_md5
from worker.datasets.folders import open_folder
from worker.datasets.layout import SPLITS, Layout, Listing, Source, SourceImage
from worker.datasets.locks import never
from worker.datasets.png import png_bytes
from worker.datasets.stl10 import find_stl10

Pixels = npt.NDArray[np.uint8]
ShouldStop = Callable[[], bool]

DIGITS_HELD_OUT_EVERY = 5


def open_builtin(name: str, settings: Settings, should_stop: ShouldStop = never) -> Source:
    """The built-in dataset of this name.

    Raises:
        TrainingError: `unknown_dataset`; `dataset_unavailable` without the library that ships it;
            `download_failed`; `disk_full`.
        Interrupted: `should_stop()` became true.
    """
    if name not in OPENERS:
        raise TrainingError(
            "unknown_dataset",
            f"There is no built-in dataset {name}",
            "GET /datasets lists the built-in ones",
        )
    return OPENERS[name](settings, should_stop)


def downloads_of(settings: Settings) -> Path:
    """The folder where original files are looked for and put."""
    return settings.cache_path / "downloads"


# ----------------------------------------------------------------------------------------- digits


def open_digits(settings: Settings, should_stop: ShouldStop = never) -> Source:
    """UCI handwritten digits: 1,797 grey images of 8x8 pixels (Alpaydin & Kaynak, 1998), as
    scikit-learn packages them; scikit-learn itself is not imported.

    The fifth, tenth, ... image of each class, in the order of the file, is `test`.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise TrainingError(
            "dataset_unavailable",
            "The digits are shipped with scikit-learn, which is not installed on this worker",
            "Install scikit-learn: pip install scikit-learn",
        )
    table = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(table, "rt") as lines:
        values = np.loadtxt(lines, delimiter=",")
    pixels = np.rint(values[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = values[:, -1].astype(int).tolist()
    seen = [0] * 10
    splits: list[Split] = []
    for label in labels:
        seen[label] += 1
        splits.append("train" if seen[label] % DIGITS_HELD_OUT_EVERY else "test")
    return _from_arrays(BUILTIN_DATASETS["digits"].classes, pixels, labels, splits)


# ------------------------------------------------------------------------------- CIFAR-10 and -100


@dataclass(frozen=True)
class Cifar:
    """One of the two datasets of Krizhevsky (2009). `files`: the pickled batches in `folder`, by
    split, with the MD5 of each."""

    name: str
    title: str
    archive: Original
    folder: str
    files: Mapping[Split, Mapping[str, str]]
    labels_key: bytes


CIFAR10 = Cifar(
    name="cifar10",
    title="CIFAR-10",
    archive=Original(
        "cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
    ),
    folder="cifar-10-batches-py",
    files={
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    },
    labels_key=b"labels",
)
CIFAR100 = Cifar(
    name="cifar100",
    title="CIFAR-100",
    archive=Original(
        "cifar-100-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
    ),
    folder="cifar-100-python",
    files={
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    },
    labels_key=b"fine_labels",
)


def open_cifar(cifar: Cifar, settings: Settings, should_stop: ShouldStop = never) -> Source:
    """CIFAR-10 or CIFAR-100 (its fine labels)."""
    root = downloads_of(settings)
    files = {name: md5 for own in cifar.files.values() for name, md5 in own.items()}
    if all(has_md5(root / cifar.folder / name, md5) for name, md5 in files.items()):
        contents = {name: (root / cifar.folder / name).read_bytes() for name in files}
    else:
        archive = fetch(cifar.title, cifar.archive, root, should_stop)
        contents = _members(archive, cifar.folder, files)
    pixels, labels, splits = [], [], []
    for split, own in cifar.files.items():
        for name in own:
            batch = _CifarUnpickler(BytesIO(contents.pop(name)), encoding="bytes").load()
            pixels.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += batch[cifar.labels_key]
            splits += [split] * len(batch[cifar.labels_key])
    return _from_arrays(
        BUILTIN_DATASETS[cifar.name].classes, np.concatenate(pixels), labels, splits
    )


def _members(archive: Path, folder: str, names: Mapping[str, str]) -> dict[str, bytes]:
    """These files of a tar whose hash has been checked."""
    contents = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(f"{folder}/")
            if name in names and (file := tar.extractfile(member)) is not None:
                contents[name] = file.read()
    return contents


class _CifarUnpickler(pickle.Unpickler):
    """Knows the three names that these pickles of Python 2 hold, so that no file can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module == "numpy.core.multiarray":
            return super().find_class(module, name)
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return lambda kind, align, copy: np.dtype(kind, align=bool(align), copy=bool(copy))
        raise pickle.UnpicklingError(f"{module}.{name} has no place in this file")


# ---------------------------------------------------------------------------------- Fashion-MNIST


FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
"""In the order of their numbers, while the catalog's are sorted."""
FASHION_MNIST_FOLDER = "FashionMNIST/raw"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
"""Of the compressed files."""
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION_MNIST_SIDE = 28


def open_fashion_mnist(settings: Settings, should_stop: ShouldStop = never) -> Source:
    """Fashion-MNIST: 70,000 grey images of 28x28 pixels (Xiao, Rasul & Vollgraf, 2017)."""
    pixels, labels = [], []
    splits: list[Split] = []
    for split, count in BUILTIN_DATASETS["fashion_mnist"].splits.items():
        start = "train" if split == "train" else "t10k"
        shape = (count, FASHION_MNIST_SIDE, FASHION_MNIST_SIDE)
        pixels.append(_idx(f"{start}-images-idx3-ubyte", shape, settings, should_stop))
        labels += _idx(f"{start}-labels-idx1-ubyte", shape[:1], settings, should_stop).tolist()
        splits += [cast(Split, split)] * count
    return _from_arrays(FASHION_MNIST_CLASSES, np.concatenate(pixels), labels, splits)


def _idx(name: str, shape: tuple[int, ...], settings: Settings, should_stop: ShouldStop) -> Pixels:
    """The array in a file of MNIST's format: uint8 of `shape`. An extracted file has no published
    hash; it counts when its header and its size are right."""
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    root = downloads_of(settings)
    extracted = root / FASHION_MNIST_FOLDER / name
    if extracted.is_file():
        data = extracted.read_bytes()
        if data.startswith(header) and len(data) == len(header) + math.prod(shape):
            return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
    path = f"{FASHION_MNIST_FOLDER}/{name}.gz"
    original = Original(path, f"{FASHION_MNIST_URL}/{name}.gz", FASHION_MNIST_MD5[name])
    with gzip.open(fetch("Fashion-MNIST", original, root, should_stop)) as file:
        data = file.read()
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def _from_arrays(
    names: Sequence[str], pixels: Pixels, labels: Sequence[int], splits: Sequence[Split]
) -> Source:
    """pixels: uint8 [N, H, W] or [N, H, W, 3]; names: of the classes, by their number."""
    places = frozenset((split, names[label]) for split, label in zip(splits, labels, strict=True))

    def read() -> Iterator[SourceImage]:
        for split in SPLITS:
            for index in (i for i, own in enumerate(splits) if own == split):
                label = names[labels[index]]
                path = f"{split}/{label}/{index:05d}.png"
                yield SourceImage(split, label, path, png_bytes(pixels[index]))

    return Source(len(labels), pixels.nbytes, places, read)


# ------------------------------------------------------------------------------------------ STL-10


STL10 = Original(
    "stl10_binary.tar.gz",
    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    "91f7769df0f17e558f3565bffb0c7dfb",
)
STL10_FOLDER = "stl10_binary"
STL10_FILES = {
    "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "train_y.bin": "5a34089d4802c674881badbb80307741",
    "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
}


def open_stl10(
    settings: Settings, should_stop: ShouldStop = never, *, fold: int | None = None
) -> Source:
    """STL-10; of its training images those of a predefined fold, 0 to 9, or all."""
    root = downloads_of(settings)
    folder = root / STL10_FOLDER

    def find(listing: Listing) -> Layout:
        layout = find_stl10(listing, fold)
        assert layout is not None, "its hash has been checked"
        return layout

    if all(has_md5(folder / name, md5, should_stop) for name, md5 in STL10_FILES.items()):
        return open_folder(folder, settings, find)
    return open_archive(fetch("STL-10", STL10, root, should_stop), settings, find)


# ------------------------------------------------------------------------------------ TinyImageNet


TINYIMAGENET = Original(
    "tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
TINYIMAGENET_FOLDER = "tiny-imagenet-200"


def open_tinyimagenet(settings: Settings, should_stop: ShouldStop = never) -> Source:
    """TinyImageNet with its 200 classes, as the JPEG files that it is. An extracted folder has no
    published hash; it counts when all images are there."""
    root = downloads_of(settings)
    if (root / TINYIMAGENET_FOLDER).is_dir():
        source = open_folder(root / TINYIMAGENET_FOLDER, settings)
        if source.num_images == sum(BUILTIN_DATASETS["tinyimagenet"].splits.values()):
            return source
    return open_archive(fetch("TinyImageNet", TINYIMAGENET, root, should_stop), settings)


OPENERS: Mapping[str, Callable[[Settings, ShouldStop], Source]] = {
    "digits": open_digits,
    "cifar10": partial(open_cifar, CIFAR10),
    "cifar100": partial(open_cifar, CIFAR100),
    "fashion_mnist": open_fashion_mnist,
    "stl10": open_stl10,
    **{f"stl10_fold{fold}": partial(open_stl10, fold=fold) for fold in range(NUM_STL10_FOLDS)},
    "tinyimagenet": open_tinyimagenet,
}
