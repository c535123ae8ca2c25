"""The files of stored datasets, opened to show single images.

A dataset's index is read once, however many ask for it, and the last few are kept.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.dataset_files import IMAGES_FILE, Index, SplitIndex, read_index
from shared.errors import DatasetDamaged, ImageNotFound, InvalidInput, TrainingError
from shared.storage import Storage

MAX_KEPT_IMAGES = 2_000_000
"""Listed in the indexes that are kept."""


@dataclass(frozen=True)
class StoredDataset:
    """A dataset's index and where its files lie."""

    folder: Path
    index: Index

    def split(self, name: str) -> SplitIndex:
        """Raises `InvalidInput`, which names those there are."""
        if name not in self.index.splits:
            message = f"There is no such split; choose one of: {', '.join(self.index.splits)}"
            raise InvalidInput(message, errors=[{"loc": "split", "message": message}])
        return self.index.splits[name]

    def rows(self, split: str, label: str | None) -> range:
        """The places of a split's images, or of those with a label: they lie beside each other.
        Raises `InvalidInput`."""
        found = self.split(split)
        if label is None:
            return range(len(found))
        if label not in self.index.classes:
            message = "There is no such class in the dataset"
            raise InvalidInput(message, errors=[{"loc": "label", "message": message}])
        place = self.index.classes.index(label)
        first, beyond = np.searchsorted(found.labels, [place, place + 1]).tolist()
        return range(first, beyond)

    def read(self, split: str, row: int) -> bytes:
        """The file of an image. Raises `ImageNotFound`, `DatasetDamaged`."""
        found = self.index.splits.get(split)
        if found is None or not 0 <= row < len(found):
            raise ImageNotFound("There is no such image in the dataset")
        try:
            with (self.folder / IMAGES_FILE).open("rb") as file:
                return os.pread(file.fileno(), int(found.sizes[row]), int(found.offsets[row]))
        except OSError:
            raise _damaged() from None


class StoredDatasets:
    """Opens datasets by their keys in the storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._kept: OrderedDict[str, StoredDataset] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, key: str) -> StoredDataset:
        """Raises `DatasetDamaged`."""
        with self._lock:  # Who asks for one that is just read waits for it.
            if key not in self._kept:
                folder = self._storage.path(key)
                try:
                    self._kept[key] = StoredDataset(folder, read_index(folder))
                except TrainingError:
                    raise _damaged() from None
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and self._num_images() > MAX_KEPT_IMAGES:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _num_images(self) -> int:
        return sum(
            len(split) for kept in self._kept.values() for split in kept.index.splits.values()
        )


def _damaged() -> DatasetDamaged:
    return DatasetDamaged(
        "The dataset's files are damaged or missing: delete it, and bring the same images in again"
    )
