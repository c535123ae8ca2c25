"""The report of an evaluation: how good, how sure, and what it got wrong. Nothing but arithmetic on
an `Evaluation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from skipline.schemas import (
    Calibration,
    ClassReport,
    ConfusedPair,
    Interval,
    JudgedImage,
    ReliabilityBin,
    Report,
)
from worker.engine.evaluate import Evaluation

NUM_HARDEST = 32
NUM_CONFUSED_PAIRS = 20
NUM_PAIR_IMAGES = 5
NUM_BINS = 15
"""Of equal width, as in Guo et al., "On Calibration of Modern Neural Networks" (2017)."""
Z_95 = NormalDist().inv_cdf(0.975)
"""Of a standard normal variable, 95 % lie within so much of 0."""
MAX_SHARPNESS = 20.0
"""Bounds of 1 / temperature, and of temperature: a network that is never wrong has none."""
SHARPNESS_STEPS = 50
REJECTED_ONE_IN = 20
"""Right answers that may fall below the threshold for unknown images."""
ROWS_AT_ONCE = 4096

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """What was evaluated. `image_at` gives an image, by its place in the evaluation, as where it
    is in the stored dataset: the split, the place in it, and the path as it was brought in."""

    classes: Sequence[str]
    dataset: str
    dataset_id: str
    split: Literal["train", "val", "test"]
    image_at: Callable[[int], tuple[str, int, str]]
    selected_on: Literal["val", "test"] | None = None
    checkpoint_id: str | None = None


def build_report(evaluation: Evaluation, subject: Subject) -> Report:
    """The report of an evaluation. Classes without images do not enter the mean accuracy."""
    classes = subject.classes
    confusion = confusion_matrix(evaluation, len(classes))
    per_class = [_class_report(label, confusion, index) for index, label in enumerate(classes)]
    num_samples, num_right = len(evaluation.labels), int(np.trace(confusion))
    return Report(
        dataset=subject.dataset,
        dataset_id=subject.dataset_id,
        split=subject.split,
        selected_on=subject.selected_on,
        checkpoint_id=subject.checkpoint_id,
        num_samples=num_samples,
        loss=evaluation.loss,
        top1=evaluation.top1,
        top1_interval=wilson_interval(num_right, num_samples),
        top5=evaluation.top5,
        mean_class_accuracy=float(np.mean([c.accuracy for c in per_class if c.num_samples])),
        per_class=per_class,
        confusion=confusion.tolist(),
        calibration=calibration_of(evaluation),
        hardest=[_judged(evaluation, subject, place) for place in hardest(evaluation)],
        confused=_confused_pairs(evaluation, subject, confusion),
    )


def confusion_matrix(evaluation: Evaluation, num_classes: int) -> Int64:
    """int64 [C, C]: at [i, j] the number of images of class i that were called j."""
    cells = evaluation.labels * num_classes + evaluation.predicted
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _class_report(label: str, confusion: Int64, index: int) -> ClassReport:
    """Recall is the class's accuracy; what would be 0 / 0 is 0."""
    hits = int(confusion[index, index])
    num_samples, num_called = int(confusion[index].sum()), int(confusion[:, index].sum())
    recall = hits / num_samples if num_samples else 0.0
    return ClassReport(
        label=label,
        num_samples=num_samples,
        accuracy=recall,
        accuracy_interval=wilson_interval(hits, num_samples) if num_samples else None,
        precision=hits / num_called if num_called else 0.0,
        recall=recall,
        f1=2 * hits / (num_samples + num_called) if num_samples + num_called else 0.0,
    )


def wilson_interval(num_right: int, num_samples: int) -> Interval:
    """Within which the accuracy lies with 95 % confidence, as far as chance in the choice of the
    images goes: Wilson's score interval (1927), which holds for few images and near 0 and 1 too."""
    share, z2 = num_right / num_samples, Z_95**2 / num_samples
    centre = (share + z2 / 2) / (1 + z2)
    half = Z_95 * (share * (1 - share) / num_samples + z2 / (4 * num_samples)) ** 0.5 / (1 + z2)
    return (max(0.0, centre - half), min(1.0, centre + half))


# ------------------------------------------------------------------------------------ calibration


def calibration_of(evaluation: Evaluation) -> Calibration:
    """How far the probabilities can be believed.

    `ece`: the expected calibration error, the mean over all images of the gap between confidence
    and accuracy of the image's bin. `temperature`: what to divide the logits by to make these
    images likeliest (Guo et al., 2017), within [0.05, 20]; the answers stay the same.
    `reject_below`: an answer of less probability is no answer, as Hendrycks & Gimpel, "A Baseline
    for Detecting Misclassified and Out-of-Distribution Examples" (2017), have it.
    """
    right = evaluation.predicted == evaluation.labels
    bins = _reliability(evaluation.confidences, right)
    temperature = fit_temperature(evaluation.logits, evaluation.logit_labels)
    scaled = np.concatenate(
        [
            _probabilities(logits, 1 / temperature).max(axis=1)
            for logits, _ in _in_parts(evaluation.logits, evaluation.logit_labels)
        ]
    )
    right = evaluation.logits.argmax(axis=1) == evaluation.logit_labels
    return Calibration(
        ece=_expected_error(bins),
        temperature=temperature,
        calibrated_ece=_expected_error(_reliability(scaled, right)),
        reject_below=_threshold(scaled[right]),
        bins=bins,
    )


