"""The images of a split, and the order in which training sees them.

Everything random about an epoch derives from (seed, epoch, purpose) and is drawn for all samples
at once, so that it depends neither on batches nor on how long the process has lived. Knows nothing
of what becomes of a batch, nor of how images are stored.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from shared.errors import TrainingError

T = TypeVar("T")
Rows = npt.NDArray[np.int64]
DataPath = Literal["resident", "mapped", "files"]

NUM_PREFETCHED = 3
"""Batches that are ready before a GPU asks for them."""
DEFAULT_MEMORY_SHARE = 0.5


class Reader(Protocol):
    """Images that are decoded when they are read. Picklable: loader processes get a copy."""

    image_size: int
    labels: npt.NDArray[np.int64]

    def read(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """The images at `rows` (int64 [B]): uint8 [B, S, S, 3]."""


@dataclass(frozen=True)
class ArrayData:
    """A split as arrays, in memory or memory-mapped: images uint8 [M, S, S, 3], labels int64 [M].

    `rows` (int64 [N]) makes it those rows only, without copying an image; None means all.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    rows: Rows | None = None

    def __len__(self) -> int:
        return len(self.labels) if self.rows is None else len(self.rows)

    def first(self, num_samples: int) -> ArrayData:
        """The first `num_samples` of them."""
        rows = np.arange(len(self)) if self.rows is None else self.rows
        return ArrayData(self.images, self.labels, rows[:num_samples])

    def read(self, samples: Rows) -> npt.NDArray[np.uint8]:
        """Copies of images: uint8 [B, S, S, 3]."""
        return np.array(self.images[samples if self.rows is None else self.rows[samples]])


@dataclass(frozen=True)
class FileData:
    """A split whose images are decoded from their files each time, by `num_loaders` processes."""

    reader: Reader
    num_loaders: int
    rows: Rows | None = None

    def __len__(self) -> int:
        return len(self.reader.labels) if self.rows is None else len(self.rows)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Of every image that the reader has, int64 [M]."""
        return self.reader.labels

    def first(self, num_samples: int) -> FileData:
        """The first `num_samples` of them."""
        rows = np.arange(len(self)) if self.rows is None else self.rows
        return FileData(self.reader, self.num_loaders, rows[:num_samples])

    def read(self, samples: Rows) -> npt.NDArray[np.uint8]:
        """Decodes images: uint8 [B, S, S, 3]."""
        return self.reader.read(samples if self.rows is None else self.rows[samples])


SplitData = ArrayData | FileData


class Purpose(IntEnum):
    """Keeps the random streams of an epoch apart."""

    order = 0
    augmentation = 1
    dropout = 2


def epoch_generator(seed: int, epoch: int, purpose: Purpose) -> np.random.Generator:
    """The source of one epoch's draws for one purpose."""
    return np.random.default_rng((seed, epoch, purpose))


def epoch_order(seed: int, epoch: int, num_samples: int) -> Rows:
    """A permutation of the samples."""
    return epoch_generator(seed, epoch, Purpose.order).permutation(num_samples)


@dataclass(frozen=True)
class Batch:
    """images uint8 [B, S, S, 3] and labels int64 [B] on the device; samples: where in the split
    they stand, int64 [B] on the CPU."""

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor


def choose_data_path(
    num_bytes: int, device: torch.device, memory_share: float = DEFAULT_MEMORY_SHARE
) -> DataPath:
    """Where packed images of this size are kept: on a GPU if they fit into a share of the memory
    that is free, else mapped. On the CPU a map is as good as memory."""
    if device.type != "cuda":
        return "mapped"
    free_bytes = torch.cuda.mem_get_info(device)[0]
    return "resident" if num_bytes <= memory_share * free_bytes else "mapped"


