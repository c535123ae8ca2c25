"""Every query that is not a change of status. Functions work within the caller's transaction;
writes of a worker take a `Fence` and raise `Superseded` when it does not hold any more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import uuid_utils
from sqlalchemy import ColumnElement, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from shared import lifecycle
from shared.database import db_now
from shared.errors import (
    InvalidInput,
    JobNotFound,
    ModelNotFound,
    NoCheckpointYet,
    PictureNotReady,
    ReportNotReady,
    SummaryNotReady,
    UnknownDataset,
)
from shared.lifecycle import Fence, Superseded, holds
from shared.tables import (
    Checkpoint,
    Dataset,
    Event,
    Job,
    MetricPoint,
    Picture,
    Report,
    Summary,
    Worker,
)
from skipline import schemas
from skipline.catalog import BUILTIN_DATASETS, ClusterFacts, DatasetFacts, needs_gpu
from skipline.schemas import JobKind, JobStatus
from skipline.specs import AnySpec, IngestSpec, TrainSpec, dump_spec

MAX_ALTERNATIVES = 200
"""In one condition: SQLite takes fewer than 1000."""
REWIND = "rewind"
"""The reserved name of a metric row that tells readers to go back."""
ALIVE_SECONDS = 60.0
"""A worker that was seen within so long counts as there."""
FORGET_WORKER_SECONDS = 3600.0


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
) -> Job:
    """Stores a resolved spec as a queued job, of the spec's own kind unless told otherwise."""
    kind = kind or JobKind(spec.kind)
    resources = getattr(spec, "resources", None)
    job = Job(
        id=new_id(),
        kind=kind,
        name=spec.name,
        status=JobStatus.queued,
        spec=dump_spec(spec),
        device=_device_of(spec),
        num_processes=resources.num_processes if resources else 1,
        dataset_id=dataset_id,
        checkpoint_id=checkpoint_id,
        created_at=session.scalar(select(db_now())),
    )
    session.add(job)
    session.flush()
    lifecycle.record(session, job.id, "info", "created", f"Stored as a job of kind {kind}")
    return job


def _device_of(spec: AnySpec) -> str:
    """What a worker must have to claim the job."""
    if isinstance(spec, TrainSpec) and needs_gpu(spec):
        return "cuda"
    return "auto" if isinstance(spec, IngestSpec) else spec.resources.device


def get_job(session: Session, job_id: str) -> Job:
    """Raises `JobNotFound`."""
    job = session.get(Job, job_id, populate_existing=True)
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
        query = query.where(_before_cursor(session, Job, after))
    return _page(list(session.scalars(query)), limit)


def _before_cursor(session: Session, table: type[Any], after: str) -> ColumnElement[bool]:
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


def _page(rows: list[Any], limit: int) -> tuple[list[Any], str | None]:
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


def num_queued(session: Session, devices: Collection[str] | None = None, num_gpus: int = 0) -> int:
    """How many jobs wait for a worker; with `devices`, for one that has these and so many GPUs."""
    count = select(func.count()).select_from(Job).where(Job.status == JobStatus.queued)
    if devices is not None:
        count = count.where(lifecycle.runs_on(devices, num_gpus))
    return session.scalar(count) or 0


def queue_positions(session: Session, jobs: Collection[Job]) -> dict[str, int]:
    """For each queued job of `jobs`: 1 for the next one to run, and so on."""
    ids = [job.id for job in jobs if job.status == JobStatus.queued]
    if not ids:
        return {}
    place = func.row_number().over(order_by=(Job.created_at, Job.id)).label("place")
    queue = select(Job.id, place).where(Job.status == JobStatus.queued).subquery()
    rows = session.execute(select(queue.c.id, queue.c.place).where(queue.c.id.in_(ids)))
    return {row.id: row.place for row in rows}


