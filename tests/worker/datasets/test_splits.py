from __future__ import annotations

import numpy as np
import pytest

from worker.datasets.splits import split_train


def labels_of(*counts: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def held_out(fraction: float, *counts: int) -> list[int]:
    labels = labels_of(*counts)
    _, val = split_train(labels, fraction, seed=0)
    return [int(np.sum(labels[val] == label)) for label in range(len(counts))]


def test_train_and_val_are_rising_and_hold_each_image_once() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 500)
    train, val = split_train(labels, 0.2, seed=3)
    assert len(val) == 100
    assert np.all(np.diff(train) > 0)
    assert np.all(np.diff(val) > 0)
    assert sorted([*train, *val]) == list(range(500))


@pytest.mark.parametrize(
    ("fraction", "counts", "expected"),
    [
        (0.1, (50, 30, 20), [5, 3, 2]),
        (0.5, (3, 3), [2, 1]),  # 1.5 each, 3 in all: the first class gets the odd one
        (0.1, (4, 6), [0, 1]),  # 0.4 and 0.6, 1 in all: the larger remainder
        (0.01, (4, 6), [0, 1]),  # at least one
        (0.9, (2, 2), [1, 1]),  # each class keeps one
        (0.5, (1, 9), [0, 5]),
        (0.5, (1, 1), [0, 0]),
    ],
)
def test_the_share_is_dealt_out_by_largest_remainders(
    fraction: float, counts: tuple[int, ...], expected: list[int]
) -> None:
    assert held_out(fraction, *counts) == expected


def test_the_same_seed_holds_out_the_same_and_another_seed_others() -> None:
    labels = labels_of(40, 40)
    first, again, other = (split_train(labels, 0.25, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_what_a_seed_holds_out_never_changes_between_versions() -> None:
    _, val = split_train(labels_of(10, 10), 0.2, seed=0)
    assert val.tolist() == [2, 3, 11, 13]


def test_empty_labels_hold_out_nothing() -> None:
    train, val = split_train(labels_of(), 0.5, seed=0)
    assert (len(train), len(val)) == (0, 0)
