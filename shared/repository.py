"""Every query that is not a change of status. Functions work within the caller's transaction;
writes of a worker take a `Fence` and raise `Superseded` when it does not hold any more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import Any, Literal, NamedTuple, TypeVar

import uuid_utils
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Row,
    Select,
    String,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.orm import Session

from shared import lifecycle
from shared.database import db_now
from shared.errors import (
    IdempotencyMismatch,
    IllegalTransition,
    InvalidInput,
    JobInUse,
    JobNotFound,
    ModelNotFound,
    NoCheckpointYet,
    NotEvaluated,
    PictureNotReady,
    PredictionsNotReady,
    ReportNotReady,
    SummaryNotReady,
)
from shared.lifecycle import Fence, Superseded, holds
from shared.tables import (
    Alias,
    Attempt,
    Checkpoint,
    Dataset,
    Event,
    IdempotencyKey,
    Job,
    LogPart,
    MetricPoint,
    Outcomes,
    Picture,
    Predictions,
    Report,
    Summary,
    Worker,
)
from skipline import schemas
from skipline.catalog import ClusterFacts, needs_gpu
from skipline.schemas import JobKind, JobStatus
from skipline.specs import AnySpec, BringInSpec, ImportSpec, TrainSpec, dump_spec, load_spec

NumberedT = TypeVar("NumberedT", MetricPoint, Event)
"""Rows that are numbered within their job."""
MAX_ALTERNATIVES = 200
"""In one condition: SQLite takes fewer than 1000."""
STRETCH = 1024
"""Numbers of points of which the extremes are marked, for readers of long curves."""
MAX_NUMBERS = 5000
"""In one list of values."""
REWIND = "rewind"
"""The reserved name of a metric row that tells readers to go back."""
ALIVE_SECONDS = 60.0
"""A worker that was seen within so long counts as there."""
FORGET_WORKER_SECONDS = 3600.0
NUM_MEASURED_JOBS = 20
"""So many of the last jobs of a kind say how long the next one takes."""
_IS_UNFINISHED = Job.status.not_in([status for status in JobStatus if status.is_terminal])
_SERVED = (select(Alias.checkpoint_id), select(Alias.former_id).where(Alias.former_id.is_not(None)))
"""Checkpoints that aliases stand for, now or before their last moves."""
_PINNED = select(Job.checkpoint_id).where(Job.checkpoint_id.is_not(None), _IS_UNFINISHED)
"""Checkpoints that unfinished jobs need."""


@dataclass(frozen=True)
class Workload:
    """What is known before a job runs of how long it will take: jobs with the same `speed_key` have
    been about as fast, and `num_images` pass through its network."""

    speed_key: str
    num_images: int


def new_id() -> str:
    """A UUIDv7: opaque to clients, and sorted by time for the database's indexes."""
    return str(uuid_utils.uuid7())


# ---------------------------------------------------------------------------------------- jobs


def add_job(
    session: Session,
    spec: AnySpec,
    *,
    kind: JobKind | None = None,
    dataset_id: str | None = None,
    checkpoint_id: str | None = None,
    workload: Workload | None = None,
    submitter: str = "",
) -> Job:
    """Stores a resolved spec as a queued job, of the spec's own kind unless told otherwise.

    Raises:
        InvalidInput: `parent_id` or `after` is no job, or `after` one that has not succeeded and
            never will.
    """
    kind = kind or JobKind(spec.kind)
    resources = getattr(spec, "resources", None)
    parent_id = None if isinstance(spec, BringInSpec) else spec.parent_id
    if parent_id is not None and session.get(Job, parent_id) is None:
        raise _no_such_job("parent_id", parent_id)
    values = {
        "id": new_id(),
        "kind": kind,
        "name": spec.name,
        "status": JobStatus.queued,
        "spec": dump_spec(spec),
        "rank": 0 if isinstance(spec, BringInSpec) else -spec.priority,
        "device": _device_of(spec),
        "num_processes": resources.num_processes if resources else 1,
        "submitter": submitter,
        "parent_id": parent_id,
        "waits_for": hold_predecessor(session, spec),
        "dataset_id": dataset_id,
        "checkpoint_id": checkpoint_id,
        "speed_key": workload.speed_key if workload else kind,
        "num_images": workload.num_images if workload else None,
        "attempt": 0,
        "last_event": 1,
        "created_at": db_now(),
    }
    job = session.scalars(insert(Job).values(**values).returning(Job)).one()
    session.connection().execute(  # `lifecycle.record` would have to ask for the event's number.
        insert(Event).values(
            job_id=job.id,
            number=job.last_event,
            attempt=job.attempt,
            level="info",
            type="created",
            message=f"Stored as a job of kind {kind}",
            data={},
            time=db_now(),
        )
    )
    return job


def _device_of(spec: AnySpec) -> str:
    """What a worker must have to claim the job."""
    if isinstance(spec, TrainSpec) and needs_gpu(spec):
        return "cuda"
    return "any" if isinstance(spec, BringInSpec) else spec.resources.device


def hold_predecessor(session: Session, spec: AnySpec) -> str | None:
    """The job that has to succeed first, if it has not yet. Its row stays locked until the new job
    is stored: should it end in this moment, it finds the job that waits for it. Raises
    `InvalidInput`, as `add_job`."""
    if isinstance(spec, BringInSpec) or spec.after is None:
        return None
    locked = select(Job.status).where(Job.id == spec.after).with_for_update(read=True)
    status = session.scalar(locked)
    if status is None:
        raise _no_such_job("after", spec.after)
    if status in (JobStatus.failed, JobStatus.cancelled):
        message = f"That job has {status}: retry it, and name the new job"
        raise InvalidInput(message, errors=[{"loc": "after", "message": message}])
    return None if status == JobStatus.succeeded else spec.after


def _no_such_job(key: str, job_id: str) -> InvalidInput:
    message = f"There is no job {job_id}"
    return InvalidInput(message, errors=[{"loc": key, "message": message}])


def get_job(session: Session, job_id: str) -> Job:
    """Raises `JobNotFound`."""
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise JobNotFound(f"There is no job {job_id}")
    return job


def find_job(session: Session, job_id: str) -> Job | None:
    """As `get_job`, or None."""
    return session.get(Job, job_id)


def hold_job(session: Session, job_id: str) -> Job:
    """As `get_job`; until the transaction ends nobody changes or deletes it."""
    job = session.get(Job, job_id, populate_existing=True, with_for_update={"read": True})
    if job is None:
        raise JobNotFound(f"There is no job {job_id}")
    return job