def job_document(job: Job, queue_position: int | None) -> schemas.Job:
    """The job as clients see it."""
    return schemas.Job(
        id=job.id,
        kind=schemas.JobKind(job.kind),
        name=job.name,
        status=JobStatus(job.status),
        spec=job.spec,
        attempt=job.attempt,
        progress=schemas.Progress(**job.progress) if job.progress else None,
        queue_position=queue_position,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        result=job.result,
        error=schemas.JobError(**job.error) if job.error else None,
        stop_reason=job.stop_reason,
        parent_id=None,
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
    last = (
        session.connection()
        .execute(update(Job).where(holds(fence)).values(**values).returning(Job.last_point))
        .scalar_one_or_none()
    )
    if last is None:
        raise Superseded(fence.job_id)
    _insert_points(session, fence, last - len(points), points)


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
    number = session.connection().execute(
        update(Job)
        .where(Job.id == fence.job_id)
        .values(last_point=Job.last_point + 1)
        .returning(Job.last_point)
    )
    session.connection().execute(
        insert(MetricPoint).values(
            job_id=fence.job_id,
            number=number.scalar_one(),
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
    query = (
        select(MetricPoint)
        .where(MetricPoint.job_id == job_id, MetricPoint.number > after)
        .where(MetricPoint.name != REWIND)
        .order_by(MetricPoint.number)
        .limit(limit)
    )
    if names is not None:
        query = query.where(MetricPoint.name.in_(names))
    answer: dict[str, list[schemas.MetricPoint]] = {}
    last = None
    for row in session.scalars(query):
        last = row.number
        assert row.value is not None
        point = schemas.MetricPoint(step=row.step, epoch=row.epoch, value=row.value, time=row.time)
        answer.setdefault(row.name, []).append(point)
    return answer, last


def points_after(session: Session, cursors: Mapping[str, int], limit: int) -> list[MetricPoint]:
    """The rows of many jobs that come after each job's cursor, rewinds among them, ordered by
    number within each job; `limit` rows at most. One query for up to `MAX_ALTERNATIVES` jobs."""
    rows: list[MetricPoint] = []
    wanted = [
        (MetricPoint.job_id == job_id) & (MetricPoint.number > number)
        for job_id, number in cursors.items()
    ]
    for first in range(0, len(wanted), MAX_ALTERNATIVES):
        query = (
            select(MetricPoint)
            .where(or_(*wanted[first : first + MAX_ALTERNATIVES]))
            .order_by(MetricPoint.job_id, MetricPoint.number)
            .limit(limit - len(rows))
        )
        rows += session.scalars(query)
    return rows


def statuses(session: Session, job_ids: Collection[str]) -> dict[str, JobStatus]:
    """The status of each of these jobs that exists."""
    rows = session.execute(select(Job.id, Job.status).where(Job.id.in_(job_ids)))
    return {job_id: JobStatus(status) for job_id, status in rows}


def last_points(session: Session, job_ids: Collection[str]) -> dict[str, tuple[JobStatus, int]]:
    """For each of these jobs: its status, and the number of its last point."""
    rows = session.execute(select(Job.id, Job.status, Job.last_point).where(Job.id.in_(job_ids)))
    return {job_id: (JobStatus(status), last) for job_id, status, last in rows}


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
    job needs. Returns the keys that no row names any more: their files can go."""
    needed = select(Job.checkpoint_id).where(
        Job.checkpoint_id.is_not(None),
        Job.status.not_in([status for status in JobStatus if status.is_terminal]),
    )
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
        needed_ids = set(session.scalars(needed))
        for row in superfluous:
            if row.id not in needed_ids:
                dropped.add(row.key)
                session.delete(row)
    session.flush()
    query = select(Checkpoint.key).where(Checkpoint.job_id == job_id, Checkpoint.key.in_(dropped))
    return sorted(dropped - set(session.scalars(query)))


def registered_keys(session: Session, job_id: str) -> set[str]:
    """The storage keys of this job that a row names: its checkpoints and datasets."""
    checkpoints = select(Checkpoint.key).where(Checkpoint.job_id == job_id)
    datasets = select(Dataset.key).where(Dataset.key.startswith(f"datasets/{job_id}/"))
    return {*session.scalars(checkpoints), *session.scalars(datasets)}


def forget_checkpoints_after(session: Session, fence: Fence, step: int) -> list[str]:
    """Drops checkpoints later than `step`, which a resumed attempt writes anew. Returns the keys
    whose files can go. Raises `Superseded`."""
    _update_owned(session, fence, progress_at=db_now())
    later = (Checkpoint.job_id == fence.job_id) & (Checkpoint.step > step)
    keys = sorted(set(session.scalars(select(Checkpoint.key).where(later))))
    session.connection().execute(delete(Checkpoint).where(later))
    return keys


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
    """The checkpoint that a client means: by its own id, or by its job's, which stands for the
    best one, else the last.

    Raises:
        ModelNotFound: neither a checkpoint nor a job.
        NoCheckpointYet: a job that has written none.
    """
    row = session.get(Checkpoint, reference)
    if row is not None:
        return row
    job = session.get(Job, reference)
    if job is None:
        raise ModelNotFound(f"There is neither a job nor a checkpoint {reference[:64]}")
    rows = list_checkpoints(session, reference)
    for kind in ("best", "last", "epoch"):
        for row in rows:
            if row.kind == kind:
                return row
    detail = "Wait for its first checkpoint, at the end of an epoch"
    if JobStatus(job.status).is_terminal or job.kind != "train":
        detail = "It will have none: name a training that has succeeded"
    raise NoCheckpointYet(f"The job {job.id} has no checkpoint. {detail}")


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


def add_report(session: Session, job_id: str, report: schemas.Report) -> None:
    """Stores the report of a job that is about to finish, in the same transaction."""
    session.add(Report(job_id=job_id, document=report.model_dump(mode="json")))
    session.flush()


def get_report(session: Session, job_id: str) -> schemas.Report:
    """Raises `JobNotFound`, or `ReportNotReady`."""
    job = get_job(session, job_id)
    report = session.get(Report, job_id)
    if report is None:
        raise ReportNotReady(f"The job is {job.status}; a report is written when it succeeds")
    return schemas.Report.model_validate(report.document)


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
        raise PictureNotReady(f"The job is {job.status}; a training draws this when it begins")
    return picture.png


# ------------------------------------------------------------------------------------- datasets


def add_dataset(session: Session, **values: Any) -> Dataset:
    """Stores a dataset, or finds the one with the same hash: the same images are one dataset,
    under their latest name."""
    existing = session.scalar(select(Dataset).where(Dataset.hash == values["hash"]))
    if existing is not None:
        if existing.name not in BUILTIN_DATASETS:
            existing.name = values["name"]
        return existing
    dataset = Dataset(created_at=session.scalar(select(db_now())), **values)
    try:
        with session.begin_nested():
            session.add(dataset)
    except IntegrityError:  # Another worker has just brought in the same images.
        return session.scalars(select(Dataset).where(Dataset.hash == values["hash"])).one()
    return dataset


def list_datasets(
    session: Session, *, limit: int, after: str | None
) -> tuple[list[Dataset], str | None]:
    """Datasets, newest first, with the cursor of the next page."""
    query = select(Dataset).order_by(Dataset.created_at.desc(), Dataset.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(_before_cursor(session, Dataset, after))
    return _page(list(session.scalars(query)), limit)


def find_dataset(session: Session, reference: str) -> Dataset | None:
    """The dataset with this id, else the newest one of this name."""
    by_name = (
        select(Dataset)
        .where(Dataset.name == reference)
        .order_by(Dataset.created_at.desc(), Dataset.id.desc())
        .limit(1)
    )
    return session.get(Dataset, reference) or session.scalar(by_name)


def dataset_facts(session: Session, reference: str) -> tuple[DatasetFacts, str | None]:
    """What is known of a dataset that a spec names, with its id; a built-in that was not used
    yet is known from the catalog and has none.

    Raises:
        UnknownDataset: neither stored nor built in.
    """
    dataset = find_dataset(session, reference)
    if dataset is not None:
        facts = DatasetFacts(
            name=dataset.name,
            classes=tuple(dataset.classes),
            image_size=dataset.image_size,
            splits={name: split["num_images"] for name, split in dataset.splits.items()},
        )
        return facts, dataset.id
    if reference in BUILTIN_DATASETS:
        return BUILTIN_DATASETS[reference], None
    builtin = ", ".join(BUILTIN_DATASETS)
    raise UnknownDataset(
        f"There is no dataset {reference!r}. Add it with POST /datasets, or use one of: {builtin}",
        errors=[{"loc": "dataset", "message": "Neither a stored dataset nor a built-in"}],
    )


def dataset_document(row: Dataset) -> schemas.Dataset:
    """The dataset as clients see it."""
    return schemas.Dataset(
        id=row.id,
        name=row.name,
        hash=row.hash,
        num_classes=len(row.classes),
        classes=row.classes,
        splits={name: schemas.SplitInfo(**split) for name, split in row.splits.items()},
        image_size=row.image_size,
        channel_mean=row.channel_mean,
        channel_std=row.channel_std,
        channel_image_std=row.channel_image_std,
        problems=[schemas.Problem(**problem) for problem in row.problems],
        created_at=row.created_at,
    )


# -------------------------------------------------------------------------------------- workers


def see_worker(session: Session, worker_id: str, host: str, num_gpus: int, num_cores: int) -> None:
    """Notes that a worker is there and what it has, and forgets those not seen for an hour."""
    gone = Worker.seen_at < db_now(-FORGET_WORKER_SECONDS)
    session.connection().execute(delete(Worker).where(gone))
    values = {"host": host, "num_gpus": num_gpus, "num_cores": num_cores, "seen_at": db_now()}
    seen = session.connection().execute(
        update(Worker).where(Worker.id == worker_id).values(**values)
    )
    if seen.rowcount == 0:  # Nobody else writes this row: it cannot appear in between.
        session.connection().execute(insert(Worker).values(id=worker_id, **values))


def forget_worker(session: Session, worker_id: str) -> None:
    """The worker leaves."""
    session.connection().execute(delete(Worker).where(Worker.id == worker_id))


def cluster_facts(session: Session) -> ClusterFacts | None:
    """What the living workers have; None when there is none."""
    alive = Worker.seen_at >= db_now(-ALIVE_SECONDS)
    max_gpus = session.scalar(select(func.max(Worker.num_gpus)).where(alive))
    return None if max_gpus is None else ClusterFacts(max_gpus=max_gpus)
