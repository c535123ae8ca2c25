"""The life of a job: which status follows which, and who may say so.

Every change of a status is one conditional UPDATE in this file. An attempt that has lost its job
finds that its UPDATE matches no row, and stops; nothing is ever decided on a status read before.
Functions work within the caller's transaction and commit nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, case, insert, select, update
from sqlalchemy.orm import Session

from shared.database import db_now
from shared.errors import IllegalTransition, JobNotFound
from shared.tables import Attempt, Event, Job
from skipline.schemas import JobStatus

S = JobStatus

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    # Waits for a slot. Claimed by a worker; cancelled by a client; failed when what it waited
    # for failed.
    S.queued: frozenset({S.running, S.cancelled, S.failed}),
    # Owned by an attempt. Its trainer ends it; a client asks for pause, cancel or stop; a crash
    # or a release queues it again.
    S.running: frozenset({S.succeeded, S.failed, S.pausing, S.cancelling, S.stopping, S.queued}),
    # A checkpoint is being written. The trainer may also come to its end first.
    S.pausing: frozenset({S.paused, S.succeeded, S.failed, S.cancelling}),
    # Nobody owns it. A client resumes or cancels it.
    S.paused: frozenset({S.queued, S.cancelled}),
    # Asked to end early. After a crash it is queued again, and the request kept.
    S.stopping: frozenset({S.succeeded, S.failed, S.cancelling, S.queued}),
    # Asked to give up. The trainer may also come to its end first.
    S.cancelling: frozenset({S.cancelled, S.succeeded, S.failed}),
    S.succeeded: frozenset(),
    S.failed: frozenset(),
    S.cancelled: frozenset(),
}

OWNED = (S.running, S.pausing, S.stopping, S.cancelling)
"""An attempt owns the job in these; its lease runs."""

AFTER_LOSS: dict[JobStatus, JobStatus] = {
    S.running: S.queued,
    S.pausing: S.paused,
    S.stopping: S.queued,
    S.cancelling: S.cancelled,
}
"""Where a job goes whose worker is gone."""


@dataclass(frozen=True)
class Fence:
    """Who writes: attempt number `attempt` at the job, by the process that holds `owner`."""

    job_id: str
    attempt: int
    owner: str


class Superseded(Exception):
    """The job is no longer this attempt's: stop at once and write nothing more."""


def holds(fence: Fence) -> ColumnElement[bool]:
    """The condition that `fence` still owns its job."""
    return (
        (Job.id == fence.job_id)
        & (Job.attempt == fence.attempt)
        & (Job.owner == fence.owner)
        & Job.status.in_(OWNED)
    )


def transition(
    session: Session,
    job_id: str,
    sources: Iterable[JobStatus],
    target: JobStatus,
    *,
    where: ColumnElement[bool] | None = None,
    **values: Any,
) -> bool:
    """Moves a job from one of `sources` to `target`; False when it is in none of them, or does
    not fulfil `where`."""
    sources = tuple(sources)
    for source in sources:
        assert target in TRANSITIONS[source], f"{source} -> {target} is no transition"
    if target.is_terminal:
        values["finished_at"] = db_now()
    if target not in OWNED:
        values |= {"owner": None, "host": None, "lease_until": None}
    statement = update(Job).where(Job.id == job_id, Job.status.in_(sources))
    if where is not None:
        statement = statement.where(where)
    result = session.connection().execute(statement.values(status=target, **values))
    return result.rowcount == 1


def runs_on(devices: Iterable[str], num_gpus: int) -> ColumnElement[bool]:
    """The condition that a job asks for one of `devices` ("auto", "cpu", "cuda"), and where it
    cannot fall back on the CPU for no more processes than there are GPUs."""
    devices = tuple(devices)
    runs: ColumnElement[bool] = Job.device.in_(devices)
    if "cuda" in devices:
        fits: ColumnElement[bool] = Job.num_processes <= num_gpus
        runs &= fits | (Job.device != "cuda") if "cpu" in devices else fits
    return runs


