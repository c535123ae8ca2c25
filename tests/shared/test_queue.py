"""Whose turn it is: priorities, jobs that wait for jobs, GPUs, and when a job will start; on each
database."""

from __future__ import annotations

import sys
import threading
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from shared import lifecycle, repository
from shared.database import Database, db_now
from shared.errors import InvalidInput, JobInUse
from shared.lifecycle import Capacity, Fence
from shared.repository import QueuePlace, WorkerFacts, Workload
from shared.tables import Job, Worker
from skipline.schemas import JobStatus
from tests.shared.jobs import (
    add_evaluation,
    add_job,
    ask,
    claim,
    claimed,
    delete,
    event_types,
    finish,
    get,
    gpus,
    in_threads,
    lose,
    release,
    running,
    status,
    take,
)

# ------------------------------------------------------------------------------------- the order


def taken_in_order(database: Database) -> list[str]:
    """The jobs that a worker gets which claims until nothing is left."""
    ids = []
    while (fence := claim(database)) is not None:
        ids.append(fence.job_id)
    return ids


def test_the_highest_priority_comes_first_and_within_it_who_came_first(database: Database) -> None:
    low, normal, high, lowest, normal_later, high_later = (
        add_job(database, priority=priority) for priority in (-1, 0, 10, -10, 0, 10)
    )
    wanted = [high, high_later, normal, normal_later, low, lowest]
    places = queue_places(database)
    assert [places[job_id].position for job_id in wanted] == [1, 2, 3, 4, 5, 6]
    assert taken_in_order(database) == wanted


def test_a_job_that_comes_back_keeps_its_place(database: Database) -> None:
    first, second = add_job(database), add_job(database)
    lose(database, claimed(database))
    assert taken_in_order(database) == [first, second]


def test_jobs_of_one_moment_have_one_order_everywhere(database: Database) -> None:
    ids = sorted(add_job(database) for _ in range(5))
    with database.session_scope() as session:
        session.execute(update(Job).values(created_at=db_now()))
    places = queue_places(database)
    assert [places[job_id].position for job_id in ids] == [1, 2, 3, 4, 5]
    assert taken_in_order(database) == ids


# ------------------------------------------------------------------------- jobs that wait for jobs


def test_a_job_runs_when_the_one_that_it_waits_for_has_succeeded(database: Database) -> None:
    first = running(database)
    second = add_evaluation(database, model=first.job_id, after=first.job_id, priority=10)
    assert claim(database) is None
    assert queue_places(database) == {}
    lose(database, first)  # A crash is no end.
    again = claimed(database)
    assert again.job_id == first.job_id
    assert claim(database) is None
    finish(database, again)
    assert get(database, second).waits_for is None
    assert claimed(database).job_id == second


@pytest.mark.parametrize(
    ("end", "how"), [(JobStatus.failed, "has failed"), (JobStatus.cancelled, "was cancelled")]
)
def test_what_waits_for_a_job_fails_with_it_and_so_does_what_waits_for_that(
    database: Database, end: JobStatus, how: str
) -> None:
    fence = running(database)
    child, other = (add_job(database, after=fence.job_id) for _ in range(2))
    grandchild = add_job(database, after=child)
    gone = add_job(database, after=child)
    ask(database, gone, "cancel")
    if end is JobStatus.cancelled:
        ask(database, fence.job_id, "cancel")
    assert status(database, child) is JobStatus.queued
    finish(database, fence, end)
    for job_id in (child, other, grandchild):
        job = get(database, job_id)
        assert (job.status, job.attempt, job.waits_for) == (JobStatus.failed, 0, None)
        assert job.finished_at is not None
        assert job.error is not None
        assert job.error["code"] == "predecessor_failed"
        assert job.error["message"] == f"The job {fence.job_id}, for which this one waited, {how}"
        assert event_types(database, job_id) == ["created", "failed"]
    assert status(database, gone) is JobStatus.cancelled
    assert claim(database) is None


def test_a_cancel_in_the_queue_fails_what_waits(database: Database) -> None:
    first = add_job(database)
    second = add_job(database, after=first)
    ask(database, first, "cancel")
    assert status(database, second) is JobStatus.failed


def test_a_worker_lost_too_often_fails_what_waits(database: Database) -> None:
    fence = running(database)
    child = add_job(database, after=fence.job_id)
    for _ in range(2):
        lose(database, fence)
        fence = claimed(database)
    lose(database, fence)
    assert status(database, child) is JobStatus.failed


