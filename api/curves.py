"""A job's series as they are drawn: thinned, however long they are.

A long series is not read as a whole for each request. The database picks the extremes of each
stretch of it, and those of stretches that are complete are kept in memory, since points never
change. They are dropped when a job was rewound. What is kept is no truth: a process without it
answers the same, a little later.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from api.thinning import MIN_POINTS, thin
from shared import repository
from skipline.schemas import MetricPoint

NUM_READ_WHOLE = 10_000
"""So few points are read as they are."""
MAX_KEPT_POINTS = 200_000
"""Of all jobs together: some 50 MB."""

Rows = list[Any]
"""As `repository.read_points` gives them."""


@dataclass
class _Extremes:
    """Of a job's points up to the number `up_to`."""

    up_to: int = 0
    rows: Rows = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Curves:
    """Reads thinned series. `limit`: points that one answer holds at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[str, int], _Extremes] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self,
        session: Session,
        job_id: str,
        names: Collection[str] | None,
        after: int,
        max_points: int,
    ) -> tuple[dict[str, list[MetricPoint]], int]:
        """All points numbered above `after`, each series thinned to `max_points`; with the number
        of the job's last point. Raises `JobNotFound`."""
        last = repository.get_job(session, job_id).last_point
        block = _block(last - after, max_points)
        if last - after <= NUM_READ_WHOLE:
            rows = repository.read_points(session, job_id, after=after, names=names)
        elif after == 0:
            rows = self._whole(session, job_id, last, block)
        else:
            rows = repository.read_extremes(
                session, job_id, after=after, up_to=last, block=block, names=names
            )
        found: dict[str, Rows] = defaultdict(list)
        for row in rows:
            if row.number <= last and (names is None or row.name in names):
                found[row.name].append(row)
        max_points = min(max_points, max(MIN_POINTS, self._limit // max(1, len(found))))
        series = {
            name: [repository.point_document(row) for row in thin(points, max_points)]
            for name, points in found.items()
        }
        return series, last

    def _whole(self, session: Session, job_id: str, last: int, block: int) -> Rows:
        """The extremes of all complete stretches, and the points after them."""
        kept = self._entry(job_id, block)
        with kept.lock:  # The same curve is not computed twice at a time.
            if kept.up_to and repository.was_rewound(session, job_id, after=kept.up_to):
                kept.up_to, kept.rows = 0, []
            complete = last - last % block
            if complete > kept.up_to:
                kept.rows = kept.rows + repository.read_extremes(
                    session, job_id, after=kept.up_to, up_to=complete, block=block
                )
                kept.up_to = complete
            rows, up_to = kept.rows, kept.up_to
        self._make_room()
        return rows + repository.read_points(session, job_id, after=up_to)

    def _entry(self, job_id: str, block: int) -> _Extremes:
        with self._lock:
            kept = self._kept.setdefault((job_id, block), _Extremes())
            self._kept.move_to_end((job_id, block))
            return kept

    def _make_room(self) -> None:
        with self._lock:
            num_kept = sum(len(kept.rows) for kept in self._kept.values())
            while num_kept > MAX_KEPT_POINTS:
                _, dropped = self._kept.popitem(last=False)
                num_kept -= len(dropped.rows)


def _block(num_points: int, max_points: int) -> int:
    """A power of two, so that a growing series keeps it for long: the extremes of stretches of so
    many numbers are `max_points` points at least."""
    return 1 << max(0, (2 * num_points // max_points).bit_length() - 1)