def list_jobs(
    session: Session,
    *,
    status: JobStatus | None,
    kind: schemas.JobKind | None,
    limit: int,
    after: str | None,
) -> tuple[list[Job], str | None]:
    """Jobs, newest first, with the cursor of the next page. A cursor is the last job's id."""
    query = select(Job).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)
    if status is not None:
        query = query.where(Job.status == status)
    if kind is not None:
        query = query.where(Job.kind == kind)
    if after is not None:
        query = query.where(before_cursor(session, Job, after))
    return cut_page(list(session.scalars(query)), limit)


def before_cursor(session: Session, table: type[Any], after: str) -> ColumnElement[bool]:
    """The rows that come after the one with the id `after` in a list of the newest first. Raises
    `InvalidInput` if there is none."""
    created_at = session.scalar(select(table.created_at).where(table.id == after))
    if created_at is None:
        raise InvalidInput(
            "The cursor is unknown",
            errors=[{"loc": "after", "message": "Take `next` of the page before"}],
        )
    return _before(table, created_at, after)


def _before(table: type[Any], created_at: datetime, row_id: str) -> ColumnElement[bool]:
    """The rows that come before this place in the order (created_at, id)."""
    same_time: ColumnElement[bool] = (table.created_at == created_at) & (table.id < row_id)
    earlier: ColumnElement[bool] = table.created_at < created_at
    return earlier | same_time


def cut_page(rows: list[Any], limit: int) -> tuple[list[Any], str | None]:
    """`limit` rows of one more, with the cursor of the next page."""
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


def num_queued(session: Session, submitter: str | None = None) -> int:
    """How many jobs are `queued`; with `submitter`, of those that it posted."""
    count = select(func.count()).select_from(Job).where(Job.status == JobStatus.queued)
    if submitter is not None:
        count = count.where(Job.submitter == submitter)
    return session.scalar(count) or 0


def is_work_for(session: Session, capacity: lifecycle.Capacity) -> bool:
    """Whether a job waits that such a worker could run, now or once enough of it is free."""
    found = select(Job.id).where(lifecycle.IS_READY, lifecycle.runs_on(capacity)).limit(1)
    return session.scalar(found) is not None


@dataclass(frozen=True)
class QueuePlace:
    """Where a job stands in the queue: 1 for the next one to run. `start_at` is when its turn
    comes, as far as that can be told."""

    position: int
    start_at: datetime | None


def queue_places(session: Session, jobs: Collection[Job]) -> dict[str, QueuePlace]:
    """Of those of `jobs` that wait for a worker and nothing else."""
    waiting = [job for job in jobs if job.status == JobStatus.queued and job.waits_for is None]
    if not waiting:
        return {}
    speeds = _Speeds(session)
    now, num_slots, left = _slots_and_seconds_left(session, speeds)
    first = min(waiting, key=_place_in_order)
    last = max(waiting, key=_place_in_order)
    ahead = _work_ahead(session, first)
    places = {}
    for row in [first] if first is last else _ready_between(session, first, last):
        work = ahead.setdefault(row.speed_key, _Work())
        if row.id in {job.id for job in waiting}:
            position = 1 + sum(group.num_jobs for group in ahead.values())
            start_at = _start(now, num_slots, left, position, ahead, speeds)
            places[row.id] = QueuePlace(position, start_at)
        work.add(1, row.num_images)
    return places


def _place_in_order(job: Job) -> tuple[int, datetime, str]:
    """What `lifecycle.IN_ORDER` compares."""
    return job.rank, job.created_at, job.id


@dataclass
class _Work:
    """Jobs of one `speed_key`: how many, and the images that they process in all, where known."""

    num_jobs: int = 0
    num_images: int | None = None

    def add(self, num_jobs: int, num_images: int | None) -> None:
        self.num_jobs += num_jobs
        if num_images is not None:
            self.num_images = num_images + (self.num_images or 0)


def _work_ahead(session: Session, job: Job) -> dict[str | None, _Work]:
    """What comes before a job, summed up by `speed_key`."""
    num_images = cast(func.sum(Job.num_images), BigInteger)  # PostgreSQL's sum is a decimal.
    rows = session.execute(
        select(Job.speed_key, func.count(), num_images)
        .where(lifecycle.IS_READY, tuple_(*lifecycle.IN_ORDER) < _place_in_order(job))
        .group_by(Job.speed_key)
    )
    return {speed_key: _Work(num_jobs, images) for speed_key, num_jobs, images in rows}


def _ready_between(session: Session, first: Job, last: Job) -> Iterable[Row[Any]]:
    """What waits for a worker from the job `first` up to the job `last`, in the queue's order."""
    place = tuple_(*lifecycle.IN_ORDER)
    return session.execute(
        select(Job.id, Job.speed_key, Job.num_images)
        .where(lifecycle.IS_READY)
        .where(place >= _place_in_order(first), place <= _place_in_order(last))
        .order_by(*lifecycle.IN_ORDER)
    )


