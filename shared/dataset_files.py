"""A stored dataset: `images.bin`, the image files' bytes one after the other, and `index.json`,
which says where each one lies and what it shows. Knows nothing of image formats."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.errors import TrainingError

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

FORMAT_VERSION = 1
IMAGES_FILE = "images.bin"
INDEX_FILE = "index.json"
LINES_AT_ONCE = 4096


@dataclass(frozen=True)
class SplitIndex:
    """The images of a split, as columns: `offsets` and `sizes` in bytes of `images.bin`, `labels`
    as places in the dataset's classes, `paths` as the source named them.

    Rows are sorted by label, then by the file's SHA-256, so that their order too depends on
    nothing but the images.
    """

    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    paths: list[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Index:
    """What `index.json` holds."""

    hash: str
    classes: list[str]
    splits: dict[str, SplitIndex]


def write_index(index: Index, folder: Path) -> None:
    """Writes `index.json` into the folder and to the disk."""
    with (folder / INDEX_FILE).open("w", encoding="utf-8") as file:
        document = {
            "format_version": FORMAT_VERSION,
            "hash": index.hash,
            "classes": index.classes,
            "splits": {name: vars(split) for name, split in index.splits.items()},
        }
        json.dump(document, file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())


def read_index(folder: Path) -> Index:
    """Reads a stored dataset's index.

    Raises:
        TrainingError: `dataset_damaged` when it or the images are not as they were written.
    """
    try:
        document = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        if document["format_version"] != FORMAT_VERSION:
            raise ValueError("of another version")
        splits = {name: SplitIndex(**columns) for name, columns in document["splits"].items()}
        ends = [
            offset + size
            for split in splits.values()
            for offset, size in zip(split.offsets, split.sizes, strict=True)
        ]
        if (folder / IMAGES_FILE).stat().st_size != max(ends):
            raise ValueError("the images are cut short")
        return Index(document["hash"], document["classes"], splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise dataset_damaged() from None


def content_hash(
    classes: Sequence[str], splits: Mapping[str, tuple[Sequence[int] | Int64, UInt8]]
) -> str:
    """A dataset's hash, from the split, the class and the SHA-256 digest of the file of each image.

    SHA-256, in hexadecimal, over a line of UTF-8 for each image, the lines sorted: split, tab,
    class, tab, the digest in hexadecimal, newline. Splits are those after holding out. Paths,
    names and the order of reading do not enter.

    Args:
        splits: of each, its images' places in `classes` [N], and their digests uint8 [N, 32].
    """
    total = hashlib.sha256()
    # Names hold no character below the tab, so lines are sorted as names and digests are.
    names = np.array(classes, dtype=object)
    ranks = np.argsort(np.argsort(names, kind="stable"), kind="stable")
    for split in sorted(splits):
        labels, digests = splits[split]
        labels = np.asarray(labels, np.int64)
        digests = np.ascontiguousarray(digests)
        order = np.lexsort((*digests.view(">u8").T[::-1], ranks[labels]))
        for first in range(0, len(order), LINES_AT_ONCE):
            part = order[first : first + LINES_AT_ONCE]
            lines = (
                f"{split}\t{classes[label]}\t{digest.tobytes().hex()}\n"
                for label, digest in zip(labels[part].tolist(), digests[part], strict=True)
            )
            total.update("".join(lines).encode())
    return total.hexdigest()


def dataset_damaged() -> TrainingError:
    """What to raise where a stored dataset is not as it was written."""
    return TrainingError(
        "dataset_damaged",
        "The stored dataset is damaged or missing",
        "Delete the dataset and bring it in again; the same images give the same dataset",
    )


def dataset_changed() -> TrainingError:
    """What to raise where the stored files are images, and not those that the hash is of."""
    return TrainingError(
        "dataset_changed",
        "The stored files are not those that the dataset was made of: its hash is another now",
        "Delete the dataset and bring it in again; what is trained on the files as they are now "
        "could not be told from what was trained before",
    )
