"""Many at once at the same jobs, in real transactions of real threads, on each database."""

from __future__ import annotations

import os
from collections import Counter
from threading import Barrier

import pytest
from sqlalchemy import func, insert, select

from shared import lifecycle
from shared.database import Database, db_now
from shared.errors import IllegalTransition
from shared.lifecycle import Fence, Superseded
from shared.tables import Attempt, Event, Job
from skipline.schemas import JobStatus
from tests.shared import jobs

NUM_ENDS = int(os.environ.get("SKIPLINE_TEST_NUM_ENDS", "1500"))
"""On each database. With 5000, ten thousand in all, it is a minute of computing."""


def add_jobs(database: Database, number: int, status: JobStatus) -> list[str]:
    """So many jobs at one go; running ones have an attempt whose next crash is one too many."""
    is_owned = status is JobStatus.running
    ids = [f"job-{place:05}" for place in range(number)]
    with database.session_scope() as session:
        now = session.scalar(select(db_now()))
        columns = {
            "kind": "train",
            "status": status,
            "spec": {},
            "device": "cpu",
            "created_at": now,
            "attempt": int(is_owned),
            "owner": "w" if is_owned else None,
            "crashes": jobs.MAX_CRASHES - 1,
        }
        session.execute(insert(Job), [columns | {"id": job_id} for job_id in ids])
        if is_owned:
            attempt = {"number": 1, "owner": "w", "host": "host", "started_at": now}
            session.execute(insert(Attempt), [attempt | {"job_id": job_id} for job_id in ids])
    return ids


@pytest.mark.timeout(900)
def test_a_reaper_that_races_the_end_leaves_one_final_status_each_time(database: Database) -> None:
    ids = add_jobs(database, NUM_ENDS, JobStatus.running)
    barrier = Barrier(2)
    finished: set[str] = set()
    reaped: set[str] = set()

    def finish() -> None:
        for job_id in ids:
            barrier.wait()
            with database.session_scope() as session:
                try:
                    fence = Fence(job_id, 1, "w")
                    lifecycle.finish(session, fence, JobStatus.succeeded, result={})
                    finished.add(job_id)
                except Superseded:
                    session.rollback()

    def reap() -> None:
        for job_id in ids:
            barrier.wait()
            with database.session_scope() as session:
                if lifecycle.lose(session, job_id, 1, "gone", max_crashes=jobs.MAX_CRASHES):
                    reaped.add(job_id)

    jobs.in_threads(finish, reap)
    assert finished | reaped == set(ids)
    assert not finished & reaped
    assert finished, "the end always came second: that was no race"
    assert reaped, "the reaper always came second: that was no race"
    with database.read_scope() as session:
        together = select(Job.status, Attempt.outcome).join_from(
            Job, Attempt, Attempt.job_id == Job.id
        )
        ends = Counter(tuple(row) for row in session.execute(together))
        num_events = session.scalar(select(func.count()).select_from(Event))
    assert ends == {("succeeded", "succeeded"): len(finished), ("failed", "lost"): len(reaped)}
    assert num_events == NUM_ENDS  # Who was too late has left no trace.


def test_many_workers_claim_five_hundred_jobs_each_once(database: Database) -> None:
    ids = add_jobs(database, 500, JobStatus.queued)
    taken: dict[str, list[str]] = {f"w{number}": [] for number in range(8)}

    def work(owner: str) -> None:
        while (fence := jobs.claim(database, owner)) is not None:
            assert fence.attempt == 1
            taken[owner].append(fence.job_id)

    jobs.in_threads(*(lambda owner=owner: work(owner) for owner in taken))
    assert sorted(job_id for own in taken.values() for job_id in own) == ids
    with database.read_scope() as session:
        owners = Counter(session.scalars(select(Job.owner)))
        assert session.scalar(select(func.count()).select_from(Attempt)) == 500
    assert owners == {owner: len(own) for owner, own in taken.items() if own}


def test_a_cancel_that_races_a_claim_or_an_end_is_obeyed_or_refused(database: Database) -> None:
    """Never both: a job that was cancelled in the queue is not run, one that ran to its end was
    not cancelled."""
    ids = add_jobs(database, 100, JobStatus.queued)
    barrier = Barrier(2)
    num_refused: Counter[str] = Counter()

    def work() -> None:
        for _ in ids:
            barrier.wait()
            if (fence := jobs.claim(database)) is not None:
                jobs.finish(database, fence)

    def cancel() -> None:
        for job_id in ids:
            barrier.wait()
            try:
                jobs.ask(database, job_id, "cancel")
            except IllegalTransition:
                num_refused[job_id] += 1

    jobs.in_threads(work, cancel)
    while (fence := jobs.claim(database)) is not None:
        jobs.finish(database, fence)
    with database.read_scope() as session:
        rows = session.execute(select(Job.id, Job.status, Job.attempt)).all()
    for job_id, status, attempt in rows:
        if status == JobStatus.cancelled:
            assert (attempt, num_refused[job_id]) == (0, 0)
        else:
            assert (status, attempt) == (JobStatus.succeeded, 1)