class _Speeds:
    """How fast jobs went lately, by their `speed_key`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[str, tuple[float | None, float | None]] = {}

    def seconds(self, key: str | None, work: _Work) -> float | None:
        """What these jobs take; None where none of them has ever been measured."""
        if key is None:
            return None
        if key not in self._known:
            self._known[key] = self._measure(key)
        images_per_second, job_seconds = self._known[key]
        if work.num_images is not None and images_per_second:
            return work.num_images / images_per_second
        return None if job_seconds is None else work.num_jobs * job_seconds

    def _measure(self, key: str) -> tuple[float | None, float | None]:
        """Medians over the last jobs that succeeded: images per second, and seconds a job."""
        rows = self._session.execute(
            select(Job.images_per_second, Job.started_at, Job.finished_at)
            .where(Job.speed_key == key, Job.status == JobStatus.succeeded)
            .order_by(Job.finished_at.desc())
            .limit(NUM_MEASURED_JOBS)
        ).all()
        speeds = [row.images_per_second for row in rows if row.images_per_second]
        spans = [(row.finished_at - row.started_at).total_seconds() for row in rows]
        return median(speeds) if speeds else None, median(spans) if spans else None


# Statements of every POST and GET of a job, made once: to make one takes longer than to run it.
_IS_ALIVE = Worker.seen_at >= db_now(-ALIVE_SECONDS)
_NOW_AND_SLOTS = select(
    db_now(),
    select(func.coalesce(func.sum(Worker.num_slots), 0))
    .where(_IS_ALIVE, Worker.is_draining.is_(False))
    .scalar_subquery(),
)
_RUNNING = select(Job.progress, Job.speed_key, Job.num_images, Job.started_at).where(
    Job.status.in_(lifecycle.OWNED)
)
_MAX_GPUS = select(func.max(Worker.num_gpus)).where(_IS_ALIVE)


def _slots_and_seconds_left(
    session: Session, speeds: _Speeds
) -> tuple[datetime, int, list[float | None]]:
    """The time, the slots of all living workers, and how long each job that runs will take yet;
    without a worker nothing runs for long."""
    now, num_slots = session.execute(_NOW_AND_SLOTS).one()
    left: list[float | None] = []
    for row in session.execute(_RUNNING) if num_slots else ():
        eta = (row.progress or {}).get("eta_seconds")
        if eta is None:
            whole = speeds.seconds(row.speed_key, _Work(1, row.num_images))
            done = (now - row.started_at).total_seconds()
            eta = None if whole is None else max(0.0, whole - done)
        left.append(eta)
    return now, num_slots, left


def _start(
    now: datetime,
    num_slots: int,
    left: Sequence[float | None],
    position: int,
    ahead: Mapping[str | None, _Work],
    speeds: _Speeds,
) -> datetime | None:
    """As if all work could be shared out evenly: what is to be done before, over the slots."""
    if num_slots == 0:
        return None
    if position <= num_slots - len(left):
        return now
    seconds = list(left)
    seconds += [speeds.seconds(key, work) for key, work in ahead.items() if work.num_jobs]
    if None in seconds:
        return None
    return now + timedelta(seconds=sum(filter(None, seconds)) / num_slots)


def job_document(job: Job, place: QueuePlace | None) -> schemas.Job:
    """The job as clients see it."""
    return schemas.Job(
        id=job.id,
        kind=schemas.JobKind(job.kind),
        name=job.name,
        status=JobStatus(job.status),
        spec=job.spec,
        dataset_id=job.dataset_id,
        attempt=job.attempt,
        progress=schemas.Progress(**job.progress) if job.progress else None,
        queue_position=place.position if place else None,
        estimated_start_at=place.start_at if place else None,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        result=job.result,
        error=schemas.JobError(**job.error) if job.error else None,
        stop_reason=job.stop_reason,
        parent_id=job.parent_id,
    )


def delete_job(session: Session, job_id: str) -> list[str]:
    """Deletes a job that nobody works at, with its metrics, events, logs and checkpoints. Returns
    the storage keys that no row names any more: their files can go.

    Raises:
        JobNotFound: there is no such job.
        IllegalTransition: an attempt owns it.
        JobInUse: a job waits for it, or a job or an alias needs a checkpoint of it.
    """
    status = session.scalar(select(Job.status).where(Job.id == job_id).with_for_update())
    if status is None:
        raise JobNotFound(f"There is no job {job_id}")
    if status in lifecycle.OWNED:
        raise IllegalTransition(f"The job is {status}: cancel it, then delete it")
    if waiting := session.scalar(select(Job.id).where(Job.waits_for == job_id).limit(1)):
        raise JobInUse(f"The job {waiting} waits for this one: cancel that one first")
    # Locked before the needs are read: see `pin_model`.
    checkpoints = select(Checkpoint).where(Checkpoint.job_id == job_id).with_for_update()
    rows = list(session.scalars(checkpoints))
    ids = [row.id for row in rows]
    user = select(Job.id).where(Job.checkpoint_id.in_(ids), _IS_UNFINISHED)
    if needs := session.scalar(user.where(Job.id != job_id).limit(1)):
        raise JobInUse(f"The job {needs} needs a checkpoint of this one: cancel that one first")
    is_served = Alias.checkpoint_id.in_(ids) | Alias.former_id.in_(ids)
    if alias := session.scalar(select(Alias.name).where(is_served).order_by(Alias.name).limit(1)):
        raise JobInUse(
            f"The alias {alias} stands for a checkpoint of this job, or did before its last move: "
            "delete the alias, or move it twice"
        )
    keys = {row.key for row in rows}
    keys.update(session.scalars(select(Predictions.key).where(Predictions.job_id == job_id)))
    session.connection().execute(delete(Job).where(Job.id == job_id))
    return unnamed_keys(session, keys)


def inherit(session: Session, job: Job, parent: Job) -> None:
    """Lets a new job begin where its parent came to: with the parent's checkpoints, which both name
    from now on, the curve up to the last of them, and what `auto` chose."""
    rows = list_checkpoints(session, parent.id)
    newest = rows[0].last_point
    is_kept = (MetricPoint.job_id == parent.id) & (MetricPoint.name != REWIND)
    place = func.row_number().over(order_by=MetricPoint.number)
    columns = ("name", "step", "epoch", "value", "time", "is_extreme")
    session.connection().execute(
        insert(MetricPoint).from_select(
            ["job_id", "number", "attempt", *columns],
            select(
                literal(job.id),
                place,
                literal(0),
                *(getattr(MetricPoint, name) for name in columns),
            ).where(is_kept, MetricPoint.number <= newest),
        )
    )

    def num_points(last: int) -> int:
        count = select(func.count()).select_from(MetricPoint)
        return session.scalar(count.where(is_kept, MetricPoint.number <= last)) or 0

    for row in rows:
        session.add(
            Checkpoint(
                id=new_id(),
                job_id=job.id,
                attempt=0,
                kind=row.kind,
                epoch=row.epoch,
                step=row.step,
                metrics=row.metrics,
                last_point=num_points(row.last_point),
                num_bytes=row.num_bytes,
                key=row.key,
                created_at=row.created_at,
            )
        )
    job.last_point = num_points(newest)
    # Numbers moved up, and the end is cut: what was marked there says too little.
    _mark_extremes(session, job.id, max(0, job.last_point - 2 * STRETCH), job.last_point)
    job.runtime = parent.runtime
    session.flush()
    lifecycle.record(
        session,
        job.id,
        "info",
        "inherited",
        f"Goes on from step {rows[0].step} of the job {parent.id}",
        {"parent_id": parent.id, "step": rows[0].step},
    )


def list_attempts(session: Session, job_id: str) -> list[Attempt]:
    """The attempts at a job, in their order."""
    return list(
        session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number))
    )


def attempt_document(row: Attempt) -> schemas.Attempt:
    """The attempt as clients see it."""
    return schemas.Attempt(
        number=row.number,
        host=row.host,
        gpus=row.gpus or [],
        started_at=row.started_at,
        ended_at=row.ended_at,
        outcome=row.outcome,
        reason=row.reason,
    )


@dataclass(frozen=True)
class Orders:
    """What a supervisor asks each second about its job."""

    status: JobStatus
    progress_at: datetime | None
    """When the trainer last gave a sign of progress, by the database's clock."""


