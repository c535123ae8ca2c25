"""What is known of each readable image of a dataset that is being brought in, as columns.

A row costs about 170 bytes and its path, so that millions of images fit. Knows nothing of files.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.dataset_files import Paths

UInt8 = npt.NDArray[np.uint8]
UInt64 = npt.NDArray[np.uint64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class Trait(IntFlag):
    """What a file was before it became an upright picture of 8-bit RGB."""

    GREY = 1
    """One channel, of any depth."""
    ALPHA = 2
    CMYK = 4
    PALETTE = 8
    DEEP = 16
    """More than 8 bits a channel."""
    ANIMATED = 32
    ROTATED = 64
    """EXIF asks for it to be turned."""
    WRONG_SUFFIX = 128
    """Its name ends as that of another format, or as that of no image."""


@dataclass(frozen=True)
class ImageColumns:
    """N images. `splits`: uint8 [N], places in `worker.datasets.layout.SPLITS`, as the source has
    them; `labels`: int32 [N], places in `label_names`; `digests`: uint8 [N, 32], SHA-256 of the
    files; `phashes`: uint64 [N], see `worker.datasets.perceptual`; `widths`, `heights`: int32 [N],
    upright, in pixels; `traits`: uint8 [N] of `Trait`; `offsets`, `sizes`: int64 [N], in bytes of
    `images.bin`; `sums`: int64 [N, 7], pixels, then sum and sum of squares of red, green, blue;
    `paths`: relative, as the source names them.
    """

    label_names: list[str]
    splits: UInt8
    labels: Int32
    digests: UInt8
    phashes: UInt64
    widths: Int32
    heights: Int32
    traits: UInt8
    offsets: Int64
    sizes: Int64
    sums: Int64
    paths: Paths

    def __len__(self) -> int:
        return len(self.splits)

    def shorter_sides(self, rows: Int64) -> Int32:
        """int32 [len(rows)], in pixels."""
        sides: Int32 = np.minimum(self.widths[rows], self.heights[rows])
        return sides


class Growing:
    """An array that rows are added to. Grows by doubling, so that adding costs the same however
    many there are.

    Args:
        shape: of one row.
    """

    def __init__(self, dtype: npt.DTypeLike, shape: tuple[int, ...] = ()) -> None:
        self._rows: npt.NDArray[Any] = np.empty((1024, *shape), dtype)
        self._num = 0

    def extend(self, rows: npt.ArrayLike) -> None:
        new = np.asarray(rows, self._rows.dtype).reshape(-1, *self._rows.shape[1:])
        beyond = self._num + len(new)
        if beyond > len(self._rows):
            larger = np.empty((max(beyond, 2 * self._num), *self._rows.shape[1:]), new.dtype)
            larger[: self._num] = self._rows[: self._num]
            self._rows = larger
        self._rows[self._num : beyond] = new
        self._num = beyond

    @property
    def array(self) -> npt.NDArray[Any]:
        """All rows: a view, while none is added."""
        return self._rows[: self._num]


class PathsBuilder:
    """Gathers texts into `Paths`."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])

    def append(self, path: str) -> None:
        self._text += path.encode()
        self._ends.append(len(self._text))

    @property
    def paths(self) -> Paths:
        ends = np.array(self._ends, np.int64)
        return Paths(self._text, ends[:-1], ends[1:])