def claim(
    session: Session,
    owner: str,
    host: str,
    lease_seconds: float,
    devices: Iterable[str],
    num_gpus: int = 0,
) -> Fence | None:
    """Takes the first queued job, in the database's order, that `runs_on` such a worker; None when
    there is none."""
    first = (
        select(Job.id)
        .where(Job.status == S.queued, runs_on(devices, num_gpus))
        .order_by(Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    row = session.connection().execute(
        update(Job)
        .where(Job.id == first, Job.status == S.queued)
        .values(
            status=S.running,
            attempt=Job.attempt + 1,
            owner=owner,
            host=host,
            lease_until=db_now(lease_seconds),
            started_at=case((Job.started_at.is_(None), db_now()), else_=Job.started_at),
            progress_at=db_now(),
        )
        .returning(Job.id, Job.attempt)
    )
    claimed = row.one_or_none()
    if claimed is None:
        return None
    session.connection().execute(
        insert(Attempt).values(
            job_id=claimed.id, number=claimed.attempt, owner=owner, host=host, started_at=db_now()
        )
    )
    return Fence(claimed.id, claimed.attempt, owner)


def renew(session: Session, fence: Fence, lease_seconds: float) -> bool:
    """Prolongs the lease; False when the job is no longer this attempt's."""
    result = session.connection().execute(
        update(Job).where(holds(fence)).values(lease_until=db_now(lease_seconds))
    )
    return result.rowcount == 1


def request_cancel(session: Session, job_id: str) -> None:
    """Cancels a job: one that nobody owns at once, an owned one through its trainer. Doing it
    again changes nothing.

    Raises:
        JobNotFound: there is no such job.
        IllegalTransition: the job has succeeded or failed.
    """
    for _ in range(3):  # The status may change between two statements: try the other one again.
        if transition(session, job_id, (S.queued, S.paused), S.cancelled):
            record(session, job_id, "info", "cancelled", "Cancelled before it ran")
            return
        if transition(session, job_id, (S.running, S.pausing, S.stopping), S.cancelling):
            record(session, job_id, "info", "cancel_requested", "Asked to cancel")
            return
        status = session.scalar(select(Job.status).where(Job.id == job_id))
        if status is None:
            raise JobNotFound(f"There is no job {job_id}")
        if status in (S.cancelling, S.cancelled):
            return
        if JobStatus(status).is_terminal:
            raise IllegalTransition(f"The job has {status}; only an unfinished one is cancelled")
    raise IllegalTransition("The job's state is changing; try again")


def finish(
    session: Session,
    fence: Fence,
    status: JobStatus,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, str] | None = None,
    stop_reason: str | None = None,
) -> None:
    """Ends the job for ever: succeeded with a `result`, failed with an `error`, or cancelled.

    Raises:
        Superseded: the job is no longer this attempt's.
    """
    sources = [source for source in OWNED if status in TRANSITIONS[source]]
    if not transition(
        session,
        fence.job_id,
        sources,
        status,
        where=holds(fence),
        result=result,
        error=error,
        stop_reason=stop_reason,
    ):
        raise Superseded(fence.job_id)
    message = error["message"] if error else f"The job has {status}"
    if status is S.cancelled:
        message = "Cancelled while it ran"
    _end_attempt(session, fence.job_id, fence.attempt, status.value, message)
    level = "error" if status is S.failed else "info"
    record(session, fence.job_id, level, status.value, message, error or {})


def release(session: Session, fence: Fence, reason: str) -> None:
    """Gives the job back unfinished: it goes on elsewhere, and no crash is counted.

    Raises:
        Superseded: the job is no longer this attempt's.
    """
    _give_up(session, fence.job_id, fence.attempt, holds(fence), "released", reason, crash=False)


def lose(
    session: Session,
    job_id: str,
    attempt: int,
    reason: str,
    *,
    max_crashes: int,
    error: dict[str, str] | None = None,
    where: ColumnElement[bool] | None = None,
) -> bool:
    """Takes a job away from an attempt that is dead. It is queued again, or fails with `error`
    (by default `worker_lost`) at the `max_crashes`-th crash in a row without a new checkpoint.

    Returns False when the attempt does not own the job, or `where` does not hold any more.
    """
    condition = Job.attempt == attempt
    if where is not None:
        condition &= where
    too_often = transition(
        session,
        job_id,
        (S.running, S.stopping),
        S.failed,
        where=condition & (Job.crashes + 1 >= max_crashes),
        crashes=Job.crashes + 1,
        error=error
        or {
            "code": "worker_lost",
            "message": f"The worker was lost {max_crashes} times in a row: {reason}",
            "hint": "Look at the worker's log, its memory above all, and submit the job again",
        },
    )
    if too_often:
        _end_attempt(session, job_id, attempt, "lost", reason)
        record(
            session, job_id, "error", "failed", f"Given up after {max_crashes} crashes: {reason}"
        )
        return True
    try:
        _give_up(session, job_id, attempt, condition, "lost", reason, crash=True)
    except Superseded:
        return False
    return True


def _give_up(
    session: Session,
    job_id: str,
    attempt: int,
    condition: ColumnElement[bool],
    outcome: str,
    reason: str,
    *,
    crash: bool,
) -> None:
    for source, target in AFTER_LOSS.items():
        crashes = {"crashes": Job.crashes + 1} if crash else {}
        if transition(session, job_id, (source,), target, where=condition, **crashes):
            _end_attempt(session, job_id, attempt, outcome, reason)
            record(session, job_id, "warning" if crash else "info", outcome, reason)
            return
    raise Superseded(job_id)


def _end_attempt(session: Session, job_id: str, attempt: int, outcome: str, reason: str) -> None:
    session.connection().execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.number == attempt)
        .values(ended_at=db_now(), outcome=outcome, reason=reason[:4000])
    )


def record(
    session: Session,
    job_id: str,
    level: str,
    type_: str,
    message: str,
    data: dict[str, Any] | None = None,
) -> None:
    """Adds an event, numbered within its job. `level`: info, warning or error."""
    numbered = session.connection().execute(
        update(Job)
        .where(Job.id == job_id)
        .values(last_event=Job.last_event + 1)
        .returning(Job.last_event, Job.attempt)
    )
    number, attempt = numbered.one()
    session.connection().execute(
        insert(Event).values(
            job_id=job_id,
            number=number,
            attempt=attempt,
            level=level,
            type=type_,
            message=message[:4000],
            data=data or {},
            time=db_now(),
        )
    )