def read_orders(session: Session, fence: Fence) -> Orders | None:
    """None when the job is no longer this attempt's."""
    row = session.execute(select(Job.status, Job.progress_at).where(holds(fence))).one_or_none()
    return None if row is None else Orders(JobStatus(row.status), row.progress_at)


def check_fence(session: Session, fence: Fence) -> None:
    """Locks the job's row for the rest of the transaction. Raises `Superseded`."""
    _update_owned(session, fence, progress_at=db_now())


def store_runtime(session: Session, fence: Fence, runtime: Mapping[str, Any]) -> None:
    """Keeps what `auto` chose, for the attempts to come. Raises `Superseded`."""
    _update_owned(session, fence, runtime=dict(runtime))


def store_dataset_id(session: Session, fence: Fence, dataset_id: str) -> None:
    """Notes which dataset a name stood for. Raises `Superseded`."""
    _update_owned(session, fence, dataset_id=dataset_id)


def store_checkpoint_id(session: Session, fence: Fence, checkpoint_id: str) -> None:
    """Notes which checkpoint a job's model was found to be; it is kept from now on until the job is
    over. Raises `Superseded`."""
    _update_owned(session, fence, checkpoint_id=checkpoint_id)


def _update_owned(session: Session, fence: Fence, **values: Any) -> None:
    result = session.connection().execute(update(Job).where(holds(fence)).values(**values))
    if result.rowcount != 1:
        raise Superseded(fence.job_id)


# ------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class NewPoint:
    """A metric as a trainer hands it in; the writer numbers it."""

    name: str
    step: int
    epoch: int
    value: float


def write_progress(
    session: Session,
    fence: Fence,
    progress: Mapping[str, Any] | None,
    points: Sequence[NewPoint] = (),
) -> None:
    """Stores progress and points in one go. The UPDATE both checks the fence and reserves the
    points' numbers, under the row's lock: numbers have no gap and follow the order of commits.

    Raises:
        Superseded: the job is no longer this attempt's; nothing is written.
    """
    values: dict[str, Any] = {"last_point": Job.last_point + len(points), "progress_at": db_now()}
    if progress is not None:
        values["progress"] = dict(progress)
        if rate := progress.get("images_per_second"):
            values["images_per_second"] = rate
    last = (
        session.connection()
        .execute(update(Job).where(holds(fence)).values(**values).returning(Job.last_point))
        .scalar_one_or_none()
    )
    if last is None:
        raise Superseded(fence.job_id)
    _insert_points(session, fence, last - len(points), points)
    _mark_extremes(session, fence.job_id, last - len(points), last)


def _insert_points(session: Session, fence: Fence, last: int, points: Sequence[NewPoint]) -> None:
    if not points:
        return
    now = session.scalar(select(db_now()))
    rows = [
        {
            "job_id": fence.job_id,
            "number": number,
            "attempt": fence.attempt,
            "name": point.name,
            "step": point.step,
            "epoch": point.epoch,
            "value": point.value,
            "time": now,
        }
        for number, point in enumerate(points, last + 1)
    ]
    session.connection().execute(insert(MetricPoint), rows)


def rewind(session: Session, fence: Fence, *, last_point: int, step: int, epoch: int) -> None:
    """Drops the points numbered above `last_point`, those after `step`, which this attempt will
    write anew, and tells readers so. Does nothing when there are none. Raises `Superseded`."""
    _update_owned(session, fence, progress_at=db_now())
    later = (MetricPoint.job_id == fence.job_id) & (MetricPoint.number > last_point)
    dropped = session.connection().execute(delete(MetricPoint).where(later))
    if dropped.rowcount == 0:
        return
    number = session.execute(
        update(Job)
        .where(Job.id == fence.job_id)
        .values(last_point=Job.last_point + 1)
        .returning(Job.last_point)
    ).scalar_one()
    # The stretch that was cut has other extremes now, as if its end had just been reached.
    _mark_extremes(session, fence.job_id, last_point, number)
    session.connection().execute(
        insert(MetricPoint).values(
            job_id=fence.job_id,
            number=number,
            attempt=fence.attempt,
            name=REWIND,
            step=step,
            epoch=epoch,
            value=None,
            time=db_now(),
        )
    )


def missing_points(session: Session, fence: Fence, points: Sequence[NewPoint]) -> list[NewPoint]:
    """Those of `points` that are not stored yet: for a writer whose commit was not answered."""
    query = select(MetricPoint.name, MetricPoint.step).where(
        MetricPoint.job_id == fence.job_id,
        MetricPoint.attempt == fence.attempt,
        MetricPoint.step.in_({point.step for point in points}),
    )
    stored = {(name, step) for name, step in session.execute(query)}
    return [point for point in points if (point.name, point.step) not in stored]


_POINT_COLUMNS = (
    MetricPoint.name,
    MetricPoint.number,
    MetricPoint.step,
    MetricPoint.epoch,
    MetricPoint.value,
    MetricPoint.time,
)


def read_points(
    session: Session,
    job_id: str,
    *,
    after: int,
    up_to: int | None = None,
    names: Collection[str] | None = None,
    limit: int | None = None,
) -> list[Row[Any]]:
    """Points numbered above `after`, and at most `up_to`, in their order, `limit` at most: rows of
    name, number, step, epoch, value and time."""
    query = (
        select(*_POINT_COLUMNS)
        .where(_is_point(job_id, names), MetricPoint.number > after)
        .order_by(MetricPoint.number)
        .limit(limit)
    )
    if up_to is not None:
        query = query.where(MetricPoint.number <= up_to)
    return list(session.execute(query))


