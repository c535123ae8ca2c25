"""Brings a dataset in: checks every image, splits, counts, and writes one immutable folder.

Knows sources and the stored form; nothing of databases, jobs or storage. The caller gives an empty
folder of its own, puts it into place when `ingest` returns and deletes it when it raises.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.dataset_files import IMAGES_FILE, Index, SplitIndex, content_hash, write_index
from shared.errors import TrainingError
from shared.settings import Settings
from skipline.catalog import Split, default_image_size
from skipline.schemas import ImageSize, ImageSizes, Problem, SplitInfo, Spread
from worker.datasets.checks import find_problems
from worker.datasets.columns import ImageColumns, Int64
from worker.datasets.disk import check_free_disk, full_disk_is_reported
from worker.datasets.examine import TOO_LARGE, UNREADABLE, ColumnsBuilder, examine
from worker.datasets.layout import LAYOUT_HINT, NUM_EXAMPLES, SPLITS, Source
from worker.datasets.locks import Interrupted, never
from worker.datasets.parallel import batched, decode_threads, map_ordered
from worker.datasets.splits import split_train

BATCH_BYTES = 8 * 2**20
ID_DIGITS = 26
NUM_COMMON_SIZES = 10


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
    image_sizes: ImageSizes
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
        images, left_out = _read_images(source, folder, settings, progress, should_stop)
    if not len(images):
        examples = ", ".join(left_out[UNREADABLE][:3] or left_out[TOO_LARGE])
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
    label_of = np.full(len(images.label_names), -1, np.int64)
    for place, label in enumerate(classes):
        label_of[images.label_names.index(label)] = place
    splits = {str(split): _split_index(images, own, label_of) for split, own in rows.items()}
    total_hash = content_hash(
        classes, {split: (splits[split].labels, images.digests[own]) for split, own in rows.items()}
    )
    with full_disk_is_reported():
        write_index(Index(total_hash, classes, splits), folder)
    with (folder / IMAGES_FILE).open("rb") as stored:

        def read(row: int) -> bytes:
            return os.pread(stored.fileno(), int(images.sizes[row]), int(images.offsets[row]))

        problems = find_problems(images, rows, source, left_out, read)
    mean, std = channel_mean_std(images.sums[rows["train"]])
    return DatasetRecord(
        id=dataset_id(total_hash),
        name=name,
        hash=total_hash,
        num_classes=len(classes),
        classes=classes,
        splits={split: _count(columns, len(classes)) for split, columns in splits.items()},
        image_size=default_image_size(_median(images.shorter_sides(rows["train"]))),
        channel_mean=mean,
        channel_std=std,
        channel_image_std=channel_image_std(images.sums[rows["train"]]),
        image_sizes=image_sizes(images),
        problems=[*source.problems, *problems],
    )


def dataset_id(total_hash: str) -> str:
    """`ds_` and the first 26 hexadecimal digits (104 bits) of the content hash."""
    return f"ds_{total_hash[:ID_DIGITS]}"


# ------------------------------------------------------------------------------------- statistics


def channel_mean_std(sums: Int64) -> tuple[list[float], list[float]]:
    """Over all pixels of images as they are stored, scaled to [0, 1]. `sums`: see `ImageColumns`;
    exact, so that no order of adding them changes the result."""
    num_pixels, *totals = (sum(column.tolist()) for column in sums.T)
    channels = list(zip(totals[0::2], totals[1::2], strict=True))
    mean = [total / (num_pixels * 255) for total, _ in channels]
    variance = [
        (num_pixels * squares - total**2) / (num_pixels * 255) ** 2 for total, squares in channels
    ]
    return mean, [value**0.5 for value in variance]


def channel_image_std(sums: Int64) -> list[float]:
    """The mean over images of each one's own standard deviation (over its pixels, as they are
    stored), scaled to [0, 1]."""
    num_pixels = sums[:, :1]
    means, squares = sums[:, 1::2] / num_pixels, sums[:, 2::2] / num_pixels
    deviations = np.sqrt(np.maximum(squares - means**2, 0)) / 255
    return [math.fsum(column) / len(sums) for column in deviations.T.tolist()]


def image_sizes(images: ImageColumns) -> ImageSizes:
    """How large the images are; of a quartile between two images the smaller one's."""
    sides = np.stack([images.widths, images.heights], axis=1)
    distinct, counts = np.unique(sides, axis=0, return_counts=True)
    common = np.argsort(-counts, kind="stable")[:NUM_COMMON_SIZES]
    return ImageSizes(
        width=_spread(images.widths),
        height=_spread(images.heights),
        file_bytes=_spread(images.sizes),
        num_distinct=len(distinct),
        most_common=[
            ImageSize(width=int(width), height=int(height), num_images=int(count))
            for (width, height), count in zip(distinct[common], counts[common], strict=True)
        ],
    )


