"""Two models on the same images: is one of them better, and where do they differ?

Made of what evaluations said of each image, which is stored with their reports.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from shared.repository import EncodedOutcomes
from skipline.schemas import ClassComparison, ComparedModel, Comparison, FlippedImage

MAX_FLIPPED = 100
"""Told of each direction."""
Z_95 = NormalDist().inv_cdf(0.975)
"""Of a standard normal variable, 95 % lie within so much of 0."""

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Outcomes:
    """What a model said of images of a stored split: their places in it, labels and answers, each
    int32 [N] and in the order of the places."""

    split: str
    rows: Int32
    labels: Int32
    predicted: Int32

    def encode(self) -> EncodedOutcomes:
        """About a byte an image for a good model."""
        columns = np.stack([self.rows, self.labels, self.predicted]).astype("<i4")
        steps = np.diff(columns, axis=1, prepend=0).astype("<i4")
        return EncodedOutcomes(self.split, zlib.compress(steps.tobytes()))

    @classmethod
    def decode(cls, encoded: EncodedOutcomes) -> Outcomes:
        """What `encode` made."""
        steps = np.frombuffer(zlib.decompress(encoded.columns), "<i4").reshape(3, -1)
        return cls(encoded.split, *np.cumsum(steps, axis=1, dtype=np.int32))


@dataclass(frozen=True)
class Images:
    """What both were asked about."""

    dataset: str
    dataset_id: str
    split: str
    classes: tuple[str, ...]


def compare(
    models: tuple[ComparedModel, ComparedModel], outcomes: tuple[Outcomes, Outcomes], images: Images
) -> Comparison | None:
    """The images that both were asked about; None if there is none.

    The p-value is that of McNemar's exact test (McNemar, 1947): how often a difference as large as
    this one would come about between equally good models. The interval of the difference is Wald's
    for paired shares.
    """
    a, b = outcomes
    rows, in_a, in_b = np.intersect1d(a.rows, b.rows, assume_unique=True, return_indices=True)
    if a.split != b.split or not len(rows):
        return None
    labels, called_a, called_b = a.labels[in_a], a.predicted[in_a], b.predicted[in_b]
    right_a, right_b = called_a == labels, called_b == labels
    lost, gained = right_a & ~right_b, right_b & ~right_a
    num, num_lost, num_gained = len(rows), int(lost.sum()), int(gained.sum())
    difference = (num_gained - num_lost) / num
    variance = (num_gained + num_lost) / num - difference**2
    margin = Z_95 * math.sqrt(max(variance, 0.0) / num)

    def flipped(mask: npt.NDArray[np.bool_]) -> list[FlippedImage]:
        return [
            FlippedImage(
                split=a.split,
                index=int(rows[place]),
                label=images.classes[labels[place]],
                called_a=images.classes[called_a[place]],
                called_b=images.classes[called_b[place]],
            )
            for place in np.flatnonzero(mask)[:MAX_FLIPPED]
        ]

    per_class = []
    for index, label in enumerate(images.classes):
        mine = labels == index
        if number := int(mine.sum()):
            share_a, share_b = float(right_a[mine].mean()), float(right_b[mine].mean())
            per_class.append(
                ClassComparison(
                    label=label,
                    num_samples=number,
                    accuracy_a=share_a,
                    accuracy_b=share_b,
                    difference=share_b - share_a,
                )
            )
    return Comparison(
        a=models[0],
        b=models[1],
        dataset=images.dataset,
        dataset_id=images.dataset_id,
        split=images.split,
        num_samples=num,
        top1_a=float(right_a.mean()),
        top1_b=float(right_b.mean()),
        difference=difference,
        difference_interval=(max(-1.0, difference - margin), min(1.0, difference + margin)),
        p_value=mcnemar(num_lost, num_gained),
        num_lost=num_lost,
        num_gained=num_gained,
        agreement=float((called_a == called_b).mean()),
        per_class=per_class,
        lost=flipped(lost),
        gained=flipped(gained),
    )


def mcnemar(num_lost: int, num_gained: int) -> float:
    """The exact two-sided p-value for so many images that one model alone has right, and so many
    that the other alone has."""
    if not num_lost + num_gained:
        return 1.0
    from scipy.stats import binomtest  # takes a while, and few ask

    return float(binomtest(num_lost, num_lost + num_gained).pvalue)
