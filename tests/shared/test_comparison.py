"""Two models on the same images, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from shared.comparison import Images, Outcomes, compare, mcnemar
from skipline.schemas import ComparedModel, Comparison

MODEL = ComparedModel(checkpoint_id="c", job_id="j", arch="resnet18", epoch=1)
IMAGES = Images("pets", "id", "test", ("cat", "dog", "owl"))


def outcomes(
    rows: list[int], labels: list[int], predicted: list[int], split: str = "test"
) -> Outcomes:
    return Outcomes(
        split, *(np.array(column, dtype=np.int32) for column in (rows, labels, predicted))
    )


def compared(a: Outcomes, b: Outcomes) -> Comparison:
    found = compare((MODEL, MODEL), (a, b), IMAGES)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("num_lost", "num_gained", "p_value"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (1, 5, 2 * (1 + 6) / 2**6),
        (10, 0, 2 / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_the_p_value_is_mcnemars(num_lost: int, num_gained: int, p_value: float) -> None:
    assert mcnemar(num_lost, num_gained) == pytest.approx(p_value, rel=1e-9)
    assert mcnemar(num_gained, num_lost) == pytest.approx(p_value, rel=1e-9)


def test_what_differs_is_told_by_image_and_by_class() -> None:
    labels = [0, 0, 0, 0, 1, 1, 1, 1]
    a = outcomes(list(range(8)), labels, [0, 0, 0, 1, 1, 0, 0, 1])
    b = outcomes(list(range(8)), labels, [0, 0, 2, 2, 1, 1, 1, 1])
    found = compared(a, b)
    assert (found.num_samples, found.top1_a, found.top1_b) == (8, 5 / 8, 6 / 8)
    assert (found.num_lost, found.num_gained, found.agreement) == (1, 2, 4 / 8)
    assert found.difference == 1 / 8
    # sqrt((3/8 - 1/64) / 8) = sqrt(23) / 16 / sqrt(2)
    margin = 1.959963984540054 * (23 / 512) ** 0.5
    assert found.difference_interval == pytest.approx((1 / 8 - margin, 1 / 8 + margin))
    assert found.p_value == 1.0
    assert [(row.label, row.num_samples, row.difference) for row in found.per_class] == [
        ("cat", 4, -1 / 4),
        ("dog", 4, 1 / 2),
    ]
    [lost] = found.lost
    assert (lost.split, lost.index, lost.label) == ("test", 2, "cat")
    assert (lost.called_a, lost.called_b) == ("cat", "owl")
    assert [image.index for image in found.gained] == [5, 6]


def test_only_images_that_both_were_asked_about_count() -> None:
    a = outcomes([1, 4, 9], [0, 1, 1], [0, 0, 1])
    b = outcomes([4, 8, 9, 11], [1, 0, 1, 0], [1, 0, 0, 0])
    found = compared(a, b)
    assert (found.num_samples, found.top1_a, found.top1_b) == (2, 0.5, 0.5)
    assert [image.index for image in found.lost] == [9]
    assert [image.index for image in found.gained] == [4]


def test_models_that_share_no_image_are_not_compared() -> None:
    a = outcomes([1, 2], [0, 0], [0, 0])
    assert compare((MODEL, MODEL), (a, outcomes([3], [0], [0])), IMAGES) is None
    other_split = outcomes([1, 2], [0, 0], [0, 0], split="train")
    assert compare((MODEL, MODEL), (a, other_split), IMAGES) is None


def test_outcomes_are_stored_small_and_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(rng.random(20_000) < 0.5).astype(np.int32)
    labels = np.sort(rng.integers(0, 1000, len(rows))).astype(np.int32)
    predicted = np.where(rng.random(len(rows)) < 0.8, labels, 999).astype(np.int32)
    encoded = Outcomes("val", rows, labels, predicted).encode()
    assert len(encoded.columns) < 2 * len(rows)
    back = Outcomes.decode(encoded)
    assert back.split == "val"
    for name, column in (("rows", rows), ("labels", labels), ("predicted", predicted)):
        assert np.array_equal(getattr(back, name), column)
