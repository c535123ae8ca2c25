"""Packs a stored dataset for one image size: decoded once, memory-mapped ever after.

A packed dataset is a folder `<cache>/<hash>/<size>` with two files for each split, the images as
uint8 [N, S, S, 3] and the labels as int64 [N], and `pack.json`. It can be deleted at any time.
Knows the stored form and the shared preprocessing; nothing of jobs, databases or training.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.dataset_files import (
    IMAGES_FILE,
    Index,
    SplitIndex,
    content_hash,
    dataset_changed,
    dataset_damaged,
    read_index,
)
from shared.errors import AppError
from shared.images import decode_image, to_square
from worker.datasets import cache
from worker.datasets.disk import check_free_disk, full_disk_is_reported
from worker.datasets.locks import Interrupted, exclusive, never
from worker.datasets.parallel import decode_threads, map_ordered

UInt8 = npt.NDArray[np.uint8]

FORMAT_VERSION = 1
PACK_FILE = "pack.json"
BATCH_BYTES = 4 * 2**20
LABEL_BYTES = 8


@dataclass(frozen=True)
class PackedDataset:
    """A dataset ready to be read, every image a square of `image_size` pixels; `counts`: images
    of each split that exists."""

    folder: Path
    image_size: int
    classes: tuple[str, ...]
    counts: dict[str, int]

    def split(self, name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Images uint8 [N, S, S, 3] and labels int64 [N], mapped read-only.

        Raises:
            KeyError: there is no such split.
        """
        count, size = self.counts[name], self.image_size
        images = np.memmap(
            self.folder / f"{name}.images", np.uint8, "r", shape=(count, size, size, 3)
        )
        labels = np.memmap(self.folder / f"{name}.labels", np.int64, "r", shape=(count,))
        return images, labels


def pack(
    dataset_folder: Path,
    image_size: int,
    cache_root: Path,
    dataset_hash: str,
    *,
    max_pixels: int,
    reserved_bytes: int = 0,
    num_threads: int = 0,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = never,
) -> PackedDataset:
    """The dataset packed for `image_size` pixels; made if it is not in the cache, or damaged there.

    One process makes it while others that want it wait; what a killed one left is cleared away.
    It appears in the cache whole or not at all, and only if the stored files are those that
    `dataset_hash` is of. It stays there as long as this process lives, unless somebody deletes it
    by hand. `reserved_bytes` of disk are left free; `num_threads`: 0 takes as many as cores.

    Raises:
        TrainingError: `dataset_damaged`, `dataset_changed`, `disk_full`.
        Interrupted: `should_stop()` became true, while packing or while waiting.
    """
    parent = cache_root / dataset_hash
    target = parent / str(image_size)
    lock, building = cache.lock_path(target), cache.partial_path(target)
    if (packed := _open(target, image_size)) is not None:
        return packed
    parent.mkdir(parents=True, exist_ok=True)
    with full_disk_is_reported(), exclusive(lock, should_stop):
        if (packed := _open(target, image_size)) is not None:
            return packed
        for leftover in (building, target):
            shutil.rmtree(leftover, ignore_errors=True)
        index = read_index(dataset_folder)
        num_images = sum(map(len, index.splits.values()))
        num_bytes = num_images * (image_size**2 * 3 + LABEL_BYTES)
        check_free_disk(parent, num_bytes, reserved_bytes)
        mean_bytes = (dataset_folder / IMAGES_FILE).stat().st_size / num_images
        threads = decode_threads(mean_bytes, num_threads)
        packer = _Packer(dataset_folder, building, image_size, dataset_hash, max_pixels, threads)
        try:
            building.mkdir()
            done = 0
            for count in packer.write_all(index):
                if should_stop():
                    raise Interrupted
                done += count
                progress(done, num_images)
            building.rename(target)
            _sync(parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    packed = _open(target, image_size)
    assert packed is not None
    return packed


def _open(folder: Path, image_size: int) -> PackedDataset | None:
    """The packed dataset there, if it is whole; kept by this process from being cleared away."""
    if not cache.hold(folder):
        return None
    try:
        facts = json.loads((folder / PACK_FILE).read_text(encoding="utf-8"))
        packed = PackedDataset(folder, image_size, tuple(facts["classes"]), dict(facts["counts"]))
        is_whole = facts["format_version"] == FORMAT_VERSION and all(
            (folder / f"{name}.images").stat().st_size == count * image_size**2 * 3
            and (folder / f"{name}.labels").stat().st_size == count * LABEL_BYTES
            for name, count in packed.counts.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return packed if is_whole else None


@dataclass(frozen=True)
class _Packer:
    """Writes splits into `folder` with plain writes: a full disk is an error, while under a
    memory map it would kill the process."""

    dataset_folder: Path
    folder: Path
    image_size: int
    dataset_hash: str
    max_pixels: int
    num_threads: int

    def write_all(self, index: Index) -> Iterator[int]:
        """Yields how many images each batch had, once it is written; at the end all is on disk.

        Raises:
            TrainingError: `dataset_damaged`, `dataset_changed`.
        """
        seen: dict[str, tuple[npt.NDArray[np.int64], UInt8]] = {}
        for name, split in index.splits.items():
            digests = np.empty((len(split), 32), np.uint8)
            seen[name] = (split.labels, digests)
            done = 0
            for batch in self._write_split(name, split):
                beyond = done + len(batch)
                digests[done:beyond] = np.frombuffer(b"".join(batch), np.uint8).reshape(-1, 32)
                done = beyond
                yield len(batch)
        if content_hash(index.classes, seen) != self.dataset_hash:
            raise dataset_changed()
        facts = {
            "format_version": FORMAT_VERSION,
            "image_size": self.image_size,
            "classes": index.classes,
            "counts": {name: len(split) for name, split in index.splits.items()},
        }
        (self.folder / PACK_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for file in (*self.folder.iterdir(), self.folder):
            _sync(file)

    def _write_split(self, name: str, split: SplitIndex) -> Iterator[list[bytes]]:
        """Yields the SHA-256 digests of each batch's files."""
        np.array(split.labels, dtype=np.int64).tofile(self.folder / f"{name}.labels")
        step = max(1, min(64, BATCH_BYTES // (self.image_size**2 * 3)))
        starts = range(0, len(split), step)
        with (
            (self.dataset_folder / IMAGES_FILE).open("rb") as stored,
            (self.folder / f"{name}.images").open("wb") as packed,
        ):

            def decode(start: int) -> tuple[npt.NDArray[np.uint8], list[bytes]]:
                rows = range(start, min(start + step, len(split)))
                sizes, offsets = split.sizes[start : rows.stop], split.offsets[start : rows.stop]
                spans = zip(sizes.tolist(), offsets.tolist(), strict=True)
                files = [os.pread(stored.fileno(), size, offset) for size, offset in spans]
                squares = [decode_square(data, self.image_size, self.max_pixels) for data in files]
                return np.stack(squares), [hashlib.sha256(data).digest() for data in files]

            with closing(map_ordered(decode, starts, self.num_threads)) as batches:
                for images, digests in batches:
                    packed.write(images.data)
                    yield digests


def decode_square(data: bytes, image_size: int, max_pixels: int) -> npt.NDArray[np.uint8]:
    """A stored file as training sees it: uint8 [S, S, 3].

    Raises:
        TrainingError: `dataset_damaged`.
    """
    try:
        return to_square(decode_image(data, max_pixels), image_size)
    except AppError:
        raise dataset_damaged() from None


def _sync(path: Path) -> None:
    """Brings a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
