from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shared.errors import TrainingError
from worker.engine.data import (
    ArrayData,
    Batch,
    DeviceData,
    FileData,
    Purpose,
    Rows,
    _FromDevice,
    choose_data_path,
    epoch_generator,
    epoch_order,
    prefetched,
)

CPU = torch.device("cpu")


def numbered(num_samples: int) -> ArrayData:
    """Sample i is an image of the level i with the label i."""
    labels = np.arange(num_samples, dtype=np.int64)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (num_samples, 2, 2, 3))
    return ArrayData(images.copy(), labels)


def test_an_epoch_sees_every_sample_once() -> None:
    assert sorted(epoch_order(0, 1, 100)) == list(range(100))


def test_the_order_derives_from_seed_and_epoch() -> None:
    order = epoch_order(7, 3, 100).tolist()
    assert epoch_order(7, 3, 100).tolist() == order
    assert epoch_order(7, 4, 100).tolist() != order
    assert epoch_order(8, 3, 100).tolist() != order


def test_streams_of_an_epoch_do_not_depend_on_each_other() -> None:
    draws = {tuple(epoch_generator(0, 1, purpose).integers(2**32, size=4)) for purpose in Purpose}
    assert len(draws) == len(Purpose)


def test_rows_choose_samples_without_copying_an_image() -> None:
    whole = numbered(6)
    part = ArrayData(whole.images, whole.labels, np.array([5, 1, 3]))
    assert len(part) == 3
    batches = list(DeviceData(part, CPU).batches([np.array([2, 0]), np.array([1])]))
    assert [batch.labels.tolist() for batch in batches] == [[3, 5], [1]]
    assert [batch.images[:, 0, 0, 0].tolist() for batch in batches] == [[3, 5], [1]]
    assert [batch.samples.tolist() for batch in batches] == [[2, 0], [1]]


def test_batches_hold_the_samples_of_the_order() -> None:
    chosen = [np.array([4, 0]), np.array([3, 1]), np.array([2])]
    batches = list(DeviceData(numbered(5), CPU).batches(chosen))
    assert [batch.samples.tolist() for batch in batches] == [[4, 0], [3, 1], [2]]
    for batch in batches:
        assert torch.equal(batch.labels, batch.samples)
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(batch.samples), 2, 2, 3)
        assert (batch.images == batch.samples[:, None, None, None]).all()


def test_a_read_only_memory_map_will_do(tmp_path: Path) -> None:
    numbered(6).images.tofile(tmp_path / "images")
    images = np.memmap(tmp_path / "images", np.uint8, "r", shape=(6, 2, 2, 3))
    (batch,) = DeviceData(ArrayData(images, numbered(6).labels), CPU).batches([np.array([5])])
    assert (batch.images == 5).all()


def test_the_first_samples_are_those_of_the_rows() -> None:
    whole = numbered(6)
    assert whole.first(2).read(np.array([1, 0]))[:, 0, 0, 0].tolist() == [1, 0]
    part = ArrayData(whole.images, whole.labels, np.array([5, 1, 3]))
    first = part.first(2)
    assert len(first) == 2
    assert first.read(np.array([0, 1]))[:, 0, 0, 0].tolist() == [5, 1]
    assert first.images is whole.images
    assert len(part.first(9)) == 3


def test_what_is_read_is_a_copy() -> None:
    data = numbered(3)
    data.read(np.array([2]))[:] = 99
    assert (data.images[2] == 2).all()


def as_lists(batches: Iterator[Batch]) -> list[tuple[list[int], list[int], list[int]]]:
    return [(b.images[:, 1, 1, 2].tolist(), b.labels.tolist(), b.samples.tolist()) for b in batches]


CHOSEN = [np.array([2, 0]), np.array([1]), np.array([3, 2])]


@pytest.mark.parametrize("rows", [None, np.array([5, 1, 3, 4])], ids=["all", "some rows"])
def test_resident_images_give_the_batches_of_mapped_ones(rows: Rows | None) -> None:
    whole = numbered(6)
    data = ArrayData(whole.images, whole.labels, rows)
    resident = DeviceData(data, CPU, "resident")
    assert len(resident) == len(data)
    mapped = as_lists(DeviceData(data, CPU).batches(CHOSEN))
    assert as_lists(resident.batches(CHOSEN)) == mapped
    assert mapped[0][1] == ([2, 0] if rows is None else [3, 5])


