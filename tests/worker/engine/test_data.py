from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from worker.engine.data import (
    ArrayData,
    DeviceData,
    Purpose,
    epoch_generator,
    epoch_order,
    steps_per_epoch,
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


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "expected"), [(10, 4, 2), (8, 4, 2), (4, 4, 1), (3, 4, 1)]
)
def test_training_drops_a_ragged_batch_unless_it_is_the_only_one(
    num_samples: int, batch_size: int, expected: int
) -> None:
    assert steps_per_epoch(num_samples, batch_size) == expected


def test_rows_choose_samples_without_copying_an_image() -> None:
    whole = numbered(6)
    part = ArrayData(whole.images, whole.labels, np.array([5, 1, 3]))
    assert len(part) == 3
    batches = list(DeviceData(part, CPU).batches(np.array([2, 0, 1]), 2))
    assert [batch.labels.tolist() for batch in batches] == [[3, 5], [1]]
    assert [batch.images[:, 0, 0, 0].tolist() for batch in batches] == [[3, 5], [1]]
    assert [batch.indices.tolist() for batch in batches] == [[2, 0], [1]]


def test_batches_hold_the_samples_of_the_order() -> None:
    order = np.array([4, 0, 3, 1, 2])
    batches = list(DeviceData(numbered(5), CPU).batches(order, 2))
    assert [batch.indices.tolist() for batch in batches] == [[4, 0], [3, 1], [2]]
    for batch in batches:
        assert torch.equal(batch.labels, batch.indices)
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(batch.indices), 2, 2, 3)
        assert (batch.images == batch.indices[:, None, None, None]).all()


def test_skipped_batches_change_nothing_for_the_rest() -> None:
    data, order = DeviceData(numbered(9), CPU), epoch_order(0, 1, 9)
    whole = [batch.indices.tolist() for batch in data.batches(order, 2)]
    assert [batch.indices.tolist() for batch in data.batches(order, 2, first=3)] == whole[3:]
    assert list(data.batches(order, 2, first=5)) == []


def test_a_read_only_memory_map_will_do(tmp_path: Path) -> None:
    numbered(6).images.tofile(tmp_path / "images")
    images = np.memmap(tmp_path / "images", np.uint8, "r", shape=(6, 2, 2, 3))
    (batch,) = DeviceData(ArrayData(images, numbered(6).labels), CPU).batches(np.array([5]), 1)
    assert (batch.images == 5).all()
