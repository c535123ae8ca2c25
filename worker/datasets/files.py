"""Images decoded from the stored originals whenever they are read, for datasets too large to pack.

They equal the packed ones, pixel for pixel. Knows the stored form and the shared preprocessing;
nothing of jobs, databases or training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from shared.dataset_files import (
    IMAGES_FILE,
    INDEX_FILE,
    ROWS_FILE,
    Index,
    SplitIndex,
    content_hash,
    dataset_changed,
    dataset_damaged,
    read_index,
)
from worker.datasets.disk import full_disk_is_reported
from worker.datasets.locks import Interrupted, exclusive, never
from worker.datasets.packing import decode_square
from worker.datasets.parallel import decode_threads, map_ordered

MARKER_FILE = "verified.json"
ROWS_AT_ONCE = 64

Int64 = npt.NDArray[np.int64]


@dataclass(eq=False)
class FileImages:
    """The images of a split: `offsets` and `sizes` in bytes of the file `path`, and `labels`, all
    int64 [N].

    Holds no open file, so that it can be handed to other processes however they are started, and
    used by several threads.
    """

    path: Path
    image_size: int
    max_pixels: int
    offsets: Int64
    sizes: Int64
    labels: Int64

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: Int64) -> npt.NDArray[np.uint8]:
        """The images in these rows (int64 [B]): uint8 [B, S, S, 3].

        Raises:
            TrainingError: `dataset_damaged`.
        """
        size = self.image_size
        images = np.empty((len(rows), size, size, 3), np.uint8)
        with _opened(self.path) as file:
            for place, row in enumerate(rows):
                data = os.pread(file.fileno(), int(self.sizes[row]), int(self.offsets[row]))
                images[place] = decode_square(data, size, self.max_pixels)
        return images


@dataclass(frozen=True)
class FileDataset:
    """A stored dataset to be read at `image_size` pixels; `counts`: images of each split."""

    folder: Path
    image_size: int
    max_pixels: int
    index: Index

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.index.classes)

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(split) for name, split in self.index.splits.items()}

    def split(self, name: str) -> FileImages:
        """The images of a split.

        Raises:
            KeyError: there is no such split.
        """
        split = self.index.splits[name]
        columns = (np.array(column) for column in (split.offsets, split.sizes, split.labels))
        return FileImages(self.folder / IMAGES_FILE, self.image_size, self.max_pixels, *columns)


def open_files(
    dataset_folder: Path,
    image_size: int,
    cache_root: Path,
    dataset_hash: str,
    *,
    max_pixels: int,
    num_threads: int = 0,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = never,
) -> FileDataset:
    """The stored dataset, once its files are found to be those that `dataset_hash` is of.

    That they are is noted in the cache, together with their sizes and times, so that they are
    hashed again only after a change. One process hashes while others that want them wait.

    Raises:
        TrainingError: `dataset_damaged`, `dataset_changed`, `disk_full`.
        Interrupted: `should_stop()` became true, while hashing or while waiting.
    """
    index = read_index(dataset_folder)
    parent = cache_root / dataset_hash
    parent.mkdir(parents=True, exist_ok=True)
    marker = parent / MARKER_FILE
    with full_disk_is_reported(), exclusive(parent / f".{MARKER_FILE}.lock", should_stop):
        stamp = _stamp(dataset_folder)
        if not _is_marked(marker, stamp):
            marker.unlink(missing_ok=True)
            found = _hash(index, dataset_folder / IMAGES_FILE, num_threads, progress, should_stop)
            if found != dataset_hash:
                raise dataset_changed()
            partial = parent / f".{MARKER_FILE}.partial"
            partial.write_text(json.dumps(stamp), encoding="utf-8")
            partial.replace(marker)
    return FileDataset(dataset_folder, image_size, max_pixels, index)


def _stamp(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and time of the last change, in nanoseconds, of each stored file."""
    try:
        states = {name: (folder / name).stat() for name in (IMAGES_FILE, INDEX_FILE)}
        if (folder / ROWS_FILE).exists():  # not so in the first version
            states[ROWS_FILE] = (folder / ROWS_FILE).stat()
    except OSError:
        raise dataset_damaged() from None
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _is_marked(marker: Path, stamp: dict[str, list[int]]) -> bool:
    try:
        return bool(json.loads(marker.read_text(encoding="utf-8")) == stamp)
    except (OSError, ValueError):
        return False


def _hash(
    index: Index,
    path: Path,
    num_threads: int,
    progress: Callable[[int, int | None], None],
    should_stop: Callable[[], bool],
) -> str:
    """The content hash of the files as they are now, read in the order in which they lie."""
    digests = {name: np.empty((len(split), 32), np.uint8) for name, split in index.splits.items()}
    num_images = sum(map(len, digests.values()))
    threads = decode_threads(path.stat().st_size / num_images, num_threads)
    done = 0
    with _opened(path) as file:
        for name, split in index.splits.items():
            order = np.argsort(split.offsets)

            def digest(start: int, name: str, split: SplitIndex, order: Int64) -> int:
                rows = order[start : start + ROWS_AT_ONCE]
                for row in rows:
                    data = os.pread(file.fileno(), int(split.sizes[row]), int(split.offsets[row]))
                    digests[name][row] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
                return len(rows)

            work = partial(digest, name=name, split=split, order=order)
            starts = range(0, len(split), ROWS_AT_ONCE)
            with closing(map_ordered(work, starts, threads)) as batches:
                for count in batches:
                    if should_stop():
                        raise Interrupted
                    done += count
                    progress(done, num_images)
    seen = {name: (split.labels, digests[name]) for name, split in index.splits.items()}
    return content_hash(index.classes, seen)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError:
        raise dataset_damaged() from None