def test_a_chain_may_be_longer_than_pythons_stack(database: Database) -> None:
    first = add_job(database)
    length = sys.getrecursionlimit() + 200
    chain = [first, *(repository.new_id() for _ in range(length))]
    columns = {"kind": "train", "status": JobStatus.queued, "spec": {}, "device": "auto"}
    with database.session_scope() as session:
        now = session.scalar(select(db_now()))
        session.execute(
            insert(Job),
            [
                {"id": job_id, "waits_for": before, "created_at": now, **columns}
                for before, job_id in pairwise(chain)
            ],
        )
    ask(database, first, "cancel")
    with database.read_scope() as session:
        failed = session.scalars(select(Job.id).where(Job.status == JobStatus.failed)).all()
    assert sorted(failed) == sorted(chain[1:])


def test_one_may_wait_only_for_what_can_still_succeed(database: Database) -> None:
    done = running(database)
    finish(database, done)
    child = add_job(database, after=done.job_id)
    assert claimed(database).job_id == child
    for end in (JobStatus.failed, JobStatus.cancelled):
        over = running(database)
        if end is JobStatus.cancelled:
            ask(database, over.job_id, "cancel")
        finish(database, over, end)
        with pytest.raises(InvalidInput) as refused:
            add_job(database, after=over.job_id)
        assert [error["loc"] for error in refused.value.errors] == ["after"]
    for key in ("after", "parent_id"):
        with pytest.raises(InvalidInput) as refused:
            add_job(database, **{key: "nobody"})
        assert [error["loc"] for error in refused.value.errors] == [key]


def add_while_it_ends(database: Database, fence: Fence, end: JobStatus) -> tuple[list[str], int]:
    """Three threads add a job each that waits for one which a fourth one ends. Returns those that
    were added, and how many were refused."""
    barrier = threading.Barrier(4)
    added: list[str] = []
    refused: list[InvalidInput] = []

    def add() -> None:
        barrier.wait()
        try:
            added.append(add_job(database, after=fence.job_id))
        except InvalidInput as error:
            refused.append(error)

    def stop() -> None:
        barrier.wait()
        finish(database, fence, end)

    in_threads(stop, add, add, add)
    return added, len(refused)


@pytest.mark.parametrize("end", [JobStatus.succeeded, JobStatus.failed])
def test_a_job_added_in_the_moment_the_other_ends_is_settled(
    database: Database, end: JobStatus
) -> None:
    for _ in range(25):
        fence = running(database)
        added, num_refused = add_while_it_ends(database, fence, end)
        assert len(added) + num_refused == 3
        if end is JobStatus.succeeded:
            assert num_refused == 0
            assert sorted(taken_in_order(database)) == sorted(added)
        else:
            assert {status(database, job_id) for job_id in added} <= {JobStatus.failed}
            assert claim(database) is None


def test_a_job_added_to_one_that_is_not_committed_yet_waits_for_the_outcome(
    database: Database,
) -> None:
    """The end has written its status and not committed when the other one is added."""
    fence = running(database)
    added: list[str] = []
    adding = threading.Thread(target=lambda: added.append(add_job(database, after=fence.job_id)))
    with database.session_scope() as session:
        lifecycle.finish(session, fence, JobStatus.succeeded, result={})
        adding.start()
        adding.join(0.2)
        assert adding.is_alive()
    adding.join(30)
    assert claimed(database).job_id == added[0]


# ------------------------------------------------------------------------------------------- GPUs

ONE = {"device": "cuda"}
TWO, FOUR = ({"device": "cuda", "num_processes": number} for number in (2, 4))


def num_gpus_taken(database: Database, capacity: Capacity) -> list[tuple[str, int]]:
    """What a worker gets that claims until nothing fits, and how many GPUs each takes."""
    taken, free = [], capacity.num_free_gpus
    while True:
        left = Capacity(capacity.devices, capacity.num_gpus, free)
        if (got := take(database, "w", left)) is None:
            return taken
        free -= got.num_gpus
        assert free >= 0
        taken.append((got.fence.job_id, got.num_gpus))


def test_four_gpus_are_four_jobs_of_one(database: Database) -> None:
    ids = [add_job(database, resources=ONE) for _ in range(5)]
    assert num_gpus_taken(database, gpus(4)) == [(job_id, 1) for job_id in ids[:4]]


