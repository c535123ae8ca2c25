"""Fewer points of a series that still draw the same curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

PointT = TypeVar("PointT", bound=Any)
"""What has a `value`."""
MIN_POINTS = 2


def thin(points: Sequence[PointT], max_points: int) -> list[PointT]:
    """At most `max_points` (2 or more) of `points`, in their order.

    The series is cut into stretches of nearly equal length and the lowest and the highest point
    of each is kept: so are the series' own extremes, and every peak that would show. From 4
    points on, the first and the last are kept as well.
    """
    assert max_points >= MIN_POINTS
    if len(points) <= max_points:
        return list(points)
    kept: set[int] = set()
    start, end, budget = 0, len(points), max_points
    if max_points >= MIN_POINTS + 2:
        kept = {0, len(points) - 1}
        start, end, budget = 1, len(points) - 1, max_points - 2
    num_stretches = budget // 2
    value_at = [point.value for point in points].__getitem__
    for stretch in range(num_stretches):
        first = start + (end - start) * stretch // num_stretches
        beyond = start + (end - start) * (stretch + 1) // num_stretches
        kept.add(min(range(first, beyond), key=value_at))
        kept.add(max(range(first, beyond), key=value_at))
    return [points[index] for index in sorted(kept)]
