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
    """A split in memory or memory-mapped: images uint8 [N, S, S, 3], labels int64 [N]."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


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
        self._labels = torch.from_numpy(data.labels).to(device)
        with warnings.catch_warnings():  # a read-only memory map will do: nothing writes to it
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            images = torch.from_numpy(data.images)
        self._is_resident = device.type == "cpu" or (
            images.nbytes <= torch.cuda.mem_get_info(device)[0] // 3
        )
        self._images = images.to(device) if self._is_resident else images

    def __len__(self) -> int:
        return len(self._labels)

    def batches(
        self, order: npt.NDArray[np.int64], batch_size: int, first: int = 0
    ) -> Iterator[Batch]:
        """Cuts the samples of `order` into batches, the last one as small as it comes; `first`
        skips that many batches."""
        indices = torch.from_numpy(order)
        device_indices = indices.to(self._device)
        for start in range(first * batch_size, len(order), batch_size):
            chosen = slice(start, start + batch_size)
            on_device = device_indices[chosen]
            if self._is_resident:
                images = self._images.index_select(0, on_device)
            else:
                images = self._copy(indices[chosen])
            yield Batch(images, self._labels[on_device], on_device)

    def _copy(self, indices: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(
            (len(indices), *self._images.shape[1:]), dtype=torch.uint8, pin_memory=True
        )
        torch.index_select(self._images, 0, indices, out=pinned)
        return pinned.to(self._device, non_blocking=True)
