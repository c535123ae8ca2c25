"""Jobs: asking for them, watching them, and what they made."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from api import examples, openapi
from api.bodies import json_body
from api.dependencies import JobId, PageDep, Services, ServicesDep, unknown_cursor
from api.streams import MetricStream
from api.thinning import MIN_POINTS, thin
from shared import lifecycle, repository
from shared.errors import InvalidInput, ModelNotFound, TooManyJobs
from shared.tables import Job
from skipline import catalog, schemas
from skipline.specs import (
    IMAGENET_WEIGHTS,
    AnySpec,
    EvaluateSpec,
    JobRequest,
    TrainSpec,
    load_spec,
    parse_request,
)

router = APIRouter(tags=["jobs"])

MAX_NUMBER = 2**63 - 1
"""Of a point: what a database's integer holds."""
EVENT_STREAM = "text/event-stream"


def job_documents(session: Session, jobs: list[Job]) -> list[schemas.Job]:
    """The jobs as clients see them."""
    positions = repository.queue_positions(session, jobs)
    return [repository.job_document(job, positions.get(job.id)) for job in jobs]


def submit(
    spec: AnySpec,
    services: Services,
    background: BackgroundTasks,
    response: Response,
    kind: schemas.JobKind | None = None,
) -> schemas.Job:
    """Stores what a client asks for as a queued job, and rings for a worker once it is stored. Its
    kind is the spec's own unless told otherwise.

    Raises:
        AppError, SpecRefused: it cannot work; nothing was stored.
    """
    with services.database.session_scope() as session:
        # Requests at the same moment may each see the last free place: the limit is there to
        # keep the queue finite, not to count it.
        if repository.num_queued(session) >= services.settings.max_queued_jobs:
            raise TooManyJobs(f"{services.settings.max_queued_jobs} jobs wait already")
        job = _store(session, spec, kind)
        document = job_documents(session, [job])[0]
    background.add_task(services.bell.ring)
    response.headers["Location"] = f"/jobs/{document.id}"
    return document


def _store(session: Session, spec: AnySpec, kind: schemas.JobKind | None) -> Job:
    if isinstance(spec, TrainSpec):
        return _store_training(session, spec, kind)
    if isinstance(spec, EvaluateSpec):
        checkpoint = repository.pin_model(session, spec.model)
        training = repository.get_job(session, checkpoint.job_id)
        trained_on, _ = repository.dataset_facts(
            session, training.dataset_id or training.spec["dataset"]
        )
        facts, dataset_id = repository.dataset_facts(session, spec.dataset)
        resolved = catalog.resolve_evaluation(spec, facts, trained_on.classes)
        return repository.add_job(
            session, resolved, dataset_id=dataset_id, checkpoint_id=checkpoint.id
        )
    return repository.add_job(session, spec)


def _store_training(session: Session, spec: TrainSpec, kind: schemas.JobKind | None) -> Job:
    facts, dataset_id = repository.dataset_facts(session, spec.dataset)
    resolved = catalog.resolve(spec, facts, repository.cluster_facts(session))
    checkpoint_id = None
    if resolved.model.init_from not in (None, IMAGENET_WEIGHTS):
        checkpoint_id = _pin_origin(session, resolved)
        model = resolved.model.model_copy(update={"init_from": checkpoint_id})
        resolved = resolved.model_copy(update={"model": model})
    return repository.add_job(
        session, resolved, kind=kind, dataset_id=dataset_id, checkpoint_id=checkpoint_id
    )


def _pin_origin(session: Session, spec: TrainSpec) -> str:
    """The id of the checkpoint that `model.init_from` means, kept until the job is over.

    Raises:
        NoCheckpointYet: a job that has written none.
        SpecRefused: there is no such model, or its network is another.
    """
    assert spec.model.init_from is not None
    try:
        checkpoint = repository.pin_model(session, spec.model.init_from)
    except ModelNotFound as error:
        raise _origin_refused(error.detail, code=error.code) from None
    origin = load_spec(repository.get_job(session, checkpoint.job_id).spec)
    assert isinstance(origin, TrainSpec), "only trainings write checkpoints"
    if origin.model.arch != spec.model.arch:
        raise _origin_refused(
            f"That model is a {origin.model.arch}; weights of a {spec.model.arch} are needed"
        )
    ours, theirs = _stem(spec), _stem(origin)
    if catalog.ARCHITECTURES[spec.model.arch].has_stems and ours != theirs:
        raise _origin_refused(f"That model has the stem {theirs}, this one {ours}: set model.stem")
    return checkpoint.id


