from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from skipline.schemas import Report
from worker.engine import report as report_module
from worker.engine.evaluate import Evaluation
from worker.engine.report import (
    Subject,
    build_report,
    calibration_of,
    confusion_matrix,
    fit_temperature,
    wilson_interval,
)


def judged(
    labels: Sequence[int],
    predicted: Sequence[int],
    losses: Sequence[float] | None = None,
    confidences: Sequence[float] | None = None,
    logits: Sequence[Sequence[float]] | None = None,
) -> Evaluation:
    count = len(labels)
    num_classes = max(*labels, *predicted, 1) + 1
    return Evaluation(
        labels=np.array(labels),
        predicted=np.array(predicted),
        losses=np.array(losses or [1.0] * count, np.float32),
        in_top5=np.ones(count, bool),
        confidences=np.array(confidences or [0.9] * count, np.float32),
        logits=np.array(logits if logits else np.eye(num_classes)[list(predicted)], np.float32),
        logit_labels=np.array(labels),
    )


def report_of(evaluation: Evaluation, classes: str) -> Report:
    subject = Subject(
        classes=list(classes),
        dataset="letters",
        dataset_id="ds-1",
        split="val",
        image_at=lambda place: ("train", 10 + place, f"{place}.png"),
        selected_on="val",
    )
    return build_report(evaluation, subject)


def test_confusion_has_the_truth_in_rows() -> None:
    confusion = confusion_matrix(judged([0, 0, 0, 1], [0, 1, 1, 1]), 3)
    assert confusion.tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]


def test_a_report_says_what_was_worked_out_by_hand() -> None:
    report = report_of(judged([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 3]), "abec")
    assert report.num_samples == 6
    assert report.top1 == pytest.approx(4 / 6)
    assert report.loss == 1
    assert report.mean_class_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    rows = [(c.label, c.num_samples, c.accuracy, c.precision, c.recall) for c in report.per_class]
    assert rows == [
        ("a", 4, 0.75, 1.0, 0.75),
        ("b", 2, 0.5, 0.5, 0.5),
        ("e", 0, 0.0, 0.0, 0.0),
        ("c", 0, 0.0, 0.0, 0.0),
    ]
    assert [c.f1 for c in report.per_class] == pytest.approx([6 / 7, 0.5, 0, 0])
    assert report.confusion[1] == [0, 1, 0, 1]
    assert report.per_class[0].accuracy_interval == wilson_interval(3, 4)
    assert report.per_class[2].accuracy_interval is None
    assert report.top1_interval == wilson_interval(4, 6)


@pytest.mark.parametrize(
    ("num_right", "num_samples", "low", "high"),
    [
        # From the tables of Newcombe, "Two-sided confidence intervals for the single proportion"
        # (1998), method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_the_literature(
    num_right: int, num_samples: int, low: float, high: float
) -> None:
    assert wilson_interval(num_right, num_samples) == pytest.approx((low, high), abs=5e-5)
    upper = wilson_interval(num_samples - num_right, num_samples)
    assert upper == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    # 15 bins: 0.60 is the upper border of the ninth; 0.9 and 0.92 are in the fourteenth.
    evaluation = judged([0, 0, 1, 1, 1], [0, 0, 1, 0, 0], confidences=[0.9, 0.92, 0.6, 0.59, 0.6])
    calibration = calibration_of(evaluation)
    assert [(part.num_images, part.accuracy) for part in calibration.bins] == [
        *((3, pytest.approx(1 / 3)), (2, 1.0)),
    ]
    assert calibration.bins[0].upper == pytest.approx(9 / 15)
    gaps = 3 * abs((0.6 + 0.59 + 0.6) / 3 - 1 / 3) + 2 * abs(0.91 - 1)
    assert calibration.ece == pytest.approx(gaps / 5, rel=1e-5)


def test_the_temperature_makes_a_network_as_sure_as_it_is_right() -> None:
    # Two logits that are 2 apart and right three times of four: sigmoid(2 / T) = 3 / 4.
    logits = [[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
    labels = np.array([0, 0, 1, 0])
    assert fit_temperature(np.array(logits, np.float32), labels) == pytest.approx(2 / math.log(3))
    calibration = calibration_of(judged([0, 0, 1, 0], [0, 0, 1, 1], logits=logits))
    assert calibration.calibrated_ece == pytest.approx(0, abs=1e-6)
    assert calibration.reject_below == pytest.approx(3 / 4)


def test_19_of_20_right_answers_reach_the_threshold_for_unknown_images() -> None:
    # Of 41 answers of two logits, 0 and 1 to 41, the last is wrong. Two in 40 may fall below.
    logits = [[float(size), 0.0] for size in range(1, 42)]
    labels = [0] * 40 + [1]
    calibration = calibration_of(judged(labels, [0] * 41, logits=logits))
    third = 1 / (1 + math.exp(-3 / calibration.temperature))
    assert calibration.reject_below == pytest.approx(third)
    never_right = calibration_of(judged([1, 1], [0, 0], logits=[[1.0, 0.0]] * 2))
    assert never_right.reject_below is None


def test_a_network_that_is_never_or_always_wrong_has_a_finite_temperature() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(1 / 20)
    assert fit_temperature(logits, np.array([1, 0])) == pytest.approx(20)


def test_large_logits_are_no_trouble_and_parts_are_as_good_as_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 3)).astype(np.float32) * 1000
    labels = generator.integers(3, size=50)
    whole = fit_temperature(logits, labels)
    assert whole == pytest.approx(20)  # Noise: it should be as unsure as it may.
    monkeypatch.setattr(report_module, "ROWS_AT_ONCE", 7)
    assert fit_temperature(logits, labels) == whole


def test_the_hardest_images_come_first_and_say_where_they_are() -> None:
    evaluation = judged([0, 1, 1], [0, 0, 1], losses=[0.5, 2.5, 0.5], confidences=[0.6, 0.9, 0.7])
    first, second, third = report_of(evaluation, "ab").hardest
    assert (first.image, first.split, first.index) == ("1.png", "train", 11)
    assert (first.label, first.predicted, first.loss) == ("b", "a", 2.5)
    assert first.confidence == pytest.approx(0.9)
    assert (second.image, third.image) == ("0.png", "2.png")


def test_the_most_frequent_mistakes_are_listed_with_their_hardest_images() -> None:
    labels = [0, 0, 0, 0, 1, 1, 2]
    predicted = [1, 1, 0, 2, 0, 1, 2]
    report = report_of(judged(labels, predicted, losses=[1, 3, 0, 2, 1, 0, 0]), "abc")
    assert [(p.label, p.predicted, p.num_images, p.share) for p in report.confused] == [
        *(("a", "b", 2, 0.5), ("a", "c", 1, 0.25), ("b", "a", 1, 0.5)),
    ]
    assert [image.image for image in report.confused[0].images] == ["1.png", "0.png"]
