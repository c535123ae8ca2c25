"""Brings a dataset in: checks every image, splits, counts, and writes one immutable folder.

Knows sources and the stored form; nothing of databases, jobs or storage. The caller gives an empty
folder of its own, puts it into place when `ingest` returns and deletes it when it raises.
"""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from shared.errors import BadImage, ImageTooLarge, TrainingError
from shared.settings import Settings
from shared.vision.preprocessing import decode_image
from skipline.catalog import Split, default_image_size
from skipline.schemas import Problem, SplitInfo
from worker.datasets.disk import check_free_disk, full_disk_is_reported
from worker.datasets.index import IMAGES_FILE, Index, SplitIndex, content_hash, write_index
from worker.datasets.layout import (
    LAYOUT_HINT,
    NUM_EXAMPLES,
    SPLITS,
    Source,
    SourceImage,
    warning,
)
from worker.datasets.locks import Interrupted, never
from worker.datasets.parallel import batched, decode_threads, map_ordered
from worker.datasets.splits import split_train

BATCH_BYTES = 8 * 2**20
ID_DIGITS = 26
LEVELS = np.arange(256, dtype=np.int64)
POWERS = np.stack([LEVELS, LEVELS**2], axis=1)


@dataclass(frozen=True)
class DatasetRecord:
    """What is known of a dataset once it is in: `skipline.schemas.Dataset` but for its time."""

    id: str
    name: str
    hash: str
    num_classes: int
    classes: list[str]
    splits: dict[str, SplitInfo]
    image_size: int
    channel_mean: list[float]
    channel_std: list[float]
    channel_image_std: list[float]
    problems: list[Problem]


def ingest(
    source: Source,
    name: str,
    val_fraction: float | None,
    seed: int,
    folder: Path,
    settings: Settings,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = never,
) -> DatasetRecord:
    """Reads every image of the source and writes `images.bin` and `index.json` into `folder`.

    Files that do not decode are left out and listed under `problems`. What is written depends on
    the images, `val_fraction` and `seed` only, not on the order in which the source yields them,
    but for the place of each file within `images.bin`.

    Raises:
        TrainingError: `no_images`, `no_readable_images`, `no_train_images`, `too_few_classes`,
            `too_many_classes`, `classes_differ`, `val_exists`, `val_fraction_too_large`,
            `dataset_too_large`, `disk_full`, or what reading the source raises.
        Interrupted: `should_stop()` became true.
    """
    _check_source(source, val_fraction, settings)
    check_free_disk(folder, source.num_bytes, settings.reserved_disk_bytes)
    with full_disk_is_reported():
        images, unreadable = _read_images(source, folder, settings, progress, should_stop)
    if not len(images):
        examples = ", ".join(unreadable["unreadable_images"][:3] or unreadable["images_too_large"])
        raise TrainingError(
            "no_readable_images",
            f"None of the {source.num_images} files is an image that can be read: {examples[:300]}",
            "Use JPEG, PNG, BMP, WebP, GIF or TIFF",
        )
    classes, rows = _arrange(images, val_fraction, seed)
    if len(classes) > settings.max_dataset_classes:
        raise TrainingError(
            "too_many_classes",
            f"There are {len(classes)} classes; {settings.max_dataset_classes} are allowed",
            "Merge classes, or raise SKIPLINE_MAX_DATASET_CLASSES",
        )
    total_hash = content_hash(
        (split, images.labels[i], images.digests[i]) for split, own in rows.items() for i in own
    )
    label_of = {label: place for place, label in enumerate(classes)}
    splits = {str(split): images.select(indices, label_of) for split, indices in rows.items()}
    with full_disk_is_reported():
        write_index(Index(total_hash, classes, splits), folder)
    mean, std = images.channel_mean_std(rows["train"])
    return DatasetRecord(
        id=dataset_id(total_hash),
        name=name,
        hash=total_hash,
        num_classes=len(classes),
        classes=classes,
        splits={split: _count(columns, len(classes)) for split, columns in splits.items()},
        image_size=default_image_size(images.median_side(rows["train"])),
        channel_mean=mean,
        channel_std=std,
        channel_image_std=images.channel_image_std(rows["train"]),
        problems=[*source.problems, *_problems(source, images, rows, unreadable)],
    )


def dataset_id(total_hash: str) -> str:
    """`ds_` and the first 26 hexadecimal digits (104 bits) of the content hash."""
    return f"ds_{total_hash[:ID_DIGITS]}"


@dataclass(frozen=True, slots=True)
class _Facts:
    """An image that decodes. `sums`: pixels, then the sum and the sum of squares of each of the
    three channels, as integers, so that no order of adding them changes the result."""

    digest: bytes
    shorter_side: int
    sums: tuple[int, ...]