def series(
    session: Session,
    job_id: str,
    *,
    names: Collection[str] | None,
    after: int,
    limit: int,
) -> tuple[dict[str, list[schemas.MetricPoint]], int | None]:
    """Points numbered above `after`, by name and in their order, `limit` at most; with the
    number of the last one that was looked at, None when there was none."""
    rows = read_points(session, job_id, after=after, names=names, limit=limit)
    found: dict[str, list[schemas.MetricPoint]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(point_document(row))
    return found, rows[-1].number if rows else None


def point_document(row: Row[Any]) -> schemas.MetricPoint:
    """A row of `read_points` as clients see it."""
    return schemas.MetricPoint(step=row.step, epoch=row.epoch, value=row.value, time=row.time)


def _is_point(job_id: str, names: Collection[str] | None) -> ColumnElement[bool]:
    found: ColumnElement[bool] = (MetricPoint.job_id == job_id) & (MetricPoint.name != REWIND)
    return found if names is None else found & MetricPoint.name.in_(names)


def read_curve(
    session: Session,
    job_id: str,
    *,
    after: int,
    last: int,
    names: Collection[str] | None = None,
) -> list[Row[Any]]:
    """Points that draw the curve from the number `after` to `last`, the job's last one: the first
    and the last stretch as they are, and of each between them the extremes. Rows as `read_points`
    gives, in their order; few, however many there are."""
    complete = max(last - last % STRETCH, after)
    head = min(after + STRETCH, complete)
    extremes = _is_point(job_id, names) & MetricPoint.is_extreme
    between = extremes & (MetricPoint.number > head) & (MetricPoint.number <= complete)
    query = select(*_POINT_COLUMNS).where(between).order_by(MetricPoint.number)
    return [
        *read_points(session, job_id, after=after, up_to=head, names=names),
        *session.execute(query),
        *read_points(session, job_id, after=complete, names=names),
    ]


def _mark_extremes(session: Session, job_id: str, after: int, last: int) -> None:
    """Marks the lowest and the highest of each series in the stretches that became complete when
    the job's last number went from `after` to `last`."""
    first, beyond = after // STRETCH, last // STRETCH
    if first == beyond:
        return
    extremes: dict[tuple[str, int], tuple[Row[Any], Row[Any]]] = {}
    start, end = first * STRETCH, beyond * STRETCH
    for row in read_points(session, job_id, after=start, up_to=end):
        key = row.name, (row.number - 1) // STRETCH
        low, high = extremes.get(key, (row, row))
        extremes[key] = (
            row if row.value < low.value else low,
            row if row.value > high.value else high,
        )
    numbers = sorted({row.number for pair in extremes.values() for row in pair})
    for begin in range(0, len(numbers), MAX_NUMBERS):
        chosen = MetricPoint.number.in_(numbers[begin : begin + MAX_NUMBERS])
        session.connection().execute(
            update(MetricPoint).where(MetricPoint.job_id == job_id, chosen).values(is_extreme=True)
        )


def points_after(session: Session, cursors: Mapping[str, int], limit: int) -> list[MetricPoint]:
    """The points of many jobs that come after each job's cursor, rewinds among them, ordered by
    number within each job; `limit` at most."""
    return _rows_after(session, MetricPoint, cursors, limit)


def _rows_after(
    session: Session, table: type[NumberedT], cursors: Mapping[str, int], limit: int
) -> list[NumberedT]:
    """One query for up to `MAX_ALTERNATIVES` jobs."""
    rows: list[NumberedT] = []
    wanted = [
        (table.job_id == job_id) & (table.number > number) for job_id, number in cursors.items()
    ]
    for first in range(0, len(wanted), MAX_ALTERNATIVES):
        query = (
            select(table)
            .where(or_(*wanted[first : first + MAX_ALTERNATIVES]))
            .order_by(table.job_id, table.number)
            .limit(limit - len(rows))
        )
        rows += session.scalars(query)
    return rows


def statuses(session: Session, job_ids: Collection[str]) -> dict[str, JobStatus]:
    """The status of each of these jobs that exists."""
    rows = session.execute(select(Job.id, Job.status).where(Job.id.in_(job_ids)))
    return {job_id: JobStatus(status) for job_id, status in rows}


class Head(NamedTuple):
    """How far a job has come: its status, and the numbers of its last point and its last event."""

    status: JobStatus
    last_point: int
    last_event: int


def heads(session: Session, job_ids: Collection[str]) -> dict[str, Head]:
    """Of those of these jobs that exist."""
    columns = (Job.id, Job.status, Job.last_point, Job.last_event)
    rows = session.execute(select(*columns).where(Job.id.in_(job_ids)))
    return {job_id: Head(JobStatus(status), *last) for job_id, status, *last in rows}


# -------------------------------------------------------------------------------------- events


def add_event(
    session: Session, fence: Fence, level: str, type_: str, message: str, data: dict[str, Any]
) -> None:
    """Raises `Superseded`."""
    _update_owned(session, fence, progress_at=Job.progress_at)
    lifecycle.record(session, fence.job_id, level, type_, message, data)


def list_events(
    session: Session, job_id: str, *, after: int = 0, limit: int | None = None
) -> list[Event]:
    """What happened to the job, in order: events numbered above `after`, `limit` at most."""
    query = (
        select(Event)
        .where(Event.job_id == job_id, Event.number > after)
        .order_by(Event.number)
        .limit(limit)
    )
    return list(session.scalars(query))


def events_after(session: Session, cursors: Mapping[str, int], limit: int) -> list[Event]:
    """The events of many jobs that come after each job's cursor, ordered by number within each
    job; `limit` at most."""
    return _rows_after(session, Event, cursors, limit)


def event_document(row: Event) -> schemas.Event:
    """The event as clients see it."""
    return schemas.Event(
        id=row.number,
        time=row.time,
        level=row.level,
        type=row.type,
        message=row.message,
        data=row.data,
    )


# --------------------------------------------------------------------------------- checkpoints


def register_checkpoint(
    session: Session,
    fence: Fence,
    *,
    kinds: Sequence[Literal["best", "last", "epoch"]],
    key: str,
    epoch: int,
    step: int,
    metrics: Mapping[str, float],
    num_bytes: int,
) -> None:
    """Makes a complete checkpoint visible: a row for each of its kinds. A new checkpoint ends a
    row of crashes.

    Raises:
        Superseded: the job is no longer this attempt's; nothing is written.
    """
    _update_owned(session, fence, crashes=0)
    now, last_point = session.execute(
        select(db_now(), Job.last_point).where(Job.id == fence.job_id)
    ).one()
    for kind in kinds:
        session.add(
            Checkpoint(
                id=new_id(),
                job_id=fence.job_id,
                attempt=fence.attempt,
                kind=kind,
                epoch=epoch,
                step=step,
                metrics=dict(metrics),
                last_point=last_point,
                num_bytes=num_bytes,
                key=key,
                created_at=now,
            )
        )
    session.flush()


def retire_checkpoints(session: Session, job_id: str, keep: Mapping[str, int]) -> list[str]:
    """Drops the rows beyond `keep[kind]` newest of each kind, but for those that an unfinished
    job or an alias needs. Returns the keys that no row names any more: their files can go."""
    dropped: set[str] = set()
    for kind, num_kept in keep.items():
        newest_first = (
            select(Checkpoint)
            .where(Checkpoint.job_id == job_id, Checkpoint.kind == kind)
            .order_by(Checkpoint.step.desc(), Checkpoint.id.desc())
            .with_for_update()
        )
        # Locked before the needs are read: see `pin_model`.
        superfluous = list(session.scalars(newest_first))[num_kept:]
        needed_ids = set(session.scalars(union_all(*_SERVED, _PINNED)))
        for row in superfluous:
            if row.id not in needed_ids:
                dropped.add(row.key)
                session.delete(row)
    session.flush()
    return unnamed_keys(session, dropped)


def unnamed_keys(session: Session, keys: Collection[str]) -> list[str]:
    """Those of `keys` that no row names, of whatever job: their files can go."""
    unnamed = set(keys)
    for first in range(0, len(keys), MAX_ALTERNATIVES):
        part = sorted(keys)[first : first + MAX_ALTERNATIVES]
        for column in (Checkpoint.key, Dataset.key, Predictions.key):
            unnamed -= set(session.scalars(select(column).where(column.in_(part))))
    return sorted(unnamed)


def forget_checkpoints_after(session: Session, fence: Fence, step: int) -> list[str]:
    """Drops checkpoints later than `step`, which a resumed attempt writes anew, but for those that
    aliases stand for. Returns the keys whose files can go. Raises `Superseded`."""
    _update_owned(session, fence, progress_at=db_now())
    is_later = (Checkpoint.job_id == fence.job_id) & (Checkpoint.step > step)
    later = is_later & Checkpoint.id.not_in(union_all(*_SERVED))
    keys = set(session.scalars(select(Checkpoint.key).where(later)))
    session.connection().execute(delete(Checkpoint).where(later))
    return unnamed_keys(session, keys)


def list_checkpoints(session: Session, job_id: str) -> list[Checkpoint]:
    """The job's checkpoints, newest first."""
    query = (
        select(Checkpoint)
        .where(Checkpoint.job_id == job_id)
        .order_by(Checkpoint.step.desc(), Checkpoint.kind)
    )
    return list(session.scalars(query))


def checkpoint_document(row: Checkpoint) -> schemas.Checkpoint:
    """The checkpoint as clients see it."""
    return schemas.Checkpoint(
        id=row.id,
        kind=row.kind,
        epoch=row.epoch,
        step=row.step,
        metrics=row.metrics,
        num_bytes=row.num_bytes,
        created_at=row.created_at,
    )


def find_model(session: Session, reference: str) -> Checkpoint:
    """The checkpoint that a client means: by its own id, by its job's, which stands for the best
    one, else the last, or by an alias.

    Raises:
        ModelNotFound: neither a checkpoint nor a job nor an alias.
        NoCheckpointYet: a job that has written none.
    """
    row = session.get(Checkpoint, reference)
    if row is not None:
        return row
    job = session.get(Job, reference)
    if job is None:
        alias = select(Checkpoint).join(Alias, Alias.checkpoint_id == Checkpoint.id)
        row = session.scalar(alias.where(Alias.name == reference))
        if row is not None:
            return row
        raise ModelNotFound(
            f"There is no checkpoint, no job and no alias {reference[:64]}; GET /models lists the "
            "aliases"
        )
    rows = list_checkpoints(session, reference)
    for kind in ("best", "last", "epoch"):
        for row in rows:
            if row.kind == kind:
                return row
    detail = "Wait for its first checkpoint, at the end of an epoch"
    if JobStatus(job.status).is_terminal or job.kind != "train":
        detail = "It will have none: name a training that has succeeded"
    raise NoCheckpointYet(f"The job {job.id} has no checkpoint. {detail}")


# Asked at every prediction: to put it together would take as long as to ask it.
_REFERENCE = bindparam("reference", type_=String)
_STANDS_FOR = select(Alias.checkpoint_id).where(Alias.name == _REFERENCE).scalar_subquery()
_CHECKPOINT_ID = select(Checkpoint.id).where(
    (Checkpoint.id == _REFERENCE) | (Checkpoint.id == _STANDS_FOR)
)


def find_checkpoint_id(session: Session, reference: str) -> str | None:
    """What `find_model` would find by a checkpoint's own id or by an alias, in one query; no id of
    a checkpoint can be an alias. None for a job's id, and for what is not there."""
    return session.scalar(_CHECKPOINT_ID, {"reference": reference})


def trained_spec(job: Job) -> TrainSpec:
    """How the job's model was trained: by the job itself, or elsewhere before it was imported."""
    spec = load_spec(job.spec)
    if isinstance(spec, ImportSpec):
        assert job.result is not None, "a model that was imported is complete"
        spec = load_spec(job.result["trained"])
    assert isinstance(spec, TrainSpec), "no other job makes models"
    return spec


def pin_model(session: Session, reference: str) -> Checkpoint:
    """As `find_model`, for a job that will name the checkpoint: until that job is stored, nobody
    else retires it. Raises as `find_model` does."""
    while True:
        checkpoint = find_model(session, reference)
        locked = select(Checkpoint.id).where(Checkpoint.id == checkpoint.id)
        if session.scalar(locked.with_for_update(read=True)) is not None:
            return checkpoint
        session.expire_all()  # It was retired just now, for a newer one.


# -------------------------------------------------------------------------------------- reports


class EncodedOutcomes(NamedTuple):
    """What an evaluation said of each image of a stored split, as `shared.comparison` packs it."""

    split: str
    columns: bytes


def add_report(
    session: Session,
    job_id: str,
    report: schemas.Report,
    outcomes: EncodedOutcomes | None = None,
) -> None:
    """Stores the report of a job that is about to finish, in the same transaction; with it what
    became of each image."""
    session.add(Report(job_id=job_id, document=report.model_dump(mode="json")))
    if outcomes is not None:
        session.add(Outcomes(job_id=job_id, split=outcomes.split, columns=outcomes.columns))
    session.flush()


def get_report(session: Session, job_id: str) -> schemas.Report:
    """Raises `JobNotFound`, or `ReportNotReady`."""
    job = get_job(session, job_id)
    report = session.get(Report, job_id)
    if report is None:
        raise ReportNotReady(f"The job is {job.status}; a report is written when it succeeds")
    return schemas.Report.model_validate(report.document)


def has_report(session: Session, job_id: str) -> bool:
    """Whether `get_report` finds one, which never changes any more."""
    return session.scalar(select(Report.job_id).where(Report.job_id == job_id)) is not None


def own_report(session: Session, checkpoint: Checkpoint) -> schemas.Report | None:
    """The report that the checkpoint's job ended with, if it is on this very checkpoint."""
    try:
        report = get_report(session, checkpoint.job_id)
    except ReportNotReady:
        return None
    return report if report.checkpoint_id == checkpoint.id else None


def report_on(
    session: Session, checkpoint: Checkpoint, dataset: Dataset, split: str
) -> schemas.Report:
    """The newest report on this checkpoint and these images: its training's, or an evaluation's.
    Raises `NotEvaluated`."""
    query: Select[Any] = select(Report.document)
    document = _newest(session, query, checkpoint, dataset, split)
    return schemas.Report.model_validate(document)


def outcomes_on(
    session: Session, checkpoint: Checkpoint, dataset: Dataset, split: str
) -> EncodedOutcomes:
    """What the checkpoint said of each of these images, the last time that it was asked. Raises
    `NotEvaluated`, also where only the report was kept."""
    query: Select[Any] = select(Outcomes).join(Report, Report.job_id == Outcomes.job_id)
    row = _newest(session, query, checkpoint, dataset, split)
    return EncodedOutcomes(row.split, row.columns)


def _newest(
    session: Session, query: Select[Any], checkpoint: Checkpoint, dataset: Dataset, split: str
) -> Any:
    """Of what `query` reads of the reports on this checkpoint and these images."""
    document = Report.document
    found = session.scalar(
        query.join(Job, Job.id == Report.job_id)
        .where(
            (Job.id == checkpoint.job_id) | (Job.checkpoint_id == checkpoint.id),
            document["checkpoint_id"].as_string() == checkpoint.id,
            document["dataset_id"].as_string() == dataset.id,
            document["split"].as_string() == split,
        )
        .order_by(Job.finished_at.desc(), Job.id.desc())
        .limit(1)
    )
    if found is not None:
        return found
    where = f"{dataset.name}/{split}"
    if split not in dataset.splits:
        raise NotEvaluated(
            f"The checkpoint {checkpoint.id} has no stored evaluation on {where}, which is what a "
            f"training held out itself: name a split of the dataset, {', '.join(dataset.splits)}"
        )
    raise NotEvaluated(
        f"The checkpoint {checkpoint.id} has no stored evaluation on {where}: post a job of kind "
        f"evaluate with model {checkpoint.id}, dataset {dataset.id} and split {split}, and ask "
        "again when it has succeeded"
    )


def calibration_of(session: Session, checkpoint: Checkpoint) -> tuple[float | None, float | None]:
    """`temperature` and `reject_below` of the report that the checkpoint's training ended with, as
    far as it is on this very checkpoint. Read without the rest of the document, which may be
    large."""
    measured = Report.document["calibration"]
    row = session.execute(
        select(measured["temperature"].as_float(), measured["reject_below"].as_float()).where(
            Report.job_id == checkpoint.job_id,
            Report.document["checkpoint_id"].as_string() == checkpoint.id,
        )
    ).first()
    return (None, None) if row is None else (row[0], row[1])


# ----------------------------------------------------------------------------- batch predictions


def add_predictions(session: Session, fence: Fence, key: str) -> None:
    """Names the folder with the job's answers; the attempt has to be about to end. Raises
    `Superseded`."""
    check_fence(session, fence)
    session.add(Predictions(job_id=fence.job_id, key=key))
    session.flush()


def predictions_key(session: Session, job_id: str) -> str:
    """Of the folder with the job's answers. Raises `JobNotFound`, or `PredictionsNotReady`."""
    row = session.get(Predictions, job_id)
    if row is None:
        kind = get_job(session, job_id).kind
        raise PredictionsNotReady(
            f"The job is of kind {kind}, and has made none: ask one of kind predict that has "
            "succeeded"
        )
    return row.key


# ------------------------------------------------------------------------ summaries and pictures


def add_summary(session: Session, fence: Fence, summary: schemas.Summary) -> None:
    """Stores what the job's network looks like, in place of an earlier attempt's. Raises
    `Superseded`."""
    _update_owned(session, fence, progress_at=db_now())
    session.merge(Summary(job_id=fence.job_id, document=summary.model_dump(mode="json")))
    session.flush()


def get_summary(session: Session, job_id: str) -> schemas.Summary:
    """Raises `JobNotFound`, or `SummaryNotReady`."""
    job = get_job(session, job_id)
    summary = session.get(Summary, job_id)
    if summary is None:
        raise SummaryNotReady(
            f"The job is {job.status}; a training's summary is written when it begins"
        )
    return schemas.Summary.model_validate(summary.document)


def add_picture(session: Session, fence: Fence, name: str, png: bytes) -> None:
    """Stores a picture of the job, in place of an earlier attempt's. Raises `Superseded`."""
    _update_owned(session, fence, progress_at=db_now())
    session.merge(Picture(job_id=fence.job_id, name=name, png=png))
    session.flush()


def has_picture(session: Session, job_id: str, name: str) -> bool:
    """Whether `get_picture` finds it."""
    query = select(Picture.name).where(Picture.job_id == job_id, Picture.name == name)
    return session.scalar(query) is not None


def get_picture(session: Session, job_id: str, name: str) -> bytes:
    """The bytes of a PNG. Raises `JobNotFound`, or `PictureNotReady`."""
    job = get_job(session, job_id)
    picture = session.get(Picture, (job_id, name))
    if picture is None:
        raise PictureNotReady(
            f"The job is {job.status}; samples are drawn when a training begins, hardest when a "
            "job with a report succeeds"
        )
    return picture.png


# ---------------------------------------------------------------------------- idempotency keys


def recall_request(session: Session, submitter: str, key: str, request_hash: str) -> Job | None:
    """The job that an earlier request with this Idempotency-Key made; None for a new key.

    Raises:
        IdempotencyMismatch: the earlier request was another.
    """
    row = session.get(IdempotencyKey, (submitter, key))
    if row is None:
        return None
    if row.request_hash != request_hash:
        raise IdempotencyMismatch("Give another request a key of its own")
    return get_job(session, row.job_id)


def remember_request(
    session: Session, submitter: str, key: str, request_hash: str, job_id: str
) -> None:
    """Keeps the key with the job, in the transaction that stores it. Raises SQLAlchemy's
    `IntegrityError` when another request with this key came first."""
    session.add(
        IdempotencyKey(
            submitter=submitter,
            key=key,
            request_hash=request_hash,
            job_id=job_id,
            created_at=session.scalar(select(db_now())),
        )
    )
    session.flush()


def forget_requests(session: Session, older_than_seconds: float) -> int:
    """Drops old Idempotency-Keys. Returns how many."""
    old = IdempotencyKey.created_at < db_now(-older_than_seconds)
    return session.connection().execute(delete(IdempotencyKey).where(old)).rowcount


# ----------------------------------------------------------------------------------------- logs


def add_log_part(session: Session, fence: Fence, number: int, text: str) -> bool:
    """Stores the next piece of what the attempt's trainer printed. An attempt that has ended may
    still do so, since these are nobody else's rows; False where its job was deleted."""
    owns = select(Attempt.number).where(
        Attempt.job_id == fence.job_id,
        Attempt.number == fence.attempt,
        Attempt.owner == fence.owner,
    )
    if session.scalar(owns) is None:
        return False
    session.connection().execute(
        insert(LogPart).values(job_id=fence.job_id, attempt=fence.attempt, number=number, text=text)
    )
    return True


def drop_log_parts(session: Session, fence: Fence, up_to: int) -> None:
    """Forgets the attempt's first pieces, up to this number."""
    session.connection().execute(
        delete(LogPart).where(
            LogPart.job_id == fence.job_id,
            LogPart.attempt == fence.attempt,
            LogPart.number <= up_to,
        )
    )


def read_log(session: Session, job_id: str, attempt: int) -> str:
    """What the trainer of an attempt printed, as far as it is kept."""
    query = (
        select(LogPart.text)
        .where(LogPart.job_id == job_id, LogPart.attempt == attempt)
        .order_by(LogPart.number)
    )
    return "".join(session.scalars(query))


# -------------------------------------------------------------------------------------- workers


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself. `devices`: as `schemas.WorkerDevice`, without the jobs."""

    host: str
    num_gpus: int
    num_cores: int
    num_slots: int
    devices: Sequence[Mapping[str, Any]]
    is_draining: bool = False


def see_worker(session: Session, worker_id: str, facts: WorkerFacts) -> None:
    """Notes that a worker is there and what it has, and forgets those not seen for an hour."""
    gone = Worker.seen_at < db_now(-FORGET_WORKER_SECONDS)
    session.connection().execute(delete(Worker).where(gone))
    values = {**vars(facts), "devices": [dict(d) for d in facts.devices], "seen_at": db_now()}
    seen = session.connection().execute(
        update(Worker).where(Worker.id == worker_id).values(**values)
    )
    if seen.rowcount == 0:  # Nobody else writes this row: it cannot appear in between.
        session.connection().execute(
            insert(Worker).values(id=worker_id, started_at=db_now(), **values)
        )


def forget_worker(session: Session, worker_id: str) -> None:
    """The worker leaves."""
    session.connection().execute(delete(Worker).where(Worker.id == worker_id))


def cluster_facts(session: Session) -> ClusterFacts | None:
    """What the living workers have; None when there is none."""
    max_gpus = session.scalar(_MAX_GPUS)
    return None if max_gpus is None else ClusterFacts(max_gpus=max_gpus)


def list_workers(session: Session) -> list[schemas.Worker]:
    """The workers that were seen within the last hour, in the order in which they began, with what
    runs on each."""
    is_alive = _IS_ALIVE.label("is_alive")
    rows = session.execute(select(Worker, is_alive).order_by(Worker.started_at, Worker.id)).all()
    running = session.execute(
        select(Job.worker_id, Job.id, Attempt.gpus)
        .join(Attempt, (Attempt.job_id == Job.id) & (Attempt.number == Job.attempt))
        .where(Job.status.in_(lifecycle.OWNED), Job.worker_id.is_not(None))
        .order_by(Attempt.started_at)
    ).all()
    return [
        _worker_document(
            row,
            is_alive,
            [(job_id, gpus or []) for worker, job_id, gpus in running if worker == row.id],
        )
        for row, is_alive in rows
    ]


def _worker_document(
    row: Worker, is_alive: bool, running: Sequence[tuple[str, Sequence[int]]]
) -> schemas.Worker:
    holders = {gpu: job_id for job_id, gpus in running for gpu in gpus}
    devices = [
        schemas.WorkerDevice(
            **device, job_id=holders.get(device["index"]) if device["type"] == "cuda" else None
        )
        for device in row.devices or []
    ]
    return schemas.Worker(
        id=row.id,
        host=row.host,
        status=_worker_status(row.is_draining, is_alive),
        num_slots=row.num_slots,
        num_cores=row.num_cores,
        devices=devices,
        job_ids=[job_id for job_id, _ in running],
        started_at=row.started_at or row.seen_at,
        seen_at=row.seen_at,
    )


def _worker_status(is_draining: bool, is_alive: bool) -> Literal["active", "draining", "lost"]:
    if not is_alive:
        return "lost"
    return "draining" if is_draining else "active"


# ------------------------------------------------------------------------------------------- census


@dataclass(frozen=True)
class Census:
    """How many jobs there are of each kind and status, and how many workers of each status; and how
    long the job has waited that joined the queue first, 0 where none waits."""

    jobs: Mapping[tuple[str, str], int]
    workers: Mapping[str, int]
    longest_wait_seconds: float


def census(session: Session) -> Census:
    """Counts jobs and workers; a status that none has is counted as 0."""
    jobs = {(kind.value, status.value): 0 for kind in JobKind for status in JobStatus}
    counts = select(Job.kind, Job.status, func.count()).group_by(Job.kind, Job.status)
    for kind, job_status, number in session.execute(counts):
        jobs[kind, job_status] = number
    workers = dict.fromkeys(("active", "draining", "lost"), 0)
    alive = _IS_ALIVE.label("is_alive")
    seen = select(Worker.is_draining, alive, func.count()).group_by(Worker.is_draining, alive)
    for is_draining, is_alive, number in session.execute(seen):
        workers[_worker_status(is_draining, is_alive)] += number
    oldest = select(func.min(Job.created_at)).where(lifecycle.IS_READY)
    now, first = session.execute(select(db_now(), oldest.scalar_subquery())).one()
    waited = 0.0 if first is None else max(0.0, (now - first).total_seconds())
    return Census(jobs, workers, waited)