def _stem(spec: TrainSpec) -> catalog.Stem:
    assert spec.image_size is not None, "the spec is resolved"
    return catalog.resolve_stem(spec.model.stem, spec.image_size)


def _origin_refused(message: str, code: str = "invalid_spec") -> catalog.SpecRefused:
    return catalog.SpecRefused([{"loc": "model.init_from", "message": message}], code=code)


@router.post(
    "/jobs",
    status_code=202,
    summary="Start a training or an evaluation",
    response_model=schemas.Job,
    responses=openapi.responses(
        examples.TRAIN_JOB, 202, problems=(400, 404, 409, 413, 415, 422, 429), location=True
    ),
    openapi_extra=openapi.json_body(TypeAdapter(JobRequest), examples.JOB_REQUESTS),
)
def create_job(
    spec: Annotated[TrainSpec | EvaluateSpec, Depends(json_body(parse_request))],
    services: ServicesDep,
    background: BackgroundTasks,
    response: Response,
    dry_run: Annotated[
        bool, Query(description="Measure what the training would cost, instead of training")
    ] = False,
) -> schemas.Job:
    """Accepted means stored: the job will run, whatever happens to the queue. Its `spec` in the
    answer has every default written out.

    With `dry_run` the job is of kind `dry_run`; its `result` says how many parameters the network
    has, how much memory and how long an epoch takes, and how large a checkpoint is."""
    if dry_run and spec.kind != "train":
        message = "Only a training can be tried out"
        raise InvalidInput(message, errors=[{"loc": "dry_run", "message": message}])
    return submit(
        spec, services, background, response, schemas.JobKind.dry_run if dry_run else None
    )


@router.get(
    "/jobs",
    summary="List jobs",
    responses=openapi.responses(examples.JOBS, problems=(422,)),
)
def list_jobs(
    page: PageDep,
    services: ServicesDep,
    status: schemas.JobStatus | None = None,
    kind: schemas.JobKind | None = None,
) -> schemas.Page[schemas.Job]:
    """Newest first."""
    with services.database.read_scope() as session:
        rows, next_ = repository.list_jobs(
            session, status=status, kind=kind, limit=page.limit, after=page.after
        )
        return schemas.Page[schemas.Job](items=job_documents(session, rows), next=next_)


@router.get(
    "/jobs/{job_id}",
    summary="Show a job",
    responses=openapi.responses(examples.TRAIN_JOB, problems=(404,)),
)
def get_job(job_id: JobId, services: ServicesDep) -> schemas.Job:
    """The job as it stands."""
    with services.database.read_scope() as session:
        return job_documents(session, [repository.get_job(session, job_id)])[0]


@router.post(
    "/jobs/{job_id}/cancel",
    summary="Cancel a job",
    responses=openapi.responses(examples.CANCELLED_JOB, problems=(404, 409)),
)
def cancel_job(job_id: JobId, services: ServicesDep) -> schemas.Job:
    """Ends a job and gives up its result: at once if it waits, within seconds if it runs. Doing
    it again changes nothing; a job that is over otherwise answers 409."""
    with services.database.session_scope() as session:
        lifecycle.request_cancel(session, job_id)
        return job_documents(session, [repository.get_job(session, job_id)])[0]


