"""Finds attempts whose worker is gone and gives their jobs back to the queue.

Two signs: a lease that has run out by the database's clock, and, on this host, an owner's lock
file that nobody holds, which tells at once. Several reapers at a time are harmless: each loss is
one conditional UPDATE.
"""

from __future__ import annotations

import time

import structlog
from sqlalchemy import ColumnElement, select

from shared import lifecycle, locks
from shared.database import Database, db_now
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Job
from shared.timers import Timer

log = structlog.get_logger(__name__)


class Reaper:
    """Call `look` now and then, or `start` a thread that does."""

    def __init__(self, settings: Settings, database: Database, storage: Storage) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._locks = settings.home_path / "locks"
        self._host = locks.host_name()
        self._last_look: tuple[float, float] | None = None
        self._leases_trusted_from = 0.0
        self._timer = Timer("reaper", settings.reap_seconds, self._try_to_look)

    def look(self) -> int:
        """One round. Returns how many jobs it took from dead owners."""
        dead = locks.dead_owners(self._locks)
        reaped = self._reap_owners(dead)
        self._forget(dead)
        if self._leases_can_be_trusted():
            reaped += self._reap_leases()
        return reaped

    def _reap_owners(self, dead: list[str]) -> int:
        if not dead:
            return 0
        with self._database.read_scope() as session:
            query = select(Job.id, Job.attempt, Job.owner)
            rows = session.execute(query.where(Job.owner.in_(dead), Job.host == self._host)).all()
        reason = "The worker's process ended"
        return sum(self._lose(row.id, row.attempt, reason, Job.owner == row.owner) for row in rows)

    def _forget(self, dead: list[str]) -> None:
        """A dead owner's file is removed when it owns nothing, and its half-written folders
        with it. An owner that died before it claimed leaves only the file."""
        for owner in dead:
            with self._database.read_scope() as session:
                owns = session.scalar(select(Job.id).where(Job.owner == owner).limit(1))
            if owns is None:
                self._storage.sweep(owner)
                locks.forget(self._locks, owner)

    def _reap_leases(self) -> int:
        expired = Job.lease_until < db_now()
        with self._database.read_scope() as session:
            owned = Job.status.in_(lifecycle.OWNED)
            rows = session.execute(select(Job.id, Job.attempt).where(owned, expired)).all()
        reason = "The worker did not renew its lease"
        return sum(self._lose(row.id, row.attempt, reason, expired) for row in rows)

    def _lose(self, job_id: str, attempt: int, reason: str, where: ColumnElement[bool]) -> bool:
        with self._database.session_scope() as session:
            lost = lifecycle.lose(
                session,
                job_id,
                attempt,
                reason,
                max_crashes=self._settings.max_crashes,
                where=where,
            )
        if lost:
            log.warning("attempt lost", job_id=job_id, attempt=attempt, reason=reason)
        return lost

    def _leases_can_be_trusted(self) -> bool:
        """False for one lease after the clock jumped: on a laptop that slept, the workers slept
        too, and get the time to renew."""
        wall, monotonic = time.time(), time.monotonic()
        if self._last_look is not None:
            jump = (wall - self._last_look[0]) - (monotonic - self._last_look[1])
            if abs(jump) > self._settings.lease_seconds / 4:
                self._leases_trusted_from = monotonic + self._settings.lease_seconds
        self._last_look = (wall, monotonic)
        return monotonic >= self._leases_trusted_from

    def start(self) -> None:
        """Looks every `reap_seconds` until `stop`."""
        self._timer.start()

    def stop(self) -> None:
        self._timer.stop()

    def _try_to_look(self) -> None:
        try:
            self.look()
        except Exception as error:  # The database may be away: the next round tries again.
            log.warning("reaper failed", error=type(error).__name__)
