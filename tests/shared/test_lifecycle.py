"""The rules of a job's life, on each database."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import select

from shared import lifecycle, repository
from shared.database import Database
from shared.errors import IllegalTransition, JobNotFound
from shared.lifecycle import Action, Fence, Superseded
from shared.tables import Attempt
from skipline.schemas import JobStatus
from tests.shared.jobs import (
    add_evaluation,
    add_job,
    ask,
    claim,
    claimed,
    event_types,
    finish,
    get,
    gpus,
    lose,
    register,
    release,
    running,
    status,
)


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


def test_a_job_that_asks_for_a_gpu_waits_for_a_worker_that_has_one(database: Database) -> None:
    job_id = add_job(database, resources={"device": "cuda"})
    assert claim(database) is None
    fence = claim(database, capacity=gpus(1))
    assert fence is not None
    assert fence.job_id == job_id


def test_a_job_of_several_processes_waits_for_as_many_gpus(database: Database) -> None:
    pair = {"device": "cuda", "num_processes": 2}
    wants_two, wants_one = add_job(database, resources=pair), add_job(database)
    small = claim(database, "w1", gpus(1))
    assert small is not None
    assert small.job_id == wants_one
    assert claim(database, "w1", gpus(1)) is None
    large = claim(database, "w2", gpus(2))
    assert large is not None
    assert large.job_id == wants_two


def test_a_job_in_a_gpus_precision_waits_for_a_worker_that_has_one(database: Database) -> None:
    job_id = add_job(database, precision="fp16")
    assert claim(database) is None
    fence = claim(database, capacity=gpus(1, "cpu"))
    assert fence is not None
    assert fence.job_id == job_id


def test_a_worker_that_offers_no_cpu_takes_what_its_gpus_suffice_for(database: Database) -> None:
    job_id = add_job(database, resources={"device": "auto", "num_processes": 2})
    assert claim(database, capacity=gpus(1)) is None
    fence = claim(database, capacity=gpus(1, "cpu"))
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
            ask(database, job_id, "cancel")
        assert status(database, job_id) is target
    assert claim(database) is None


def test_a_waiting_job_is_cancelled_at_once_and_never_runs(database: Database) -> None:
    job_id = add_job(database)
    ask(database, job_id, "cancel")
    ask(database, job_id, "cancel")
    assert status(database, job_id) is JobStatus.cancelled
    assert claim(database) is None


def test_a_running_job_is_cancelled_through_its_trainer(database: Database) -> None:
    job_id = add_job(database)
    fence = claimed(database)
    ask(database, job_id, "cancel")
    ask(database, job_id, "cancel")
    with database.read_scope() as session:
        orders = repository.read_orders(session, fence)
    assert orders is not None
    assert orders.status is JobStatus.cancelling
    finish(database, fence, JobStatus.cancelled)
    assert status(database, job_id) is JobStatus.cancelled


def test_a_cancelled_job_whose_worker_is_lost_is_cancelled(database: Database) -> None:
    job_id = add_job(database)
    fence = claimed(database)
    ask(database, job_id, "cancel")
    assert lose(database, fence)
    assert status(database, job_id) is JobStatus.cancelled


def test_a_job_that_is_not_there_cannot_be_cancelled(database: Database) -> None:
    with pytest.raises(JobNotFound):
        ask(database, "nobody", "cancel")


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
    register(database, fence, 1)
    lose(database, fence)
    assert status(database, job_id) is JobStatus.queued


def test_a_release_is_no_crash(database: Database) -> None:
    job_id = add_job(database)
    for _ in range(5):
        release(database, claimed(database))
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
        (2, "started"),
        (3, "lost"),
        (4, "started"),
        (5, "succeeded"),
    ]
    assert [tuple(row) for row in attempts] == [(1, "lost"), (2, "succeeded")]


# ------------------------------------------------------------------------------ what clients ask

REFUSED = "409"
ASKED: dict[str, dict[Action, str]] = {
    # status: what the job is after each action
    "queued": {"cancel": "cancelled", "pause": REFUSED, "resume": "queued", "stop": REFUSED},
    "running": {
        "cancel": "cancelling",
        "pause": "pausing",
        "resume": "running",
        "stop": "stopping",
    },
    "pausing": {"cancel": "cancelling", "pause": "pausing", "resume": REFUSED, "stop": REFUSED},
    "paused": {"cancel": "cancelled", "pause": "paused", "resume": "queued", "stop": REFUSED},
    "stopping": {"cancel": "cancelling", "pause": REFUSED, "resume": REFUSED, "stop": "stopping"},
    "cancelling": {"cancel": "cancelling", "pause": REFUSED, "resume": REFUSED, "stop": REFUSED},
    "succeeded": {"cancel": REFUSED, "pause": REFUSED, "resume": REFUSED, "stop": REFUSED},
    "failed": {"cancel": REFUSED, "pause": REFUSED, "resume": REFUSED, "stop": REFUSED},
    "cancelled": {"cancel": "cancelled", "pause": REFUSED, "resume": REFUSED, "stop": REFUSED},
}


def job_in(database: Database, wanted: str) -> str:
    """A new job, brought into a status by what brings jobs there."""
    job_id = add_job(database)
    if wanted == "queued":
        return job_id
    fence = claimed(database)
    asked: dict[str, Action] = {
        "pausing": "pause",
        "paused": "pause",
        "stopping": "stop",
        "cancelling": "cancel",
        "cancelled": "cancel",
    }
    if wanted in asked:
        ask(database, job_id, asked[wanted])
    if wanted == "paused":
        release(database, fence)
    elif JobStatus(wanted).is_terminal:
        finish(database, fence, JobStatus(wanted))
    assert status(database, job_id) == wanted
    return job_id


def test_each_action_does_in_each_state_what_the_contract_says(database: Database) -> None:
    seen: dict[str, dict[str, str]] = {}
    for before, actions in ASKED.items():
        for action in actions:
            job_id = job_in(database, before)
            num_events = len(event_types(database, job_id))
            try:
                ask(database, job_id, action)
                after: str = status(database, job_id)
            except IllegalTransition:
                assert status(database, job_id) == before
                after = REFUSED
            changed = after not in (REFUSED, before)
            assert len(event_types(database, job_id)) == num_events + changed
            if changed:  # Asked twice, nothing more happens.
                ask(database, job_id, action)
                assert status(database, job_id) == after
                assert len(event_types(database, job_id)) == num_events + 1
            seen.setdefault(before, {})[action] = after
            if status(database, job_id) is JobStatus.queued:
                ask(database, job_id, "cancel")
    assert seen == ASKED


def test_only_a_training_is_stopped(database: Database) -> None:
    job_id = add_evaluation(database, model="m")
    claimed(database)
    with pytest.raises(IllegalTransition, match="only a running training is stopped"):
        ask(database, job_id, "stop")
    ask(database, job_id, "pause")
    assert status(database, job_id) is JobStatus.pausing


def test_a_job_that_is_not_there_cannot_be_asked_for_anything(database: Database) -> None:
    actions: tuple[Action, ...] = ("pause", "resume", "stop")
    for action in actions:
        with pytest.raises(JobNotFound):
            ask(database, "nobody", action)


def test_a_paused_job_waits_for_its_resume_and_loses_no_crash_count(database: Database) -> None:
    fence = running(database)
    ask(database, fence.job_id, "pause")
    assert lose(database, fence)  # It dies while it writes its checkpoint.
    paused = get(database, fence.job_id)
    assert (paused.status, paused.crashes, paused.owner) == (JobStatus.paused, 1, None)
    assert claim(database) is None
    ask(database, fence.job_id, "resume")
    assert claimed(database, "w2") == Fence(fence.job_id, 2, "w2")


@pytest.mark.parametrize("leave", [lose, release])
def test_a_stop_outlives_the_attempt_that_was_asked(
    database: Database, leave: Callable[[Database, Fence], object]
) -> None:
    fence = running(database)
    ask(database, fence.job_id, "stop")
    leave(database, fence)
    assert status(database, fence.job_id) is JobStatus.queued
    ask(database, fence.job_id, "stop")  # Once more, while it waits: it will be.
    second = claimed(database, "w2")
    assert status(database, fence.job_id) is JobStatus.stopping
    finish(database, second)
    ended = get(database, fence.job_id)
    assert (ended.status, ended.stop_reason, ended.attempt) == (JobStatus.succeeded, "user", 2)
    ask(database, fence.job_id, "stop")
    with pytest.raises(IllegalTransition):
        ask(database, fence.job_id, "pause")


def test_a_cancel_is_stronger_than_a_stop(database: Database) -> None:
    fence = running(database)
    ask(database, fence.job_id, "stop")
    ask(database, fence.job_id, "cancel")
    assert lose(database, fence)
    ended = get(database, fence.job_id)
    assert (ended.status, ended.stop_reason) == (JobStatus.cancelled, None)


def test_a_trainer_that_comes_to_its_end_first_wins(database: Database) -> None:
    actions: tuple[Action, ...] = ("pause", "stop", "cancel")
    for action in actions:
        for target in (JobStatus.succeeded, JobStatus.failed):
            fence = running(database)
            ask(database, fence.job_id, action)
            finish(database, fence, target)
            assert status(database, fence.job_id) is target


def test_the_third_crash_in_a_row_fails_a_stopping_job_too(database: Database) -> None:
    fence = running(database)
    ask(database, fence.job_id, "stop")
    for owner in ("w2", "w3"):
        lose(database, fence)
        fence = claimed(database, owner)
    assert lose(database, fence)
    ended = get(database, fence.job_id)
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == (JobStatus.failed, "worker_lost")


def test_each_attempt_says_how_it_ended(database: Database) -> None:
    fence = running(database)
    job_id = fence.job_id
    lose(database, fence)
    release(database, claimed(database, "w2"))
    third = claimed(database, "w3")
    ask(database, job_id, "pause")
    release(database, third)
    ask(database, job_id, "resume")
    fourth = claimed(database, "w4")
    ask(database, job_id, "cancel")
    with database.read_scope() as session:
        open_one = repository.attempt_document(repository.list_attempts(session, job_id)[-1])
    assert (open_one.number, open_one.outcome, open_one.ended_at) == (4, None, None)
    finish(database, fourth, JobStatus.cancelled)
    with database.read_scope() as session:
        attempts = [
            repository.attempt_document(row) for row in repository.list_attempts(session, job_id)
        ]
    assert [(a.number, a.outcome, a.reason) for a in attempts] == [
        (1, "lost", "gone"),
        (2, "released", "leaving"),
        (3, "paused", "leaving"),
        (4, "cancelled", "Cancelled while it ran"),
    ]
    assert all(a.ended_at is not None and a.ended_at >= a.started_at for a in attempts)
    assert event_types(database, job_id) == [
        "created",
        *("started", "lost"),
        *("started", "released"),
        *("started", "pause_requested", "paused", "resumed"),
        *("started", "cancel_requested", "cancelled"),
    ]
