"""A stored dataset: `images.bin`, the image files' bytes one after the other, and an index that
says where each one lies and what it shows. Knows nothing of image formats.

The index is three files: `index.json` with the classes and how many images each split has;
`index.rows` with 32 bytes for each image, split by split; and `index.paths` with the texts of their
paths. The first version had all of it in `index.json`, and is read still.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from shared.errors import TrainingError

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

FORMAT_VERSION = 2
IMAGES_FILE = "images.bin"
INDEX_FILE, ROWS_FILE, PATHS_FILE = "index.json", "index.rows", "index.paths"
ROW = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i8"), ("path_end", "<i8")])
"""`path_end`: of the image's path in `index.paths`, where the next one's begins."""
LINES_AT_ONCE = 4096


class Paths(Sequence[str]):
    """Texts in one run of bytes, UTF-8. `starts`, `ends`: int64 [N], where each lies in it."""

    def __init__(self, text: bytes | bytearray, starts: Int64, ends: Int64) -> None:
        self._text, self._starts, self._ends = text, starts, ends

    def select(self, rows: Int64) -> Paths:
        """Those in these rows (int64 [M])."""
        return Paths(self._text, self._starts[rows], self._ends[rows])

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        return self._text[int(self._starts[place]) : int(self._ends[place])].decode()


@dataclass(frozen=True, eq=False)
class SplitIndex:
    """The images of a split, as columns: `offsets` and `sizes` int64 [N], in bytes of `images.bin`;
    `labels` int64 [N], places in the dataset's classes; `paths`, as the source named them.

    Rows are sorted by label, then by the file's SHA-256, so that their order too depends on
    nothing but the images.
    """

    offsets: Int64
    sizes: Int64
    labels: Int64
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Index:
    """What is known of a stored dataset's files."""

    hash: str
    classes: list[str]
    splits: dict[str, SplitIndex]


def write_index(index: Index, folder: Path) -> None:
    """Writes the index's files into the folder and to the disk."""
    document = {
        "format_version": FORMAT_VERSION,
        "hash": index.hash,
        "classes": index.classes,
        "splits": {name: len(split) for name, split in index.splits.items()},
    }
    _write(folder / INDEX_FILE, [json.dumps(document, indent=1).encode()])
    rows = []
    num_bytes = 0
    with (folder / PATHS_FILE).open("wb") as file:
        for split in index.splits.values():
            table = np.empty(len(split), ROW)
            table["offset"], table["size"] = split.offsets, split.sizes
            table["label"] = split.labels
            for place, path in enumerate(split.paths):
                num_bytes += file.write(path.encode())
                table["path_end"][place] = num_bytes
            rows.append(table)
        _flush(file)
    _write(folder / ROWS_FILE, (table.tobytes() for table in rows))


def _write(path: Path, parts: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        _flush(file)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def read_index(folder: Path) -> Index:
    """Reads a stored dataset's index.

    Raises:
        TrainingError: `dataset_damaged` when it or the images are not as they were written.
    """
    try:
        document = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        match document["format_version"]:
            case 1:
                splits = {name: _from_lists(**lists) for name, lists in document["splits"].items()}
            case 2:
                splits = _from_rows(folder, document["splits"])
            case _:
                raise ValueError("of another version")
        end = max(int((split.offsets + split.sizes).max()) for split in splits.values())
        if (folder / IMAGES_FILE).stat().st_size != end:
            raise ValueError("the images are cut short")
        return Index(document["hash"], document["classes"], splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise dataset_damaged() from None


def _from_lists(
    offsets: list[int], sizes: list[int], labels: list[int], paths: list[str]
) -> SplitIndex:
    return SplitIndex(
        np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(labels, np.int64), paths
    )


def _from_rows(folder: Path, counts: Mapping[str, int]) -> dict[str, SplitIndex]:
    rows = np.fromfile(folder / ROWS_FILE, ROW)
    text = (folder / PATHS_FILE).read_bytes()
    if (folder / ROWS_FILE).stat().st_size != sum(counts.values()) * ROW.itemsize:
        raise ValueError("the rows are cut short")
    if len(text) != rows["path_end"][-1]:
        raise ValueError("the paths are cut short")
    paths = Paths(text, np.append(0, rows["path_end"][:-1]), rows["path_end"])
    splits = {}
    first = 0
    for name, count in counts.items():
        places = np.arange(first, first + count)
        own = rows[places]
        columns = own["offset"], own["size"], own["label"]
        splits[name] = SplitIndex(*columns, paths.select(places))
        first += count
    return splits


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