def _spread(values: npt.NDArray[Any]) -> Spread:
    shares = (0, 0.25, 0.5, 0.75, 1)
    return Spread.model_validate(
        dict(
            zip(
                ("min", "p25", "median", "p75", "max"),
                np.quantile(values, shares, method="lower").tolist(),
                strict=True,
            )
        )
    )


def _median(values: npt.NDArray[Any]) -> int:
    """Of an even number of values the lower one of the two in the middle."""
    return int(np.quantile(values, 0.5, method="lower"))


# ---------------------------------------------------------------------------------------- reading


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
) -> tuple[ImageColumns, dict[str, list[str]]]:
    """Writes `images.bin`. Also returns the paths of files left out, by the problem's code."""
    builder = ColumnsBuilder()
    work = partial(examine, max_pixels=settings.max_image_pixels)
    batches = batched(source, lambda image: len(image.data), BATCH_BYTES)
    num_threads = decode_threads(source.num_bytes / source.num_images, settings.cpu_threads)
    done = offset = 0
    with (
        (folder / IMAGES_FILE).open("wb") as file,
        closing(map_ordered(work, batches, num_threads)) as examined,
    ):
        for found in examined:
            if should_stop():
                raise Interrupted
            builder.add(found, offset)
            for image in found.images:
                offset += file.write(image.data)
            done += len(found.images) + len(found.left_out)
            if offset > settings.max_dataset_bytes:
                raise _dataset_too_large(
                    f"more than {settings.max_dataset_bytes} bytes", "SKIPLINE_MAX_DATASET_BYTES"
                )
            progress(done, source.num_images)
        file.flush()
        os.fsync(file.fileno())
    return builder.columns, builder.left_out


def _arrange(
    images: ImageColumns, val_fraction: float | None, seed: int
) -> tuple[list[str], dict[Split, Int64]]:
    """The classes, sorted, and the images of each split, sorted by (class, digest, path)."""
    names = np.array(images.label_names, dtype=object)
    ranks = np.argsort(np.argsort(names, kind="stable"), kind="stable")
    order = _by_content(images, ranks[images.labels])
    rows: dict[Split, Int64] = {
        split: order[images.splits[order] == place] for place, split in enumerate(SPLITS)
    }
    of_split = {
        split: {images.label_names[place] for place in np.unique(images.labels[own])}
        for split, own in rows.items()
    }
    classes = sorted(of_split["train"])
    _check_classes(classes, of_split)
    if val_fraction is not None:
        train, val = split_train(ranks[images.labels[rows["train"]]], val_fraction, seed)
        if not len(val):
            raise TrainingError(
                "val_fraction_too_large",
                "Every class has a single image, so none can be held out",
                "Add images, or leave val_fraction out",
            )
        rows["val"], rows["train"] = rows["train"][val], rows["train"][train]
    return classes, {split: own for split, own in rows.items() if len(own)}


def _by_content(images: ImageColumns, ranks: Int64) -> Int64:
    """The order by (class, digest, path); `ranks` int64 [N] of the images' classes."""
    parts = images.digests.view(">u8").T
    order = np.lexsort((*parts[::-1], ranks))
    same = (ranks[order[1:]] == ranks[order[:-1]]) & (
        images.digests[order[1:]] == images.digests[order[:-1]]
    ).all(axis=1)
    # Runs of the same file: few and short, unless somebody means no good.
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2).tolist():
        run = order[first : last + 1].tolist()
        order[first : last + 1] = sorted(run, key=images.paths.__getitem__)
    return order


def _split_index(images: ImageColumns, rows: Int64, label_of: Int64) -> SplitIndex:
    return SplitIndex(
        offsets=images.offsets[rows],
        sizes=images.sizes[rows],
        labels=label_of[images.labels[rows]],
        paths=images.paths.select(rows),
    )


def _check_classes(classes: list[str], of_split: Mapping[Split, set[str]]) -> None:
    if not classes:
        raise TrainingError(
            "no_train_images", "The split train has no readable images", LAYOUT_HINT
        )
    for split in ("val", "test"):
        unknown = sorted(of_split[split] - of_split["train"])
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:NUM_EXAMPLES]) + (", ..." if len(names) > NUM_EXAMPLES else "")
