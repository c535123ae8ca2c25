"""A job's series as they are drawn: thinned, however long they are.

A long series is never read as a whole: the extremes of each stretch of it were marked when it was
written, and what is read is them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from sqlalchemy.orm import Session

from api.thinning import MIN_POINTS, thin
from shared import repository
from skipline.schemas import MetricPoint


def read_curves(
    session: Session,
    job_id: str,
    names: Collection[str] | None,
    *,
    after: int = 0,
    max_points: int,
    limit: int,
) -> tuple[dict[str, list[MetricPoint]], int]:
    """The series from the number `after` on, each thinned to `max_points`, with the number of the
    job's last point. No more than `limit` points are read as they are, or answered in all. Raises
    `JobNotFound`."""
    last = repository.get_job(session, job_id).last_point
    if last - after <= limit:
        rows = repository.read_points(session, job_id, after=after, up_to=last, names=names)
    else:
        rows = repository.read_curve(session, job_id, after=after, last=last, names=names)
    found: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        found[row.name].append(row)
    max_points = min(max_points, max(MIN_POINTS, limit // max(1, len(found))))
    series = {
        name: [repository.point_document(row) for row in thin(points, max_points)]
        for name, points in found.items()
    }
    return series, last
