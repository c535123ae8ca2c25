"""STL-10 as it is published: pixels of many images in one file, labels in another (Coates, Ng &
Lee, 2011).

    train_X.bin  test_X.bin     96x96 pixels, three planes an image, each column by column
    train_y.bin  test_y.bin     a byte for each image: its class, counted from 1
    class_names.txt             a name on each line
    fold_indices.txt            ten lines of 1,000 places in train, for ten smaller trainings

The images without labels, unlabeled_X.bin, are not read. Knows nothing of disks or archives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shared.errors import TrainingError
from skipline.catalog import BUILTIN_DATASETS, Split
from worker.datasets.layout import Listing, Parts, Read, SourceImage, Survey
from worker.datasets.png import png_bytes

SIDE = 96
"""Pixels."""
IMAGE_BYTES = 3 * SIDE * SIDE
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Stl10:
    """The files in `folder`. `labels`: of each image of a split, None for those left out."""

    folder: Parts
    labels: dict[Split, list[str | None]]
    has_large_files = True

    def survey(self, listing: Listing) -> Survey:
        """Raises `TrainingError` `bad_layout` when images and labels do not fit."""
        for split, labels in self.labels.items():
            size = listing.sizes[(*self.folder, f"{split}_X.bin")]
            if size != len(labels) * IMAGE_BYTES:
                raise _bad(f"{split}_y.bin has {len(labels)} labels, {split}_X.bin {size} bytes")
        wanted = [
            (split, label)
            for split, own in self.labels.items()
            for label in own
            if label is not None
        ]
        return Survey(len(wanted), len(wanted) * IMAGE_BYTES, frozenset(wanted))

    def wants(self, file: Parts) -> bool:
        return self._split(file) is not None

    def images(self, file: Parts, read: Read) -> Iterator[SourceImage]:
        split = self._split(file)
        assert split is not None
        for row, label in enumerate(self.labels[split]):
            data = read(IMAGE_BYTES)
            if label is not None:
                pixels = np.frombuffer(data, np.uint8).reshape(3, SIDE, SIDE).transpose(2, 1, 0)
                yield SourceImage(split, label, f"{split}/{label}/{row:05d}.png", png_bytes(pixels))

    def _split(self, file: Parts) -> Split | None:
        found = (split for split in self.labels if file == (*self.folder, f"{split}_X.bin"))
        return next(found, None)


def find_stl10(listing: Listing, fold: int | None = None) -> Stl10 | None:
    """The layout of a tree that has it, in one folder at any depth; else None.

    `fold`: the predefined tenth of train, 0 to 9; None takes train whole.

    Raises:
        TrainingError: `bad_layout`.
    """
    folders = [
        file[:-1]
        for file in listing.sizes
        if file[-1] == "train_X.bin" and (*file[:-1], "train_y.bin") in listing.notes
    ]
    if len(folders) != 1:
        return None
    folder = folders[0]
    text = listing.notes.get((*folder, "class_names.txt"), b"").decode("utf-8", "replace")
    names = [line.strip() for line in text.splitlines() if line.strip()] or list(
        BUILTIN_DATASETS["stl10"].classes
    )
    labels: dict[Split, list[str | None]] = {}
    for split in SPLITS:
        note = listing.notes.get((*folder, f"{split}_y.bin"))
        if note is not None and (*folder, f"{split}_X.bin") in listing.sizes:
            if not all(1 <= number <= len(names) for number in note):
                raise _bad(f"{split}_y.bin has labels that are none of {len(names)} classes")
            labels[split] = [names[number - 1] for number in note]
    if fold is not None:
        note = listing.notes.get((*folder, "fold_indices.txt"), b"")
        rows = _fold_rows(note, fold, len(labels["train"]))
        labels["train"] = [
            label if row in rows else None for row, label in enumerate(labels["train"])
        ]
    return Stl10(folder, labels)


def _fold_rows(note: bytes, fold: int, num_images: int) -> set[int]:
    try:
        rows = {int(word) for word in note.decode().splitlines()[fold].split()}
    except (ValueError, IndexError):
        raise _bad(f"fold_indices.txt does not name the images of fold {fold}") from None
    if not rows or not rows <= set(range(num_images)):
        raise _bad(f"fold_indices.txt names images in fold {fold} that are not there")
    return rows


def _bad(detail: str) -> TrainingError:
    return TrainingError(
        "bad_layout",
        f"The files of STL-10 do not fit together: {detail}",
        "Copy the folder stl10_binary anew, and see that the copy is complete",
    )