def _reliability(
    confidences: npt.NDArray[Any], right: npt.NDArray[np.bool_]
) -> list[ReliabilityBin]:
    """Bins that hold images, by confidence; a confidence on a border belongs to the bin below."""
    places = np.clip(np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(places, minlength=NUM_BINS)
    sums = np.bincount(places, weights=confidences, minlength=NUM_BINS)
    hits = np.bincount(places, weights=right, minlength=NUM_BINS)
    return [
        ReliabilityBin(
            lower=place / NUM_BINS,
            upper=(place + 1) / NUM_BINS,
            num_images=int(counts[place]),
            confidence=float(sums[place] / counts[place]),
            accuracy=float(hits[place] / counts[place]),
        )
        for place in np.flatnonzero(counts)
    ]


def _threshold(of_right_answers: npt.NDArray[np.float64]) -> float | None:
    """The largest of these confidences that all but one in `REJECTED_ONE_IN` reach."""
    count = len(of_right_answers)
    return float(np.sort(of_right_answers)[count // REJECTED_ONE_IN]) if count else None


def _expected_error(bins: Sequence[ReliabilityBin]) -> float:
    gaps = sum(part.num_images * abs(part.confidence - part.accuracy) for part in bins)
    return gaps / sum(part.num_images for part in bins)


def fit_temperature(logits: npt.NDArray[np.float32], labels: Int64) -> float:
    """The temperature that makes the labels likeliest.

    Cross-entropy is convex in 1 / temperature, so its slope has one zero, which is found by
    halving. `logits` float32 [M, C], `labels` int64 [M].
    """
    low, high = 1 / MAX_SHARPNESS, MAX_SHARPNESS
    for _ in range(SHARPNESS_STEPS):
        middle = (low * high) ** 0.5
        if _slope(logits, labels, middle) < 0:
            low = middle
        else:
            high = middle
    return float((low * high) ** -0.5)


def _slope(logits: npt.NDArray[np.float32], labels: Int64, sharpness: float) -> float:
    """Of the summed cross-entropy at this 1 / temperature: expected minus true logits."""
    total = 0.0
    for part, own in _in_parts(logits, labels):
        expected = (_probabilities(part, sharpness) * part).sum(axis=1)
        total += float((expected - part[np.arange(len(part)), own]).sum())
    return total


def _in_parts(
    logits: npt.NDArray[np.float32], labels: Int64
) -> list[tuple[npt.NDArray[np.float32], Int64]]:
    starts = range(0, len(labels), ROWS_AT_ONCE)
    return [(logits[i : i + ROWS_AT_ONCE], labels[i : i + ROWS_AT_ONCE]) for i in starts]


def _probabilities(logits: npt.NDArray[np.float32], sharpness: float) -> npt.NDArray[np.float64]:
    scaled = logits.astype(np.float64) * sharpness
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    shares: npt.NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


# --------------------------------------------------------------------------------------- mistakes


def hardest(evaluation: Evaluation) -> list[int]:
    """Places of the images with the highest loss, the highest first; equal ones in their order."""
    places: list[int] = np.argsort(-evaluation.losses, kind="stable")[:NUM_HARDEST].tolist()
    return places


def _judged(evaluation: Evaluation, subject: Subject, place: int) -> JudgedImage:
    split, index, path = subject.image_at(place)
    return JudgedImage(
        image=path,
        split=split,
        index=index,
        label=subject.classes[evaluation.labels[place]],
        predicted=subject.classes[evaluation.predicted[place]],
        confidence=float(evaluation.confidences[place]),
        loss=float(evaluation.losses[place]),
    )


def _confused_pairs(
    evaluation: Evaluation, subject: Subject, confusion: Int64
) -> list[ConfusedPair]:
    """What was most often called what, each with the images that were hardest."""
    trues, calleds = np.nonzero(confusion * (1 - np.eye(len(confusion), dtype=np.int64)))
    order = np.argsort(-confusion[trues, calleds], kind="stable")[:NUM_CONFUSED_PAIRS]
    pairs = []
    for true, called in zip(trues[order], calleds[order], strict=True):
        among = np.flatnonzero((evaluation.labels == true) & (evaluation.predicted == called))
        worst = among[np.argsort(-evaluation.losses[among], kind="stable")][:NUM_PAIR_IMAGES]
        pairs.append(
            ConfusedPair(
                label=subject.classes[true],
                predicted=subject.classes[called],
                num_images=len(among),
                share=float(len(among) / confusion[true].sum()),
                images=[_judged(evaluation, subject, place) for place in worst.tolist()],
            )
        )
    return pairs