@dataclass
class Levels:
    """A reader that makes what `numbered` holds; loader processes get it pickled."""

    labels: npt.NDArray[np.int64]
    image_size: int = 2

    def read(self, rows: Rows) -> npt.NDArray[np.uint8]:
        levels = self.labels[rows].astype(np.uint8)
        return np.broadcast_to(levels[:, None, None, None], (len(rows), 2, 2, 3)).copy()


@pytest.mark.parametrize("num_loaders", [0, 2], ids=["in this process", "by two processes"])
def test_images_from_files_give_the_batches_of_packed_ones(num_loaders: int) -> None:
    whole = numbered(6)
    rows = np.array([5, 1, 3, 4])
    data = FileData(Levels(whole.labels), num_loaders, rows)
    packed = DeviceData(ArrayData(whole.images, whole.labels, rows), CPU)
    expected = as_lists(packed.batches(CHOSEN))
    files = DeviceData(data, CPU)
    assert len(files) == len(data) == 4
    assert list(islice((b.samples.tolist() for b in files.batches(CHOSEN)), 1)) == [[2, 0]]
    assert as_lists(files.batches(CHOSEN)) == expected  # also after a pass that was left early
    assert as_lists(files.batches(CHOSEN[:1])) == expected[:1]


class Damaged(Levels):
    """A reader of files that do not decode."""

    def read(self, rows: Rows) -> npt.NDArray[np.uint8]:
        raise TrainingError("dataset_damaged", "It does not decode", "Bring it in again")


@pytest.mark.parametrize("num_loaders", [0, 1], ids=["by this process", "by another process"])
def test_what_is_wrong_with_files_keeps_its_code(num_loaders: int) -> None:
    data = DeviceData(FileData(Damaged(numbered(4).labels), num_loaders), CPU)
    with pytest.raises(TrainingError) as caught:
        next(data.batches([np.array([1])]))
    assert caught.value.code == "dataset_damaged"
    assert caught.value.hint == "Bring it in again"


def test_images_that_do_not_fit_any_more_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    whole = numbered(4)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", no_room)
        assert _FromDevice.if_it_fits(whole, CPU) is None
    monkeypatch.setattr(_FromDevice, "if_it_fits", lambda data, device: None)
    (batch,) = DeviceData(whole, CPU, "resident").batches([np.array([2, 0])])
    assert batch.labels.tolist() == [2, 0]
    assert batch.images[:, 0, 0, 0].tolist() == [2, 0]


def test_files_are_read_by_sample() -> None:
    data = FileData(Levels(numbered(6).labels), 0, np.array([5, 1, 3]))
    assert data.read(np.array([2, 0]))[:, 0, 0, 0].tolist() == [3, 5]
    assert data.first(1).read(np.array([0]))[:, 0, 0, 0].tolist() == [5]
    assert FileData(Levels(numbered(6).labels), 0).first(2).read(np.array([1])).max() == 1


@pytest.mark.parametrize(
    ("num_bytes", "share", "path"),
    [(500, 0.5, "resident"), (501, 0.5, "mapped"), (100, 0.1, "resident"), (1, 0.0, "mapped")],
)
def test_images_are_resident_if_they_fit_into_a_share_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int, share: float, path: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert choose_data_path(num_bytes, torch.device("cuda"), share) == path


def test_on_the_cpu_images_are_mapped() -> None:
    assert choose_data_path(1, CPU, 0.9) == "mapped"


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_what_is_prefetched_keeps_its_order(depth: int) -> None:
    assert list(prefetched(iter(range(20)), depth)) == list(range(20))
    assert prefetch_threads() == []


def test_prefetching_is_ahead_by_its_depth() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            if len(made) == 4:
                third.set()
            yield number

    ready = prefetched(items(), 2)
    assert next(ready) == 0
    # One was taken, two are ready, and one waits for its place; there is no room for a fifth.
    assert third.wait(10)
    assert made == [0, 1, 2, 3]
    ready.close()  # type: ignore[attr-defined]


def test_an_exception_of_what_is_prefetched_is_raised_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    ready = prefetched(items(), 3)
    assert next(ready) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ready)
    assert prefetch_threads() == []


def test_who_leaves_early_ends_the_thread() -> None:
    ready = prefetched(iter(range(1000)), 2)
    assert next(ready) == 0
    assert len(prefetch_threads()) == 1
    ready.close()  # type: ignore[attr-defined]
    assert prefetch_threads() == []