def test_four_gpus_are_one_job_of_four(database: Database) -> None:
    wants_four, wants_one = add_job(database, resources=FOUR), add_job(database, resources=ONE)
    assert num_gpus_taken(database, gpus(4)) == [(wants_four, 4)]
    assert num_gpus_taken(database, gpus(4)) == [(wants_one, 1)]


def test_gpu_jobs_pass_none_that_waits_for_more_gpus(database: Database) -> None:
    ids = [add_job(database, resources=wanted) for wanted in (ONE, FOUR, ONE)]
    assert num_gpus_taken(database, gpus(4)) == [(ids[0], 1)]
    assert num_gpus_taken(database, gpus(4, free=3)) == []
    assert num_gpus_taken(database, gpus(4)) == [(ids[1], 4)]
    # A smaller worker is not held up by what it could never run.
    wants_four, wants_one = add_job(database, resources=FOUR), ids[2]
    assert num_gpus_taken(database, gpus(2)) == [(wants_one, 1)]
    assert num_gpus_taken(database, gpus(4)) == [(wants_four, 4)]


def test_priorities_hold_among_gpu_jobs(database: Database) -> None:
    small, urgent = add_job(database, resources=ONE), add_job(database, resources=TWO, priority=1)
    assert num_gpus_taken(database, gpus(4, free=1)) == []
    assert num_gpus_taken(database, gpus(4, free=3)) == [(urgent, 2), (small, 1)]


def test_jobs_that_need_no_gpu_pass_those_that_do(database: Database) -> None:
    add_job(database, resources=TWO)
    on_cpu = add_job(database, resources={"device": "cpu"})
    assert num_gpus_taken(database, gpus(2, "cpu", free=1)) == [(on_cpu, 0)]
    on_cpu = add_job(database, resources={"device": "cpu"})
    assert num_gpus_taken(database, gpus(2, "cpu", free=0)) == [(on_cpu, 0)]


def test_auto_takes_gpus_and_falls_back_only_where_there_could_never_be_enough(
    database: Database,
) -> None:
    ids = [add_job(database, resources={"num_processes": number}) for number in (2, 4, 1)]
    # With one of its two GPUs free, a worker lets the first wait; the second could never be.
    assert num_gpus_taken(database, gpus(2, "cpu", free=1)) == [(ids[1], 0)]
    assert num_gpus_taken(database, gpus(2, "cpu")) == [(ids[0], 2)]
    assert num_gpus_taken(database, gpus(2, "cpu", free=0)) == []
    assert num_gpus_taken(database, gpus(2, "cpu", free=1)) == [(ids[2], 1)]


def test_a_worker_without_gpus_takes_none(database: Database) -> None:
    job_id = add_job(database, resources={"num_processes": 2})
    assert num_gpus_taken(database, Capacity(("any", "auto", "cpu"))) == [(job_id, 0)]


def test_one_job_of_many_gpus_is_taken_by_one_of_many_workers(database: Database) -> None:
    ids = [add_job(database, resources=TWO) for _ in range(10)]
    taken: list[str] = []

    def work() -> None:
        while (got := take(database, "w", gpus(4, free=3))) is not None:
            assert got.num_gpus == 2
            taken.append(got.fence.job_id)

    in_threads(*[work] * 3)
    while (got := take(database, "w", gpus(4))) is not None:  # Where two found the same first one.
        taken.append(got.fence.job_id)
    assert sorted(taken) == sorted(ids)


# ------------------------------------------------------------------------------- when it will start


def queue_places(database: Database) -> dict[str, QueuePlace]:
    with database.read_scope() as session:
        jobs, _ = repository.list_jobs(session, status=None, kind=None, limit=100, after=None)
        return repository.queue_places(session, jobs)


def seconds_until_start(database: Database) -> dict[str, float | None]:
    """From the database's now to each waiting job's turn."""
    places = queue_places(database)
    with database.read_scope() as session:
        now = session.scalar(select(db_now()))
    assert now is not None
    return {
        job_id: None if place.start_at is None else (place.start_at - now).total_seconds()
        for job_id, place in places.items()
    }


def see_worker(database: Database, worker_id: str, num_slots: int, **facts: Any) -> None:
    with database.session_scope() as session:
        repository.see_worker(
            session,
            worker_id,
            WorkerFacts("host", 0, num_cores=8, num_slots=num_slots, devices=(), **facts),
        )


