"""The built-in datasets. Their images become PNG bytes, so that all that follows sees files.

Libraries are only imported, and files only downloaded, when a built-in is used.
"""

from __future__ import annotations

import gzip
import importlib.util
import socket
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import TrainingError
from skipline.catalog import BUILTIN_DATASETS, Split
from worker.datasets.layout import SPLITS, Source, SourceImage
from worker.datasets.locks import exclusive

Pixels = npt.NDArray[np.uint8]

DIGITS_HELD_OUT_EVERY = 5
DOWNLOAD_TIMEOUT_SECONDS = 30.0
CIFAR10_FILE = "cifar-10-python.tar.gz"


def open_digits() -> Source:
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
    return _from_arrays("digits", pixels, labels, splits)


def open_cifar10(cache: Path) -> Source:
    """CIFAR-10 (Krizhevsky, 2009), downloaded below `cache` unless it is there already.

    Raises:
        TrainingError: `download_failed`.
    """
    from torchvision.datasets import CIFAR10

    root = cache / "downloads"
    root.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # torchvision's download sets none
    try:
        with exclusive(root / ".cifar10.lock"):
            parts = [CIFAR10(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError):
        raise TrainingError(
            "download_failed",
            "CIFAR-10 is not on this worker and could not be downloaded",
            f"Put {CIFAR10_FILE} from https://www.cs.toronto.edu/~kriz/cifar.html into the folder "
            "cache/downloads below SKIPLINE_HOME, then retry the job",
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    train, test = parts
    splits: list[Split] = ["train"] * len(train.targets)
    splits += ["test"] * len(test.targets)
    pixels = np.concatenate([train.data, test.data])
    return _from_arrays("cifar10", pixels, [*train.targets, *test.targets], splits)


def _from_arrays(
    name: str, pixels: Pixels, labels: Sequence[int], splits: Sequence[Split]
) -> Source:
    """pixels: uint8 [N, H, W] or [N, H, W, 3]."""
    classes = BUILTIN_DATASETS[name].classes
    places = frozenset((split, classes[label]) for split, label in zip(splits, labels, strict=True))

    def read() -> Iterator[SourceImage]:
        for split in SPLITS:
            for index in (i for i, own in enumerate(splits) if own == split):
                label = classes[labels[index]]
                path = f"{split}/{label}/{index:05d}.png"
                yield SourceImage(split, label, path, png_bytes(pixels[index]))

    return Source(len(labels), pixels.nbytes, places, read)


def png_bytes(pixels: npt.NDArray[Any]) -> bytes:
    """The PNG of uint8 [H, W] or [H, W, 3] of up to 64 KiB, stored without compression.

    Compressors differ from one zlib to the next; stored bytes, and with them the hash of a
    built-in dataset, are the same everywhere.
    """
    height, width = pixels.shape[:2]
    colour_type = 2 if pixels.ndim == 3 else 0
    rows = pixels.reshape(height, -1)
    raw = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # before each row, filter 0: none
    stored = struct.pack("<BHH", 1, len(raw), len(raw) ^ 0xFFFF) + raw
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    body = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