@dataclass
class _Images:
    """The readable images, as columns that stay small for millions of them."""

    splits: list[Split] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    sides: array[int] = field(default_factory=lambda: array("q"))
    sums: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, image: SourceImage, facts: _Facts, offset: int) -> None:
        self.splits.append(image.split)
        self.labels.append(image.label)
        self.paths.append(image.path)
        self.digests.append(facts.digest)
        self.offsets.append(offset)
        self.sizes.append(len(image.data))
        self.sides.append(facts.shorter_side)
        self.sums.extend(facts.sums)

    def select(self, indices: list[int], label_of: dict[str, int]) -> SplitIndex:
        return SplitIndex(
            offsets=[self.offsets[i] for i in indices],
            sizes=[self.sizes[i] for i in indices],
            labels=[label_of[self.labels[i]] for i in indices],
            paths=[self.paths[i] for i in indices],
        )

    def median_side(self, indices: list[int]) -> int:
        """In pixels; of an even number of images the lower one of the two in the middle."""
        return sorted(self.sides[i] for i in indices)[(len(indices) - 1) // 2]

    def channel_mean_std(self, indices: list[int]) -> tuple[list[float], list[float]]:
        """Over all pixels of these images as they are stored, scaled to [0, 1]."""
        rows = np.frombuffer(self.sums, dtype=np.int64).reshape(-1, 7)[indices]
        num_pixels, *sums = (sum(column.tolist()) for column in rows.T)
        channels = list(zip(sums[0::2], sums[1::2], strict=True))
        mean = [total / (num_pixels * 255) for total, _ in channels]
        variance = [
            (num_pixels * squares - total**2) / (num_pixels * 255) ** 2
            for total, squares in channels
        ]
        return mean, [value**0.5 for value in variance]

    def channel_image_std(self, indices: list[int]) -> list[float]:
        """The mean over these images of each one's own standard deviation (over its pixels, as
        they are stored), scaled to [0, 1]."""
        rows = np.frombuffer(self.sums, dtype=np.int64).reshape(-1, 7)[indices]
        num_pixels = rows[:, :1]
        means, squares = rows[:, 1::2] / num_pixels, rows[:, 2::2] / num_pixels
        deviations = np.sqrt(np.maximum(squares - means**2, 0)) / 255
        return [math.fsum(column) / len(indices) for column in deviations.T.tolist()]


def _check_source(source: Source, val_fraction: float | None, settings: Settings) -> None:
    """Refuses what the list of files alone shows to be wrong."""
    if source.num_images == 0:
        raise TrainingError("no_images", "There are no images in class folders", LAYOUT_HINT)
    if source.num_images > settings.max_dataset_images:
        raise _dataset_too_large(f"{source.num_images} files", "SKIPLINE_MAX_DATASET_IMAGES")
    if source.num_bytes > settings.max_dataset_bytes:
        raise _dataset_too_large(f"{source.num_bytes} bytes", "SKIPLINE_MAX_DATASET_BYTES")
    if val_fraction is not None and any(split == "val" for split, _ in source.class_folders):
        raise TrainingError(
            "val_exists",
            "The dataset has a val split already, so none can be held out of train",
            "Leave val_fraction out, or take the val folder away",
        )


def _dataset_too_large(what: str, setting: str) -> TrainingError:
    return TrainingError(
        "dataset_too_large", f"The dataset has {what}", f"Use a part of it, or raise {setting}"
    )


def _read_images(
    source: Source,
    folder: Path,
    settings: Settings,
    progress: Callable[[int, int | None], None],
    should_stop: Callable[[], bool],
) -> tuple[_Images, dict[str, list[str]]]:
    """Writes `images.bin`. Also returns the paths of files left out, by the problem's code."""
    images = _Images()
    unreadable: dict[str, list[str]] = {"unreadable_images": [], "images_too_large": []}
    examine = partial(_examine, max_pixels=settings.max_image_pixels)
    batches = batched(source, lambda image: len(image.data), BATCH_BYTES)
    num_threads = decode_threads(source.num_bytes / source.num_images, settings.cpu_threads)
    done = offset = 0
    with (
        (folder / IMAGES_FILE).open("wb") as file,
        closing(map_ordered(examine, batches, num_threads)) as examined,
    ):
        for batch in examined:
            if should_stop():
                raise Interrupted
            for image, facts in batch:
                if isinstance(facts, _Facts):
                    images.add(image, facts, offset)
                    offset += file.write(image.data)
                else:
                    unreadable[facts].append(image.path)
            done += len(batch)
            if offset > settings.max_dataset_bytes:
                raise _dataset_too_large(
                    f"more than {settings.max_dataset_bytes} bytes", "SKIPLINE_MAX_DATASET_BYTES"
                )
            progress(done, source.num_images)
        file.flush()
        os.fsync(file.fileno())
    return images, unreadable


def _examine(batch: list[SourceImage], max_pixels: int) -> list[tuple[SourceImage, _Facts | str]]:
    """The facts of each image, or the code of the problem that leaves it out."""
    results: list[tuple[SourceImage, _Facts | str]] = []
    for image in batch:
        try:
            decoded = decode_image(image.data, max_pixels)
        except BadImage:
            results.append((image, "unreadable_images"))
        except ImageTooLarge:
            results.append((image, "images_too_large"))
        else:
            digest = hashlib.sha256(image.data).digest()
            results.append((image, _Facts(digest, min(decoded.size), _sums(decoded))))
    return results


def _sums(image: Image.Image) -> tuple[int, ...]:
    histogram = np.array(image.histogram(), dtype=np.int64).reshape(3, 256)
    return (image.width * image.height, *(histogram @ POWERS).ravel().tolist())


def _arrange(
    images: _Images, val_fraction: float | None, seed: int
) -> tuple[list[str], dict[Split, list[int]]]:
    """The classes, sorted, and the images of each split, sorted by (class, digest, path)."""

    def content(i: int) -> tuple[str, bytes, str]:
        return images.labels[i], images.digests[i], images.paths[i]

    order = sorted(range(len(images)), key=content)
    rows = {split: [i for i in order if images.splits[i] == split] for split in SPLITS}
    classes = sorted({images.labels[i] for i in rows["train"]})
    _check_classes(images, classes, rows)
    if val_fraction is not None:
        label_of = {label: place for place, label in enumerate(classes)}
        labels = np.array([label_of[images.labels[i]] for i in rows["train"]], dtype=np.int64)
        train, val = split_train(labels, val_fraction, seed)
        if not len(val):
            raise TrainingError(
                "val_fraction_too_large",
                "Every class has a single image, so none can be held out",
                "Add images, or leave val_fraction out",
            )
        rows["val"] = [rows["train"][i] for i in val]
        rows["train"] = [rows["train"][i] for i in train]
    return classes, {split: indices for split, indices in rows.items() if indices}


def _check_classes(images: _Images, classes: list[str], rows: dict[Split, list[int]]) -> None:
    if not classes:
        raise TrainingError(
            "no_train_images", "The split train has no readable images", LAYOUT_HINT
        )
    for split in ("val", "test"):
        unknown = sorted({images.labels[i] for i in rows[split]} - set(classes))
        if unknown:
            raise TrainingError(
                "classes_differ",
                f"{split} has classes that train lacks: {_some(unknown)}",
                f"Give {split} the class folders of train, named alike",
            )
    if len(classes) < 2:
        raise TrainingError(
            "too_few_classes",
            f"A classifier needs at least two classes; there is one with images: {classes[0]}",
            LAYOUT_HINT,
        )


def _count(columns: SplitIndex, num_classes: int) -> SplitInfo:
    per_class = np.bincount(columns.labels, minlength=num_classes).tolist()
    return SplitInfo(num_images=len(columns), per_class=per_class)


def _problems(
    source: Source,
    images: _Images,
    rows: dict[Split, list[int]],
    unreadable: dict[str, list[str]],
) -> Iterator[Problem]:
    """What is odd and does not keep anybody from training."""
    counts = Counter((split, images.labels[i]) for split, own in rows.items() for i in own)
    classes = {label for split, label in counts if split == "train"}
    found: list[tuple[str, str, Iterable[str]]] = [
        (
            "unreadable_images",
            "Files that are no images, or do not decode to their end, were left out",
            unreadable["unreadable_images"],
        ),
        (
            "images_too_large",
            "Images with too many pixels were left out",
            unreadable["images_too_large"],
        ),
        (
            "empty_classes",
            "Class folders without a single readable image",
            (f"{split}/{label}" for split, label in source.class_folders - _found(images)),
        ),
        (
            "classes_differ",
            "Classes of train that another split has no images of",
            (f"{split}/{label}" for split in rows for label in classes - _labels(counts, split)),
        ),
        (
            "single_image_classes",
            "Classes with a single image in train",
            (label for (split, label), n in counts.items() if split == "train" and n == 1),
        ),
    ]
    for code, message, paths in found:
        yield from warning(code, message, paths)


def _found(images: _Images) -> set[tuple[Split, str]]:
    return set(zip(images.splits, images.labels, strict=True))


def _labels(counts: Counter[tuple[Split, str]], split: Split) -> set[str]:
    return {label for own, label in counts if own == split}


def _some(names: list[str]) -> str:
    return ", ".join(names[:NUM_EXAMPLES]) + (", ..." if len(names) > NUM_EXAMPLES else "")
