"""The life of a job: which status follows which, and who may say so.

Every change of a status is one conditional UPDATE in this file. An attempt that has lost its job
finds that its UPDATE matches no row, and stops; nothing is ever decided on a status read before.
Functions work within the caller's transaction and commit nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Executable,
    bindparam,
    case,
    insert,
    literal,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from shared.database import db_now
from shared.errors import IllegalTransition, JobNotFound
from shared.tables import Attempt, Event, Job
from skipline.schemas import JobKind, JobStatus

S = JobStatus

# Statements of every attempt are made once: to make one takes longer than to send it.
_RELEASE_WAITING = update(Job).where(Job.waits_for == bindparam("over")).values(waits_for=None)
_INSERT_ATTEMPT = insert(Attempt).values(started_at=db_now())
_END_ATTEMPT = (
    update(Attempt)
    .where(Attempt.job_id == bindparam("of_job"), Attempt.number == bindparam("of_number"))
    .values(ended_at=db_now(), outcome=bindparam("how"), reason=bindparam("why"))
)
_NUMBER_EVENT = (
    update(Job)
    .where(Job.id == bindparam("of_job"))
    .values(last_event=Job.last_event + 1)
    .returning(Job.last_event, Job.attempt)
)
_INSERT_EVENT = insert(Event).values(time=db_now())

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
    # Asked to end early. After a crash it is queued again, and the request kept in the row.
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


@dataclass(frozen=True)
class NewEvent:
    """Something that happens to a job. `level`: info, warning or error."""

    level: str
    type: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)


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
    event: NewEvent | None = None,
    where: ColumnElement[bool] | None = None,
    **values: Any,
) -> bool:
    """Moves a job from one of `sources` to `target`, and records the event that tells so; False
    when it is in none of them, or does not fulfil `where`."""
    sources = tuple(sources)
    for source in sources:
        assert target in TRANSITIONS[source], f"{source} -> {target} is no transition"
    if target.is_terminal:
        values |= {"finished_at": db_now(), "waits_for": None}
    if target not in OWNED:
        values |= {"owner": None, "worker_id": None, "host": None, "lease_until": None}
    if event is not None:
        values["last_event"] = Job.last_event + 1
    statement = update(Job).where(Job.id == job_id, Job.status.in_(sources))
    if where is not None:
        statement = statement.where(where)
    statement = statement.values(status=target, **values)
    moved = session.connection().execute(statement.returning(Job.last_event, Job.attempt))
    row = moved.one_or_none()
    if row is None:
        return False
    if event is not None:
        _insert_event(session, job_id, row.last_event, row.attempt, event)
    if target.is_terminal:
        _settle_waiting(session, job_id, target)
    return True


def _settle_waiting(session: Session, job_id: str, status: JobStatus) -> None:
    """What waits for a job that is over may run, or fails with it, and what waits for that too."""
    if status is S.succeeded:
        session.connection().execute(_RELEASE_WAITING, {"over": job_id})
        return
    how = "was cancelled" if status is S.cancelled else "has failed"
    error = {
        "code": "predecessor_failed",
        "message": f"The job {job_id}, for which this one waited, {how}",
        "hint": "Retry that one, then submit this one again with after: the new job's id",
    }
    event = NewEvent("error", S.failed.value, error["message"], error)
    over = [job_id]
    while over:  # One generation after the other: a chain may be longer than Python's stack.
        failed = session.connection().execute(
            update(Job)
            .where(Job.waits_for.in_(over), Job.status == S.queued)
            .values(
                status=S.failed,
                finished_at=db_now(),
                waits_for=None,
                error=error,
                last_event=Job.last_event + 1,
            )
            .returning(Job.id, Job.last_event, Job.attempt)
        )
        rows = failed.all()
        for row in rows:
            _insert_event(session, *row, event)
        over = [row.id for row in rows]


# ------------------------------------------------------------------------------------- the queue

IN_ORDER = (Job.rank, Job.created_at, Job.id)
"""Whose turn it is: the highest priority first, and within it the one that came first."""
IS_READY = (Job.status == literal_column(f"'{S.queued}'")) & Job.waits_for.is_(None)
"""The condition that a job waits for nothing but a worker."""


@dataclass(frozen=True)
class Capacity:
    """What a worker has for jobs.

    `devices`: the values of `Job.device` that it takes on. Of its `num_gpus` GPUs, which one job
    each has to itself, `num_free_gpus` are free.
    """

    devices: tuple[str, ...]
    num_gpus: int = 0
    num_free_gpus: int = 0


@dataclass(frozen=True)
class Claim:
    """A job that was taken, and how many GPUs it needs."""

    fence: Fence
    num_gpus: int


def gpus_needed(capacity: Capacity) -> ColumnElement[int]:
    """How many GPUs of such a worker a job takes. With `auto` as many as it has processes, and none
    where there could never be so many."""
    if "cuda" not in capacity.devices:
        return literal(0)
    wants = Job.device == "cuda"
    if "cpu" in capacity.devices:
        wants |= (Job.device == "auto") & (Job.num_processes <= capacity.num_gpus)
    else:
        wants |= Job.device == "auto"
    return case((wants, Job.num_processes), else_=0)


def runs_on(capacity: Capacity) -> ColumnElement[bool]:
    """The condition that a job could run on such a worker, once enough of it is free."""
    return Job.device.in_(capacity.devices) & (gpus_needed(capacity) <= capacity.num_gpus)


def _fits_now(session: Session, capacity: Capacity) -> ColumnElement[bool]:
    """The condition that a job may be claimed while some GPUs are taken. GPU jobs go strictly in
    order: could smaller ones pass the first that waits for more, it might wait for ever."""
    fits = runs_on(capacity)
    needed = gpus_needed(capacity)
    query = select(Job.id, needed.label("needed")).where(IS_READY, fits, needed > 0)
    first = session.execute(query.order_by(*IN_ORDER).limit(1)).one_or_none()
    if first is not None and first.needed <= capacity.num_free_gpus:
        return fits & or_(needed == 0, Job.id == first.id)
    return fits & (needed == 0)


def _claim_first(fits: ColumnElement[bool], capacity: Capacity, lease_seconds: float) -> Executable:
    """Takes the first of the ready jobs that fit."""
    first = (
        select(Job.id)
        .where(IS_READY, fits)
        .order_by(*IN_ORDER)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return (
        update(Job)
        .where(Job.id == first, Job.status == S.queued)
        .values(
            status=S.running,
            attempt=Job.attempt + 1,
            owner=bindparam("new_owner"),
            worker_id=bindparam("new_worker_id"),
            host=bindparam("new_host"),
            lease_until=db_now(lease_seconds),
            started_at=case((Job.started_at.is_(None), db_now()), else_=Job.started_at),
            progress_at=db_now(),
            last_event=Job.last_event + 1,
        )
        .returning(
            Job.id,
            Job.attempt,
            Job.last_event,
            Job.stop_requested,
            gpus_needed(capacity).label("num_gpus"),
        )
    )


@lru_cache(maxsize=64)
def _claim_any(capacity: Capacity, lease_seconds: float) -> Executable:
    """For a worker all of whose GPUs are free. Kept: to make it takes longer than to send it."""
    return _claim_first(runs_on(capacity), capacity, lease_seconds)


def claim(
    session: Session,
    owner: str,
    host: str,
    lease_seconds: float,
    capacity: Capacity,
    worker_id: str | None = None,
) -> Claim | None:
    """Takes the first job, in the queue's order, that fits what the worker has free; None when
    there is none. One that was asked to stop before it was lost is `stopping` again at once."""
    if capacity.num_free_gpus >= capacity.num_gpus:
        statement = _claim_any(capacity, lease_seconds)
    else:
        statement = _claim_first(_fits_now(session, capacity), capacity, lease_seconds)
    values = {"new_owner": owner, "new_worker_id": worker_id, "new_host": host}
    claimed = session.connection().execute(statement, values).one_or_none()
    if claimed is None:
        return None
    session.connection().execute(
        _INSERT_ATTEMPT,
        {"job_id": claimed.id, "number": claimed.attempt, "owner": owner, "host": host},
    )
    begins = NewEvent(
        "info", "started", f"Attempt {claimed.attempt} begins on {host}", {"host": host}
    )
    _insert_event(session, claimed.id, claimed.last_event, claimed.attempt, begins)
    if claimed.stop_requested:
        transition(session, claimed.id, (S.running,), S.stopping)
    return Claim(Fence(claimed.id, claimed.attempt, owner), claimed.num_gpus)


def note_gpus(session: Session, fence: Fence, gpus: list[int]) -> None:
    """Notes which of the worker's GPUs the attempt has."""
    attempt = (Attempt.job_id == fence.job_id) & (Attempt.number == fence.attempt)
    session.connection().execute(update(Attempt).where(attempt).values(gpus=gpus))


