from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.thinning import thin
from skipline.schemas import MetricPoint

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def series(*values: float) -> list[MetricPoint]:
    points = enumerate(values, 1)
    return [MetricPoint(step=step, epoch=1, value=value, time=NOW) for step, value in points]


def steps(values: list[float], max_points: int) -> list[int]:
    return [point.step for point in thin(series(*values), max_points)]


def test_a_short_series_stays_as_it_is() -> None:
    assert steps([3, 1, 2], 3) == [1, 2, 3]
    assert steps([], 2) == []


def test_two_points_are_the_extremes_in_their_order() -> None:
    assert steps([5, 9, 1, 4], 2) == [2, 3]
    assert steps([5, 1, 9, 4], 3) == [2, 3]


def test_a_peak_in_each_stretch_is_kept_with_both_ends() -> None:
    # Ten points into six: the ends, and of steps 2-5 and 6-9 the lowest and the highest.
    assert steps([0, 5, 5, 9, 1, 5, 8, 2, 5, 0], 6) == [1, 4, 5, 7, 8, 10]


def test_a_flat_series_is_thinned_too() -> None:
    assert steps([7] * 100, 4) == [1, 2, 100]


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(2, 50))
def test_no_extreme_is_lost_and_nothing_is_made_up(values: list[float], max_points: int) -> None:
    points = series(*values)
    kept = thin(points, max_points)
    assert len(kept) <= max_points
    assert [point for point in points if point in kept] == kept
    if points:
        assert min(p.value for p in kept) == min(values)
        assert max(p.value for p in kept) == max(values)


@pytest.mark.parametrize("max_points", [2, 3, 4, 5, 17, 1000])
def test_the_number_asked_for_is_never_exceeded(max_points: int) -> None:
    waves = [float(step * 7919 % 101) for step in range(5000)]
    assert 2 <= len(steps(waves, max_points)) <= max_points
