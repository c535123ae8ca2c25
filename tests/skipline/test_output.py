from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from skipline.cli.output import (
    format_age,
    format_bytes,
    format_duration,
    format_kind,
    format_metric,
    format_result,
    format_wait,
    sparkline,
)
from skipline.schemas import JobKind


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_are_told_in_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "just now"),
        (59, "59 s ago"),
        (180, "3 min ago"),
        (7300, "2 h ago"),
        (90_000, "1 day ago"),
        (200_000, "2 days ago"),
        (40 * 86_400, "2026-09-22"),
    ],
)
def test_ages_are_told_in_one_unit_and_old_ones_as_dates(seconds: int, text: str) -> None:
    now = datetime(2026, 11, 1, 12, tzinfo=UTC)
    assert format_age(now - timedelta(seconds=seconds), now) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-300, "any moment"),
        (9, "any moment"),
        (40, "in 40 s"),
        (59.7, "in 1 min"),
        (89, "in 1 min"),
        (91, "in 2 min"),
        (3590, "in 1 h"),
        (2.6 * 86_400, "in 3 days"),
    ],
)
def test_waits_are_told_in_the_nearest_unit(seconds: float, text: str) -> None:
    now = datetime(2026, 11, 1, 12, tzinfo=UTC)
    assert format_wait(now + timedelta(seconds=seconds), now) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("val_top1", 0.98349, "98.3 %"),
        ("train_loss", 1.23456, "1.2346"),
        ("lr", 0.0001, "0.0001"),
        ("lr", 0.0, "0"),
        ("images_per_second", 1204.4, "1,204"),
        ("epoch_seconds", 75.0, "1 min 15 s"),
        ("gpu_memory_bytes", 1536.0, "1.5 KiB"),
    ],
)
def test_metrics_are_told_in_the_unit_of_their_name(name: str, value: float, text: str) -> None:
    assert format_metric(name, value) == text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("num_parameters", 11_173_962, "11,173,962"),
        ("peak_memory_bytes", 3 * 2**30, "3.0 GiB"),
        ("seconds_per_epoch", 75.0, "1 min 15 s"),
        ("images_per_second", 1204.4, "1,204"),
        ("top1", 1.0, "100.0 %"),
        ("device", "cpu", "cpu"),
        ("best", True, "true"),
        ("classes", ["a"], '["a"]'),
        ("peak_memory_bytes", None, "null"),
    ],
)
def test_results_are_told_in_the_unit_of_their_key(key: str, value: object, text: str) -> None:
    assert format_result(key, value) == text


def test_a_kind_is_told_in_words() -> None:
    assert [format_kind(kind) for kind in (JobKind.train, JobKind.dry_run)] == ["train", "dry run"]


def test_bytes_are_told_in_binary_units() -> None:
    assert [format_bytes(count) for count in (999, 1024, 5 * 2**40)] == [
        "999 B",
        "1.0 KiB",
        "5.0 TiB",
    ]


def test_a_sparkline_rises_from_the_lowest_to_the_highest_mean() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 2, 7, 9], width=2) == "▁█"
    assert sparkline([5, 5]) == "▄▄"
    assert sparkline([]) == ""