# Asynchronous, since a stream belongs to the event loop; the database is asked in a thread.
@router.get(
    "/jobs/{job_id}/metrics",
    summary="Read or follow a job's metrics",
    response_model=schemas.Metrics,
    responses=openapi.responses(
        examples.METRICS,
        problems=(404, 422, 429),
        also={EVENT_STREAM: {"schema": {"type": "string"}, "example": examples.METRIC_STREAM}},
    ),
)
async def get_metrics(
    job_id: JobId,
    services: ServicesDep,
    names: Annotated[
        str | None, Query(max_length=2000, description="Series, separated by commas")
    ] = None,
    after: Annotated[
        int, Query(ge=0, le=MAX_NUMBER, description="`next` of an earlier answer")
    ] = 0,
    max_points: Annotated[
        int | None, Query(ge=MIN_POINTS, description="Points of a series that are enough")
    ] = None,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_NUMBER)] = None,
) -> schemas.Metrics | Response:
    """As JSON: the points after `after`, of the series in `names`. A series that is longer than
    `max_points` is thinned without losing its extremes.

    With `Accept: text/event-stream`: every point as an event `metric`, those there are and then
    those to come, after `Last-Event-ID` or else `after`; `rewind` says to drop the points after a
    step, which are written anew; `end` carries the final status. `names` and `max_points` do not
    concern streams."""
    if EVENT_STREAM in accept:
        await run_in_threadpool(_check_job, services, job_id)
        cursor = after if last_event_id is None else last_event_id
        return MetricStream(services.streams.subscribe(job_id, cursor))
    wanted = None if names is None else [name for name in names.split(",") if name.isprintable()]
    return await run_in_threadpool(_metrics, services, job_id, wanted, after, max_points)


def _check_job(services: Services, job_id: str) -> None:
    with services.database.read_scope() as session:
        repository.get_job(session, job_id)


def _metrics(
    services: Services, job_id: str, names: list[str] | None, after: int, max_points: int | None
) -> schemas.Metrics:
    limit = services.settings.max_metric_points
    with services.database.read_scope() as session:
        # The status first: of a job that is over, every point is there to be read.
        status = repository.get_job(session, job_id).status
        series, last = repository.series(session, job_id, names=names, after=after, limit=limit)
    if max_points is not None:
        series = {name: thin(points, max_points) for name, points in series.items()}
    next_ = str(last or after) if last or after else None
    return schemas.Metrics(
        job_id=job_id, status=schemas.JobStatus(status), series=series, next=next_
    )


@router.get(
    "/jobs/{job_id}/events",
    summary="List what happened to a job",
    responses=openapi.responses(examples.EVENTS, problems=(404, 422)),
)
def list_events(job_id: JobId, page: PageDep, services: ServicesDep) -> schemas.Page[schemas.Event]:
    """Oldest first. An event's `id` is its number within the job; `after` takes one."""
    after = _number(page.after)
    with services.database.read_scope() as session:
        repository.get_job(session, job_id)
        rows = repository.list_events(session, job_id, after=after, limit=page.limit + 1)
    items = [repository.event_document(row) for row in rows[: page.limit]]
    next_ = str(items[-1].id) if len(rows) > page.limit else None
    return schemas.Page[schemas.Event](items=items, next=next_)


def _number(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if not cursor.isdecimal() or int(cursor) > MAX_NUMBER:
        raise unknown_cursor()
    return int(cursor)


@router.get(
    "/jobs/{job_id}/summary",
    summary="Read the layers of a job's network",
    responses=openapi.responses(examples.SUMMARY, problems=(404,)),
)
def get_summary(job_id: JobId, services: ServicesDep) -> schemas.Summary:
    """Layer by layer, with totals; of a training that has begun, 404 `summary_not_ready` before."""
    with services.database.read_scope() as session:
        return repository.get_summary(session, job_id)


@router.get(
    "/jobs/{job_id}/checkpoints",
    summary="List a job's checkpoints",
    responses=openapi.responses(examples.CHECKPOINTS, problems=(404, 422)),
)
def list_checkpoints(
    job_id: JobId, page: PageDep, services: ServicesDep
) -> schemas.Page[schemas.Checkpoint]:
    """Newest first. Each one's id can be used in `/predict` and in an evaluation, also while the
    job still trains."""
    with services.database.read_scope() as session:
        repository.get_job(session, job_id)
        rows = repository.list_checkpoints(session, job_id)
    items = [repository.checkpoint_document(row) for row in rows]
    items, next_ = page.cut(items, lambda checkpoint: checkpoint.id)
    return schemas.Page[schemas.Checkpoint](items=items, next=next_)


@router.get(
    "/jobs/{job_id}/report",
    summary="Read a job's report",
    responses=openapi.responses(examples.REPORT, problems=(404,)),
)
def get_report(job_id: JobId, services: ServicesDep) -> schemas.Report:
    """Of an evaluation, or of the end of a training; 404 `report_not_ready` until it succeeds."""
    with services.database.read_scope() as session:
        return repository.get_report(session, job_id)
