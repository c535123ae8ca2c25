"""How many jobs may wait. Keeps the queue finite without counting it for every job."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy.orm import Session

from shared import repository
from shared.errors import TooManyJobs
from shared.settings import Settings

COUNT_SECONDS = 1.0
"""So long a count of the queue is good, with what this process has added to it."""


@dataclass
class _Count:
    num_queued: int
    counted_at: float


class QueueLimits:
    """The limits of the whole queue, and of each submitter's share of it.

    A full queue is counted anew each time, so that a place that becomes free is found at once. One
    that has room is counted once a second; it may come to hold as many more as other processes and
    requests at the same moment add meanwhile.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_jobs = settings.max_queued_jobs
        self._max_jobs_per_key = settings.max_queued_jobs_per_key
        self._counts: dict[str | None, _Count] = {}

    def take_place(self, session: Session, submitter: str) -> None:
        """Makes sure that one more job may wait. Raises `TooManyJobs`."""
        self._take(session, None, self._max_jobs)
        if submitter:
            self._take(session, submitter, self._max_jobs_per_key)

    def _take(self, session: Session, submitter: str | None, limit: int) -> None:
        now = time.monotonic()
        count = self._counts.get(submitter)
        if count is None or count.num_queued >= limit or now > count.counted_at + COUNT_SECONDS:
            count = _Count(repository.num_queued(session, submitter), now)
            self._counts[submitter] = count
        if count.num_queued >= limit:
            whose = "jobs" if submitter is None else "jobs of this key"
            raise TooManyJobs(f"{limit} {whose} wait already; try again when some have begun")
        count.num_queued += 1
