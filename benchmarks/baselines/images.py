"""The image files of a benchmark: chosen from somebody's folder, or made of noise.

All contenders read the same copies, as `train/<class>/<image>` and `val/<class>/<image>`. Knows
paths and JPEG; nothing of networks.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png")
ANNOTATIONS_FILE = "val_annotations.txt"
BLOTCHES = 8
"""Noise is drawn at this many pixels a side and smoothed up: JPEG packs noise of single pixels
badly, and decoding it would take longer than a photograph."""

ImagesOfClasses = Mapping[str, Sequence[Path]]


def images_of(root: Path, split: str) -> ImagesOfClasses:
    """The files of a split by class, both sorted; empty where there is no such split.

    Reads class folders, at any depth below the class, and the `val` of TinyImageNet's own layout.
    """
    folder = root / split
    annotations = folder / ANNOTATIONS_FILE
    by_class: dict[str, list[Path]] = {}
    if annotations.is_file():
        for line in annotations.read_text(encoding="utf-8").splitlines():
            name, label = line.split("\t")[:2]
            by_class.setdefault(label, []).append(folder / "images" / name)
    elif folder.is_dir():
        for file in folder.rglob("*"):
            if file.suffix.lower() in SUFFIXES:
                by_class.setdefault(file.relative_to(folder).parts[0], []).append(file)
    return {label: sorted(by_class[label]) for label in sorted(by_class)}


def validation_images(root: Path) -> ImagesOfClasses:
    """The split `val`, else `test`."""
    return images_of(root, "val") or images_of(root, "test")


def count(images: ImagesOfClasses) -> int:
    return sum(map(len, images.values()))


def take(images: ImagesOfClasses, num_images: int) -> ImagesOfClasses:
    """The first of every class, then the second, and so on, until there are `num_images`."""
    turns = zip_longest(*([(label, file) for file in files] for label, files in images.items()))
    dealt = [item for turn in turns for item in turn if item is not None]
    taken: dict[str, list[Path]] = {}
    for label, file in dealt[:num_images]:
        taken.setdefault(label, []).append(file)
    return taken


def copy(images: ImagesOfClasses, folder: Path) -> None:
    """Writes the files to `folder/<class>/<number>`."""
    for label, files in images.items():
        (folder / label).mkdir(parents=True)
        for number, file in enumerate(files):
            shutil.copyfile(file, folder / label / f"{number:05d}{file.suffix.lower()}")


def make_noise(root: Path, image_size: int, num_classes: int, num_train: int) -> None:
    """JPEG files of noise in class folders, `num_train` below `train` and one a class below
    `val`; the same files each time."""
    generator = np.random.default_rng(0)
    for split, num_images in (("train", num_train), ("val", num_classes)):
        for number in range(num_images):
            folder = root / split / f"class{number % num_classes:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (BLOTCHES, BLOTCHES, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((image_size, image_size))
            picture.save(folder / f"{number:05d}.jpg", quality=90)
