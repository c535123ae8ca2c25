"""Looks at the files of a dataset, a batch at a time: do they decode, and what is there to know."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from shared.errors import BadImage, ImageTooLarge
from shared.images import Decoded, decode
from worker.datasets.columns import Growing, ImageColumns, PathsBuilder, Trait, UInt64
from worker.datasets.layout import SPLITS, SourceImage
from worker.datasets.perceptual import grey_square, perceptual_hashes

UNREADABLE, TOO_LARGE = "unreadable_images", "images_too_large"
"""Codes of the problems that leave a file out."""
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp", ".dib"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
_GREY_MODES = ("1", "L", "LA", "I", "F")
_LEVELS = np.arange(256, dtype=np.int64)
_POWERS = np.stack([_LEVELS, _LEVELS**2], axis=1)


@dataclass
class Examined:
    """Of a batch, the images that decode, with what is known of each in rows of their order; and
    the paths of those left out, with the problem's code."""

    images: list[SourceImage] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    sides: list[tuple[int, int]] = field(default_factory=list)
    traits: list[int] = field(default_factory=list)
    histograms: list[list[int]] = field(default_factory=list)
    squares: list[np.ndarray] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    phashes: UInt64 = field(default_factory=lambda: np.empty(0, np.uint64))

    def add(self, image: SourceImage, decoded: Decoded) -> None:
        picture = decoded.picture
        self.images.append(image)
        self.digests += hashlib.sha256(image.data).digest()
        self.sides.append(picture.size)
        self.traits.append(_traits(image.path, decoded))
        self.histograms.append(picture.histogram())
        self.squares.append(grey_square(picture))


def examine(batch: Sequence[SourceImage], max_pixels: int) -> Examined:
    """Decodes the files and notes what there is to know of them."""
    found = Examined()
    for image in batch:
        try:
            decoded = decode(image.data, max_pixels)
        except BadImage:
            found.left_out.append((UNREADABLE, image.path))
        except ImageTooLarge:
            found.left_out.append((TOO_LARGE, image.path))
        else:
            found.add(image, decoded)
    if found.images:
        found.phashes = perceptual_hashes(np.stack(found.squares))
        found.squares.clear()
    return found


def _traits(path: str, decoded: Decoded) -> int:
    mode = decoded.mode
    traits = Trait(0)
    if mode in _GREY_MODES or mode.startswith("I;16"):
        traits |= Trait.GREY
    if mode == "CMYK":
        traits |= Trait.CMYK
    if mode == "P":
        traits |= Trait.PALETTE
    if mode.startswith("I"):
        traits |= Trait.DEEP
    if decoded.is_transparent:
        traits |= Trait.ALPHA
    if decoded.is_animated:
        traits |= Trait.ANIMATED
    if decoded.is_rotated:
        traits |= Trait.ROTATED
    suffix = PurePosixPath(path).suffix.lower()
    if suffix and suffix not in SUFFIXES[decoded.format]:
        traits |= Trait.WRONG_SUFFIX
    return int(traits)


class ColumnsBuilder:
    """Gathers what was found into `ImageColumns`."""

    def __init__(self) -> None:
        self.left_out: dict[str, list[str]] = {UNREADABLE: [], TOO_LARGE: []}
        self._places: dict[str, int] = {}
        self._paths = PathsBuilder()
        self._splits, self._labels = Growing(np.uint8), Growing(np.int32)
        self._digests, self._phashes = Growing(np.uint8, (32,)), Growing(np.uint64)
        self._sides, self._traits = Growing(np.int32, (2,)), Growing(np.uint8)
        self._spans, self._sums = Growing(np.int64, (2,)), Growing(np.int64, (7,))

    def add(self, found: Examined, offset: int) -> None:
        """`offset`: of the batch's first readable image in `images.bin`."""
        for code, path in found.left_out:
            self.left_out[code].append(path)
        if not found.images:
            return
        for image in found.images:
            self._paths.append(image.path)
        sizes = np.array([len(image.data) for image in found.images], np.int64)
        offsets = offset + np.cumsum(sizes) - sizes
        sides = np.array(found.sides, np.int64)
        histograms = np.array(found.histograms, np.int64).reshape(-1, 3, 256)
        sums = (histograms @ _POWERS).reshape(-1, 6)
        places = self._places
        self._splits.extend([SPLITS.index(image.split) for image in found.images])
        self._labels.extend([places.setdefault(i.label, len(places)) for i in found.images])
        self._digests.extend(np.frombuffer(found.digests, np.uint8))
        self._phashes.extend(found.phashes)
        self._sides.extend(sides)
        self._traits.extend(found.traits)
        self._spans.extend(np.stack([offsets, sizes], axis=1))
        self._sums.extend(np.concatenate([sides.prod(axis=1, keepdims=True), sums], axis=1))

    @property
    def columns(self) -> ImageColumns:
        widths, heights = self._sides.array.T
        offsets, sizes = self._spans.array.T
        return ImageColumns(
            label_names=list(self._places),
            splits=self._splits.array,
            labels=self._labels.array,
            digests=self._digests.array,
            phashes=self._phashes.array,
            widths=widths,
            heights=heights,
            traits=self._traits.array,
            offsets=offsets,
            sizes=sizes,
            sums=self._sums.array,
            paths=self._paths.paths,
        )