def renew(session: Session, fence: Fence, lease_seconds: float) -> bool:
    """Prolongs the lease; False when the job is no longer this attempt's."""
    result = session.connection().execute(
        update(Job).where(holds(fence)).values(lease_until=db_now(lease_seconds))
    )
    return result.rowcount == 1


# ------------------------------------------------------------------------------ what clients ask

Action = Literal["cancel", "pause", "resume", "stop"]


@dataclass(frozen=True)
class _Move:
    """What an action does to a job in one of `sources`, and the event that tells so."""

    sources: tuple[JobStatus, ...]
    target: JobStatus
    event: str
    message: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rule:
    """`already`: the job is where the action leads, or on its way there; nothing changes. `refusal`
    says which jobs the action is for."""

    moves: tuple[_Move, ...]
    already: frozenset[JobStatus]
    refusal: str


ACTIONS: dict[Action, _Rule] = {
    "cancel": _Rule(
        (
            _Move((S.queued, S.paused), S.cancelled, "cancelled", "Cancelled while it waited"),
            _Move(
                (S.running, S.pausing, S.stopping),
                S.cancelling,
                "cancel_requested",
                "Asked to cancel",
            ),
        ),
        frozenset({S.cancelling, S.cancelled}),
        "only an unfinished one is cancelled",
    ),
    "pause": _Rule(
        (_Move((S.running,), S.pausing, "pause_requested", "Asked to pause"),),
        frozenset({S.pausing, S.paused}),
        "only a running one is paused",
    ),
    "resume": _Rule(
        (_Move((S.paused,), S.queued, "resumed", "Queued again after a pause"),),
        frozenset({S.queued, S.running}),
        "only a paused one is resumed",
    ),
    "stop": _Rule(
        (
            _Move(
                (S.running,),
                S.stopping,
                "stop_requested",
                "Asked to end early and keep the result",
                {"stop_requested": True},
            ),
        ),
        frozenset({S.stopping}),
        "only a running training is stopped; cancel gives it up",
    ),
}
"""What a client may ask of a job. Each is done twice without harm, or refused."""