def measured(database: Database, key: str, *, seconds: float, speed: float | None = None) -> None:
    """A job that has succeeded: it took so long, at so many images per second."""
    fence = running(database, workload=Workload(key, 1000), priority=10)
    with database.session_scope() as session:
        if speed is not None:
            repository.write_progress(session, fence, {"images_per_second": speed})
        lifecycle.finish(session, fence, JobStatus.succeeded, result={})
        done = update(Job).where(Job.id == fence.job_id)
        session.execute(done.values(started_at=db_now(-seconds)))


def test_a_start_is_told_by_the_work_before_it_over_all_slots(database: Database) -> None:
    for speed in (50.0, 100.0, 900.0):  # The median is 100 images per second.
        measured(database, "fast", seconds=1, speed=speed)
    for seconds in (30.0, 60.0, 600.0):  # The median is 60 s for a job.
        measured(database, "whole", seconds=seconds)
    see_worker(database, "a", 1)
    see_worker(database, "b", 1)
    see_worker(database, "leaving", 8, is_draining=True)
    see_worker(database, "gone", 8)
    with database.session_scope() as session:
        gone = update(Worker).where(Worker.id == "gone")
        session.execute(gone.values(seen_at=db_now(-70)))

    # 6000 images are 60 s; 20 s of them are over, so 40 s are left of the first.
    first = running(database, workload=Workload("fast", 6000))
    with database.session_scope() as session:
        session.execute(update(Job).where(Job.id == first.job_id).values(started_at=db_now(-20)))
    second = running(database, workload=Workload("whole", 5))
    with database.session_scope() as session:  # It says itself what is left.
        repository.write_progress(session, second, {"eta_seconds": 100.0})

    waiting = [
        add_job(database, workload=Workload("fast", 3000)),
        add_job(database, workload=Workload("whole", 5)),
        add_job(database, workload=Workload("fast", 1000)),
        add_job(database, workload=Workload("fast", 1000), priority=1),
    ]
    starts = seconds_until_start(database)
    # What runs has 140 s left. The urgent one comes next, then the others with 10, 30, 60 s before.
    wanted = [(140 + 10) / 2, (140 + 10 + 30) / 2, (140 + 10 + 30 + 60) / 2, 140 / 2]
    assert [starts[job_id] for job_id in waiting] == pytest.approx(wanted, abs=2)
    assert [queue_places(database)[job_id].position for job_id in waiting] == [2, 3, 4, 1]


def test_who_finds_a_free_slot_starts_now(database: Database) -> None:
    see_worker(database, "a", 3)
    running(database)  # Never measured, but there are more slots than one.
    ids = [add_job(database) for _ in range(3)]
    starts = seconds_until_start(database)
    assert starts[ids[0]] == pytest.approx(0, abs=1)
    assert starts[ids[1]] == pytest.approx(0, abs=1)
    assert starts[ids[2]] is None


def test_no_start_is_told_that_is_not_known(database: Database) -> None:
    job_id = add_job(database)
    assert queue_places(database)[job_id] == QueuePlace(1, None)  # No worker is there.
    see_worker(database, "a", 1)
    assert seconds_until_start(database)[job_id] == pytest.approx(0, abs=1)
    running(database, priority=10)  # Nobody knows how long this one takes.
    assert seconds_until_start(database)[job_id] is None


def test_only_jobs_that_wait_for_a_worker_have_a_place(database: Database) -> None:
    fence = running(database)
    child = add_job(database, after=fence.job_id)
    paused = running(database)
    ask(database, paused.job_id, "pause")
    release(database, paused)
    waiting = add_job(database)
    assert {job_id: place.position for job_id, place in queue_places(database).items()} == {
        waiting: 1
    }
    finish(database, fence)
    places = queue_places(database)
    assert (places[child].position, places[waiting].position) == (1, 2)


def test_places_are_found_for_more_jobs_than_one_query_takes(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "MAX_ALTERNATIVES", 2)
    ids = [add_job(database) for _ in range(5)]
    places = queue_places(database)
    assert [places[job_id].position for job_id in ids] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------- deleting


def test_a_job_is_deleted_unless_one_runs_or_waits_for_it(database: Database) -> None:
    first = add_job(database)
    child = add_job(database, after=first)
    with pytest.raises(JobInUse, match=child):
        delete(database, first)
    ask(database, child, "cancel")
    assert delete(database, first) == []
    assert delete(database, child) == []
    # A job that failed with the one it waited for holds nothing either.
    first = add_job(database)
    child = add_job(database, after=first)
    ask(database, first, "cancel")
    assert status(database, child) is JobStatus.failed
    assert delete(database, first) == []
    assert claim(database) is None
