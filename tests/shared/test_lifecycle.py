"""The rules of a job's life, on each database."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import func, select, update

from shared import lifecycle, repository
from shared.database import Database
from shared.errors import IllegalTransition, JobNotFound
from shared.lifecycle import Fence, Superseded
from shared.tables import Attempt, Job
from skipline.catalog import BUILTIN_DATASETS, resolve
from skipline.schemas import JobStatus
from skipline.specs import TrainSpec, parse_request

CPU = ("auto", "cpu")


def add_job(database: Database, **keys: object) -> str:
    spec = parse_request({"dataset": "digits", **keys})
    assert isinstance(spec, TrainSpec)
    with database.session_scope() as session:
        return repository.add_job(session, resolve(spec, BUILTIN_DATASETS["digits"])).id


def claim(
    database: Database, owner: str = "w1", devices: tuple[str, ...] = CPU, num_gpus: int = 0
) -> Fence | None:
    with database.session_scope() as session:
        return lifecycle.claim(session, owner, "host", 60, devices, num_gpus)


def claimed(database: Database, owner: str = "w1") -> Fence:
    fence = claim(database, owner)
    assert fence is not None
    return fence


def status(database: Database, job_id: str) -> JobStatus:
    with database.read_scope() as session:
        return JobStatus(repository.get_job(session, job_id).status)


def lose(database: Database, fence: Fence) -> bool:
    with database.session_scope() as session:
        return lifecycle.lose(session, fence.job_id, fence.attempt, "gone", max_crashes=3)


def cancel(database: Database, job_id: str) -> None:
    with database.session_scope() as session:
        lifecycle.request_cancel(session, job_id)


def finish(database: Database, fence: Fence, target: JobStatus = JobStatus.succeeded) -> None:
    with database.session_scope() as session:
        lifecycle.finish(session, fence, target, result={"top1": 1.0})


def test_the_transitions_are_those_of_the_contract() -> None:
    assert {(str(a), str(b)) for a, targets in lifecycle.TRANSITIONS.items() for b in targets} == {
        ("queued", "running"),
        ("queued", "cancelled"),
        ("queued", "failed"),
        ("running", "succeeded"),
        ("running", "failed"),
        ("running", "pausing"),
        ("running", "cancelling"),
        ("running", "stopping"),
        ("running", "queued"),
        ("pausing", "paused"),
        ("pausing", "succeeded"),
        ("pausing", "failed"),
        ("pausing", "cancelling"),
        ("paused", "queued"),
        ("paused", "cancelled"),
        ("stopping", "succeeded"),
        ("stopping", "failed"),
        ("stopping", "cancelling"),
        ("stopping", "queued"),
        ("cancelling", "cancelled"),
        ("cancelling", "succeeded"),
        ("cancelling", "failed"),
    }


def test_jobs_are_claimed_in_the_order_they_came(database: Database) -> None:
    ids = [add_job(database) for _ in range(3)]
    assert [claimed(database, f"w{n}").job_id for n in range(3)] == ids
    assert claim(database) is None


def test_many_workers_at_once_claim_each_job_once(database: Database) -> None:
    ids = {add_job(database) for _ in range(30)}
    taken: list[str] = []

    def work(owner: str) -> None:
        while (fence := claim(database, owner)) is not None:
            taken.append(fence.job_id)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ids)
    with database.read_scope() as session:
        assert session.scalar(select(func.count()).select_from(Attempt)) == 30


def test_a_job_that_asks_for_a_gpu_waits_for_a_worker_that_has_one(database: Database) -> None:
    job_id = add_job(database, resources={"device": "cuda"})
    assert claim(database) is None
    fence = claim(database, devices=("auto", "cuda"), num_gpus=1)
    assert fence is not None
    assert fence.job_id == job_id


def test_a_job_of_several_processes_waits_for_as_many_gpus(database: Database) -> None:
    pair = {"device": "cuda", "num_processes": 2}
    wants_two, wants_one = add_job(database, resources=pair), add_job(database)
    small = claim(database, "w1", ("auto", "cuda"), num_gpus=1)
    assert small is not None
    assert small.job_id == wants_one
    assert claim(database, "w1", ("auto", "cuda"), num_gpus=1) is None
    large = claim(database, "w2", ("auto", "cuda"), num_gpus=2)
    assert large is not None
    assert large.job_id == wants_two


def test_a_job_in_a_gpus_precision_waits_for_a_worker_that_has_one(database: Database) -> None:
    job_id = add_job(database, precision="fp16")
    assert claim(database) is None
    fence = claim(database, devices=("auto", "cpu", "cuda"), num_gpus=1)
    assert fence is not None
    assert fence.job_id == job_id


def test_a_worker_that_offers_no_cpu_takes_what_its_gpus_suffice_for(database: Database) -> None:
    job_id = add_job(database, resources={"device": "auto", "num_processes": 2})
    assert claim(database, devices=("auto", "cuda"), num_gpus=1) is None
    fence = claim(database, devices=("auto", "cpu", "cuda"), num_gpus=1)
    assert fence is not None
    assert fence.job_id == job_id


def test_on_the_cpu_processes_share_the_cores(database: Database) -> None:
    job_id = add_job(database, resources={"device": "cpu", "num_processes": 4})
    assert claimed(database).job_id == job_id


@pytest.mark.parametrize("reason", ["early_stopping", "time_budget", None])
def test_a_job_that_ended_early_says_why(database: Database, reason: str | None) -> None:
    job_id = add_job(database)
    fence = claimed(database)
    with database.session_scope() as session:
        lifecycle.finish(session, fence, JobStatus.succeeded, result={}, stop_reason=reason)
    with database.read_scope() as session:
        assert repository.get_job(session, job_id).stop_reason == reason


def test_a_claim_raises_the_attempt_and_starts_the_clock_once(database: Database) -> None:
    job_id = add_job(database)
    first = claimed(database)
    with database.read_scope() as session:
        started_at = repository.get_job(session, job_id).started_at
    assert lose(database, first)
    second = claimed(database, "w2")
    assert (first.attempt, second.attempt) == (1, 2)
    with database.read_scope() as session:
        assert repository.get_job(session, job_id).started_at == started_at


def test_a_replaced_attempt_can_neither_renew_nor_write_nor_finish(database: Database) -> None:
    job_id = add_job(database)
    zombie = claimed(database)
    lose(database, zombie)
    owner = claimed(database, "w2")
    point = repository.NewPoint("train_loss", 1, 1, 0.5)
    with database.session_scope() as session:
        assert not lifecycle.renew(session, zombie, 60)
        assert repository.read_orders(session, zombie) is None
    with pytest.raises(Superseded), database.session_scope() as session:
        repository.write_progress(session, zombie, None, [point])
    with pytest.raises(Superseded), database.session_scope() as session:
        lifecycle.release(session, zombie, "late")
    with pytest.raises(Superseded):
        finish(database, zombie)
    with database.read_scope() as session:
        assert repository.series(session, job_id, names=None, after=0, limit=10) == ({}, None)
    finish(database, owner)
    assert status(database, job_id) is JobStatus.succeeded


def test_a_final_status_never_changes(database: Database) -> None:
    for target in (JobStatus.succeeded, JobStatus.failed):
        job_id = add_job(database)
        fence = claimed(database)
        finish(database, fence, target)
        with pytest.raises(Superseded):
            finish(database, fence, JobStatus.failed)
        assert not lose(database, fence)
        with pytest.raises(IllegalTransition):
            cancel(database, job_id)
        assert status(database, job_id) is target
    assert claim(database) is None


def test_a_waiting_job_is_cancelled_at_once_and_never_runs(database: Database) -> None:
    job_id = add_job(database)
    cancel(database, job_id)
    cancel(database, job_id)
    assert status(database, job_id) is JobStatus.cancelled
    assert claim(database) is None


def test_a_running_job_is_cancelled_through_its_trainer(database: Database) -> None:
    job_id = add_job(database)
    fence = claimed(database)
    cancel(database, job_id)
    cancel(database, job_id)
    with database.read_scope() as session:
        orders = repository.read_orders(session, fence)
    assert orders is not None
    assert orders.status is JobStatus.cancelling
    finish(database, fence, JobStatus.cancelled)
    assert status(database, job_id) is JobStatus.cancelled


def test_a_cancelled_job_whose_worker_is_lost_is_cancelled(database: Database) -> None:
    job_id = add_job(database)
    fence = claimed(database)
    cancel(database, job_id)
    assert lose(database, fence)
    assert status(database, job_id) is JobStatus.cancelled


def test_a_job_that_is_not_there_cannot_be_cancelled(database: Database) -> None:
    with pytest.raises(JobNotFound):
        cancel(database, "nobody")


def test_the_third_crash_in_a_row_fails_the_job(database: Database) -> None:
    job_id = add_job(database)
    for attempt in (1, 2):
        assert lose(database, claimed(database))
        assert status(database, job_id) is JobStatus.queued, attempt
    assert lose(database, claimed(database))
    with database.read_scope() as session:
        job = repository.get_job(session, job_id)
    assert job.status == JobStatus.failed
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert job.attempt == 3


def test_a_new_checkpoint_ends_a_row_of_crashes(database: Database) -> None:
    job_id = add_job(database)
    lose(database, claimed(database))
    lose(database, claimed(database))
    fence = claimed(database)
    with database.session_scope() as session:
        repository.register_checkpoint(
            session, fence, kinds=("last",), key="k", epoch=1, step=1, metrics={}, num_bytes=1
        )
    lose(database, fence)
    assert status(database, job_id) is JobStatus.queued


def test_a_release_is_no_crash(database: Database) -> None:
    job_id = add_job(database)
    for _ in range(5):
        fence = claimed(database)
        with database.session_scope() as session:
            lifecycle.release(session, fence, "leaving")
    assert status(database, job_id) is JobStatus.queued
    with database.read_scope() as session:
        assert repository.get_job(session, job_id).crashes == 0


def test_a_loss_that_comes_too_late_changes_nothing(database: Database) -> None:
    job_id = add_job(database)
    first = claimed(database)
    lose(database, first)
    claimed(database, "w2")
    assert not lose(database, first)
    assert status(database, job_id) is JobStatus.running


def test_a_reaper_that_races_the_end_leaves_one_final_status(database: Database) -> None:
    for _ in range(20):
        job_id = add_job(database)
        fence = claimed(database)
        with database.session_scope() as session:
            session.execute(update(Job).values(crashes=2).where(Job.id == job_id))
        ended: list[str] = []
        barrier = threading.Barrier(2)

        def end(fence: Fence = fence, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                finish(database, fence)
                ended.append("succeeded")  # noqa: B023 - joined within the round
            except Superseded:
                pass

        def reap(fence: Fence = fence, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if lose(database, fence):
                ended.append("failed")  # noqa: B023

        threads = [threading.Thread(target=target) for target in (end, reap)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended == [str(status(database, job_id))]


def test_what_happened_is_recorded_in_order(database: Database) -> None:
    job_id = add_job(database)
    lose(database, claimed(database))
    finish(database, claimed(database))
    with database.read_scope() as session:
        events = repository.list_events(session, job_id)
        attempts = session.execute(
            select(Attempt.number, Attempt.outcome).order_by(Attempt.number)
        ).all()
    assert [(event.number, event.type) for event in events] == [
        (1, "created"),
        (2, "lost"),
        (3, "succeeded"),
    ]
    assert [tuple(row) for row in attempts] == [(1, "lost"), (2, "succeeded")]