def request(session: Session, job_id: str, action: Action) -> None:
    """Does what a client asks: at once where nobody owns the job, else through its trainer.

    Raises:
        JobNotFound: there is no such job.
        IllegalTransition: the job's state does not allow it.
    """
    rule = ACTIONS[action]
    is_training: ColumnElement[bool] = Job.kind == JobKind.train
    where = is_training if action == "stop" else None
    for _ in range(3):  # The status may change between two statements: try the other one again.
        for move in rule.moves:
            event = NewEvent("info", move.event, move.message)
            if transition(
                session,
                job_id,
                move.sources,
                move.target,
                event=event,
                where=where,
                **move.values,
            ):
                return
        query = select(Job.status, Job.kind, Job.stop_requested).where(Job.id == job_id)
        row = session.execute(query).one_or_none()
        if row is None:
            raise JobNotFound(f"There is no job {job_id}")
        if row.status in rule.already:
            return
        if action == "stop" and row.stop_requested and row.status in (S.queued, S.succeeded):
            return  # It was stopped, or will be once a worker has taken it up again.
        sources = {source for move in rule.moves for source in move.sources}
        if row.status not in sources or (where is not None and row.kind != JobKind.train):
            raise IllegalTransition(f"The job is {row.status}: {rule.refusal}")
    raise IllegalTransition("The job's state is changing; try again")


# --------------------------------------------------------------------------------- how it goes on


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
    stopped = case((Job.stop_requested, literal("user")), else_=None)
    message = error["message"] if error else f"The job has {status}"
    if status is S.cancelled:
        message = "Cancelled while it ran"
    level = "error" if status is S.failed else "info"
    if not transition(
        session,
        fence.job_id,
        sources,
        status,
        event=NewEvent(level, status.value, message, error or {}),
        where=holds(fence),
        result=result,
        error=error,
        stop_reason=stopped if stop_reason is None and status is S.succeeded else stop_reason,
    ):
        raise Superseded(fence.job_id)
    _end_attempt(session, fence.job_id, fence.attempt, status.value, message)


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
        event=NewEvent("error", "failed", f"Given up after {max_crashes} crashes: {reason}"),
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
        return True
    try:
        _give_up(session, job_id, attempt, condition, "lost", reason, crash=True)
    except Superseded:
        return False
    return True


_OUTCOMES = {S.paused: "paused", S.cancelled: "cancelled"}
"""How an attempt has ended that was asked to leave its job in such a state."""


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
        ended = outcome if crash else _OUTCOMES.get(target, outcome)
        event = NewEvent("warning" if crash else "info", ended, reason)
        if transition(session, job_id, (source,), target, event=event, where=condition, **crashes):
            _end_attempt(session, job_id, attempt, ended, reason)
            return
    raise Superseded(job_id)


def _end_attempt(session: Session, job_id: str, attempt: int, outcome: str, reason: str) -> None:
    session.connection().execute(
        _END_ATTEMPT,
        {"of_job": job_id, "of_number": attempt, "how": outcome, "why": reason[:4000]},
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
    number, attempt = session.connection().execute(_NUMBER_EVENT, {"of_job": job_id}).one()
    _insert_event(session, job_id, number, attempt, NewEvent(level, type_, message, data or {}))


def _insert_event(
    session: Session, job_id: str, number: int, attempt: int, event: NewEvent
) -> None:
    session.connection().execute(
        _INSERT_EVENT,
        {
            "job_id": job_id,
            "number": number,
            "attempt": attempt,
            "level": event.level,
            "type": event.type,
            "message": event.message[:4000],
            "data": event.data,
        },
    )
