"""Packed images, and the order in which training sees them.

Everything random about an epoch derives from (seed, epoch, purpose) and is drawn for all samples
at once, so that it depends neither on batches nor on how long the process has lived.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class ArrayData:
    """A split as arrays, in memory or memory-mapped: images uint8 [M, S, S, 3], labels int64 [M].

    `rows` (int64 [N]) makes it those rows only, without copying an image; None means all.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels) if self.rows is None else len(self.rows)


class Purpose(IntEnum):
    """Keeps the random streams of an epoch apart."""

    order = 0
    augmentation = 1
    dropout = 2


def epoch_generator(seed: int, epoch: int, purpose: Purpose) -> np.random.Generator:
    """The source of one epoch's draws for one purpose."""
    return np.random.default_rng((seed, epoch, purpose))


def epoch_order(seed: int, epoch: int, num_samples: int) -> npt.NDArray[np.int64]:
    """A permutation of the samples."""
    return epoch_generator(seed, epoch, Purpose.order).permutation(num_samples)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Full batches only: a ragged one would have another gradient scale and another shape. Fewer
    samples than a batch make one batch."""
    return max(1, num_samples // batch_size)


@dataclass(frozen=True)
class Batch:
    """images uint8 [B, S, S, 3] and labels int64 [B] of the samples at indices int64 [B], all on
    the device."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class DeviceData:
    """A split, ready to be cut into batches on a device.

    A GPU holds all images if they fit into a third of its free memory. Else each batch is gathered
    into pinned memory and copied while the GPU still works on the one before.
    """

    def __init__(self, data: ArrayData, device: torch.device) -> None:
        self._device = device
        rows = np.arange(len(data)) if data.rows is None else data.rows
        self._labels = torch.from_numpy(data.labels[rows]).to(device)
        num_bytes = len(data) * data.images[0].nbytes
        if device.type == "cuda" and num_bytes <= torch.cuda.mem_get_info(device)[0] // 3:
            self._images = torch.from_numpy(data.images[rows]).to(device)
            self._rows = torch.arange(len(rows), device=device)
        else:
            with warnings.catch_warnings():  # a read-only map will do: nothing writes to it
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                self._images = torch.from_numpy(data.images)
            self._rows = torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self._labels)

    def batches(
        self, order: npt.NDArray[np.int64], batch_size: int, first: int = 0
    ) -> Iterator[Batch]:
        """Cuts the samples of `order` into batches, the last one as small as it comes; `first`
        skips that many batches."""
        indices = torch.from_numpy(order)
        device_indices = indices.to(self._device)
        rows = self._rows[indices.to(self._rows.device)]
        for start in range(first * batch_size, len(order), batch_size):
            chosen = slice(start, start + batch_size)
            on_device = device_indices[chosen]
            yield Batch(self._gather(rows[chosen]), self._labels[on_device], on_device)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        if self._images.device.type == self._device.type:
            return self._images.index_select(0, rows)
        shape = (len(rows), *self._images.shape[1:])
        pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        torch.index_select(self._images, 0, rows, out=pinned)
        return pinned.to(self._device, non_blocking=True)