class DeviceData:
    """A split, ready to be cut into batches on a device.

    Args:
        data_path: `resident` copies all images to the device, if there is memory left for them.
            Else each batch is gathered, and for a GPU that is done by a thread, into pinned
            memory, while the device works on the ones before. Images that are decoded from files
            are never resident.
    """

    def __init__(
        self, data: SplitData, device: torch.device, data_path: DataPath = "mapped"
    ) -> None:
        self._device = device
        self._rows = np.arange(len(data)) if data.rows is None else data.rows
        self._labels = torch.from_numpy(data.labels[self._rows]).to(device)
        self._gather: _Gather
        pinned = device.type == "cuda"
        resident = None
        if isinstance(data, ArrayData) and data_path == "resident":
            resident = _FromDevice.if_it_fits(data, device)
        if isinstance(data, FileData):
            self._gather = _FromFiles(data, pinned=pinned)
        elif resident is not None:
            self._gather, self._rows = resident, np.arange(len(data))
        else:
            self._gather = _FromArray(data.images, pinned=pinned)

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, samples: Sequence[Rows]) -> Iterator[Batch]:
        """A batch for each list of samples (int64 [B])."""
        images = self._gather([self._rows[chosen] for chosen in samples])
        if self._device.type == "cuda" and isinstance(self._gather, _FromArray):
            images = prefetched(images, NUM_PREFETCHED)
        for chosen, batch in zip(samples, images, strict=True):
            indices = torch.from_numpy(chosen)
            labels = self._labels[indices.to(self._device, non_blocking=True)]
            yield Batch(batch.to(self._device, non_blocking=True), labels, indices)


class _Gather(Protocol):
    def __call__(self, batches: list[Rows]) -> Iterator[torch.Tensor]:
        """Images uint8 [B, S, S, 3] of each list of rows, in order."""


class _FromDevice:
    """All images are on the device."""

    def __init__(self, images: torch.Tensor) -> None:
        self._images = images

    @classmethod
    def if_it_fits(cls, data: ArrayData, device: torch.device) -> _FromDevice | None:
        """None where the device's memory has filled up since the choice was made."""
        images = data.images if data.rows is None else data.images[data.rows]
        try:
            return cls(_as_tensor(images).to(device))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None

    def __call__(self, batches: list[Rows]) -> Iterator[torch.Tensor]:
        for rows in batches:
            indices = torch.from_numpy(rows).to(self._images.device, non_blocking=True)
            yield self._images.index_select(0, indices)


class _FromArray:
    """Images in memory, or mapped."""

    def __init__(self, images: npt.NDArray[np.uint8], *, pinned: bool) -> None:
        self._images = _as_tensor(images)
        self._pinned = pinned

    def __call__(self, batches: list[Rows]) -> Iterator[torch.Tensor]:
        for rows in batches:
            shape = (len(rows), *self._images.shape[1:])
            batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
            yield torch.index_select(self._images, 0, torch.from_numpy(rows), out=batch)


def _as_tensor(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    with warnings.catch_warnings():  # a read-only map will do: nothing writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(images)


class _FromFiles:
    """Images decoded by processes, which live as long as the split is used."""

    def __init__(self, data: FileData, *, pinned: bool) -> None:
        self._order = _Order()
        self._loader = DataLoader(
            _Batches(data.reader),
            batch_sampler=self._order,
            collate_fn=_same,
            num_workers=data.num_loaders,
            # Not forked: the trainer has threads, and perhaps a GPU.
            multiprocessing_context="spawn" if data.num_loaders else None,
            persistent_workers=data.num_loaders > 0,
            pin_memory=pinned,
        )

    def __call__(self, batches: list[Rows]) -> Iterator[torch.Tensor]:
        self._order.batches = batches
        for batch in self._loader:
            if not isinstance(batch, torch.Tensor):
                raise TrainingError(*batch)
            yield batch


class _Order:
    """A batch sampler whose batches are set anew before each pass."""

    batches: Sequence[Rows] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter([rows.tolist() for rows in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


class _Batches(Dataset[Any]):
    """Whole batches, decoded in one go."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitems__(self, rows: list[int]) -> torch.Tensor | tuple[str, str, str]:
        try:
            return torch.from_numpy(self._reader.read(np.array(rows, dtype=np.int64)))
        except TrainingError as error:  # torch could not raise it again in the other process
            return error.code, error.message, error.hint


def _same(batch: Any) -> Any:
    """What the data set gave is a batch already."""
    return batch


def prefetched(items: Iterator[T], depth: int) -> Iterator[T]:
    """The items, made up to `depth` ahead by a thread. An exception of theirs is raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    left = threading.Event()

    def hand_over(item: T | None, error: BaseException | None = None) -> None:
        while not left.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for item in items:
                hand_over(item)
                if left.is_set():
                    return
        except BaseException as error:
            hand_over(None, error)
        else:
            hand_over(None)

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        left.set()
        thread.join()
