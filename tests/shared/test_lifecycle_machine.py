"""The life of jobs under any order of events, on each database: workers that claim, renew, crash,
come back as zombies and finish twice; clients that ask for everything; a reaper. After each step
what must always hold is looked up in the database."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, select, update

from shared import lifecycle
from shared.database import Database, db_now
from shared.errors import AppError, IllegalTransition, InvalidInput, JobInUse
from shared.lifecycle import OWNED, Action, Fence, Superseded
from shared.reaper import Reaper
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Attempt, Event, Job, MetricPoint
from skipline.schemas import JobStatus
from tests.shared import jobs

MAX_JOBS = 12
ENDS = (JobStatus.succeeded, JobStatus.failed, JobStatus.cancelled)


class Jobs(RuleBasedStateMachine):
    """`attempts` holds every fence that was ever given out: a rule that takes one from there acts
    for a worker that may have lost its job long ago."""

    database: ClassVar[Database]
    reaper: ClassVar[Reaper]

    job_ids = Bundle("job_ids")
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.existing: set[str] = set()
        self.ended: dict[str, tuple[Any, ...]] = {}
        self.num_owners = 0
        self.last_numbers: dict[str, tuple[int, int]] = {}
        with self.database.session_scope() as session:
            session.execute(delete(Job))

    def row(self, job_id: str) -> Job | None:
        with self.database.read_scope() as session:
            return session.get(Job, job_id)

    def owns(self, fence: Fence) -> bool:
        row = self.row(fence.job_id)
        return row is not None and (row.attempt, row.owner) == (fence.attempt, fence.owner)

    # What clients do

    @rule(target=job_ids, priority=st.integers(-1, 1))
    @precondition(lambda self: len(self.existing) < MAX_JOBS)
    def add(self, priority: int) -> str:
        return self._added(jobs.add_job(self.database, priority=priority))

    @rule(target=job_ids, before=job_ids)
    @precondition(lambda self: len(self.existing) < MAX_JOBS)
    def add_after(self, before: str) -> str | MultipleResults[str]:
        row = self.row(before)
        if row is None or row.status in (JobStatus.failed, JobStatus.cancelled):
            with pytest.raises(InvalidInput):
                jobs.add_job(self.database, after=before)
            return multiple()
        return self._added(jobs.add_job(self.database, after=before))

    def _added(self, job_id: str) -> str:
        self.existing.add(job_id)
        return job_id

    @rule(job_id=job_ids, action=st.sampled_from(sorted(lifecycle.ACTIONS)))
    def ask(self, job_id: str, action: Action) -> None:
        before = self.row(job_id)
        try:
            jobs.ask(self.database, job_id, action)
        except AppError:
            after = self.row(job_id)
            assert (before and before.status) == (after and after.status)
        else:
            with suppress(IllegalTransition):  # It may be resumed, and then stopped no more.
                jobs.ask(self.database, job_id, action)

    @rule(job_id=job_ids)
    def delete(self, job_id: str) -> None:
        row = self.row(job_id)
        if row is None:
            return
        try:
            jobs.delete(self.database, job_id)
        except IllegalTransition:
            assert row.status in OWNED
        except JobInUse:
            with self.database.read_scope() as session:
                waits = select(Job.status).where(Job.waits_for == job_id)
                assert JobStatus.queued in session.scalars(waits).all()
        else:
            assert row.status not in OWNED
            self.existing.remove(job_id)
            self.ended.pop(job_id, None)
            self.last_numbers.pop(job_id, None)

    # What workers do

    @rule(target=attempts)
    def claim(self) -> Fence | MultipleResults[Fence]:
        self.num_owners += 1
        with self.database.read_scope() as session:
            wanted = session.scalar(
                select(Job.id).where(lifecycle.IS_READY).order_by(*lifecycle.IN_ORDER).limit(1)
            )
        fence = jobs.claim(self.database, f"w{self.num_owners}")
        assert (fence and fence.job_id) == wanted
        return multiple() if fence is None else fence

    @rule(fence=attempts)
    def renew(self, fence: Fence) -> None:
        owned = self.owns(fence)
        with self.database.session_scope() as session:
            assert lifecycle.renew(session, fence, 60) == owned

    @rule(fence=attempts)
    def write(self, fence: Fence) -> None:
        def write(owner: Fence) -> None:
            row = self.row(owner.job_id)
            step = 1 + (row.last_point if row else 0)
            jobs.write(self.database, owner, ("train_loss", step, 1.0))

        self._fenced(fence, write)

    @rule(fence=attempts)
    def checkpoint(self, fence: Fence) -> None:
        self._fenced(fence, lambda owner: jobs.register(self.database, owner, 1))

    @rule(fence=attempts, end=st.sampled_from(ENDS))
    def finish(self, fence: Fence, end: JobStatus) -> None:
        row = self.row(fence.job_id)
        if end is JobStatus.cancelled and row and row.status != JobStatus.cancelling:
            with pytest.raises(Superseded):  # Nobody asked for that.
                jobs.finish(self.database, fence, end)
            return
        self._fenced(fence, lambda owner: jobs.finish(self.database, owner, end))

    @rule(fence=attempts)
    def release(self, fence: Fence) -> None:
        self._fenced(fence, lambda owner: jobs.release(self.database, owner))

    @rule(fence=attempts)
    def crash(self, fence: Fence) -> None:
        """Its supervisor sees the trainer die."""
        owned = self.owns(fence)
        assert jobs.lose(self.database, fence) == owned

    def _fenced(self, fence: Fence, do: Callable[[Fence], None]) -> None:
        """The owner's write lands, a zombie's is refused."""
        if self.owns(fence):
            do(fence)
        else:
            with pytest.raises(Superseded):
                do(fence)

    @rule(fence=attempts)
    def expire(self, fence: Fence) -> None:
        """Nobody has renewed the lease in time, for whatever reason."""
        with self.database.session_scope() as session:
            owned = update(Job).where(lifecycle.holds(fence))
            session.execute(owned.values(lease_until=db_now(-1)))

    @rule()
    def reap(self) -> None:
        with self.database.read_scope() as session:
            late = select(Job.id).where(Job.status.in_(OWNED), Job.lease_until < db_now())
            num_late = len(session.scalars(late).all())
        assert self.reaper.look() == num_late
        assert self.reaper.look() == 0

    # What always holds

    @invariant()
    def each_job_is_where_it_may_be(self) -> None:
        with self.database.read_scope() as session:
            rows = session.scalars(select(Job)).all()
            open_attempts: dict[str, list[Attempt]] = {}
            numbers: dict[str, list[int]] = {}
            for attempt in session.scalars(select(Attempt).order_by(Attempt.number)):
                numbers.setdefault(attempt.job_id, []).append(attempt.number)
                if attempt.ended_at is None:
                    open_attempts.setdefault(attempt.job_id, []).append(attempt)
        assert {row.id for row in rows} == self.existing  # None is lost, none comes back.
        statuses = {row.id: row.status for row in rows}
        for row in rows:
            assert numbers.get(row.id, []) == list(range(1, row.attempt + 1))
            living = open_attempts.get(row.id, [])
            if row.status in OWNED:
                assert [(one.number, one.owner) for one in living] == [(row.attempt, row.owner)]
                assert row.lease_until is not None
            else:
                assert living == []
                assert (row.owner, row.worker_id, row.lease_until) == (None, None, None)
            if row.waits_for is not None:
                assert row.status == JobStatus.queued
                assert statuses[row.waits_for] not in ENDS
            assert (row.finished_at is not None) == (row.status in ENDS)
            assert row.crashes <= jobs.MAX_CRASHES
            assert (row.error is not None) == (row.status == JobStatus.failed)

    @invariant()
    def what_is_over_never_changes(self) -> None:
        with self.database.read_scope() as session:
            rows = session.scalars(select(Job).where(Job.status.in_(ENDS))).all()
        now = {row.id: tuple(vars(row)[c.key] for c in Job.__table__.columns) for row in rows}
        assert {job_id: now.get(job_id) for job_id in self.ended} == self.ended
        self.ended = now

    @invariant()
    def events_and_points_are_numbered_without_a_gap(self) -> None:
        with self.database.read_scope() as session:
            for table, column in ((Event, Job.last_event), (MetricPoint, Job.last_point)):
                last = {row.id: row[1] for row in session.execute(select(Job.id, column))}
                found: dict[str, list[int]] = {job_id: [] for job_id in last}
                query = select(table.job_id, table.number).order_by(table.number)
                for job_id, number in session.execute(query):
                    found[job_id].append(number)
                assert found == {job_id: list(range(1, n + 1)) for job_id, n in last.items()}


@pytest.fixture
def machine(database: Database, settings: Settings) -> type[Jobs]:
    """The machine on this database."""
    own = settings.model_copy(update={"max_crashes": jobs.MAX_CRASHES})
    Jobs.database = database
    Jobs.reaper = Reaper(own, database, Storage(settings.artifacts_path))
    return Jobs


def test_whatever_happens_in_whatever_order(machine: type[Jobs]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
