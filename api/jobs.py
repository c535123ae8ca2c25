"""Jobs: asking for them, changing their course, and what they made."""

from __future__ import annotations

import csv
from io import StringIO
from typing import Annotated, Literal

from fastapi import APIRouter, BackgroundTasks, Depends, Query, Response
from fastapi.responses import FileResponse
from pydantic import TypeAdapter

from api import examples, openapi
from api.bodies import json_body
from api.dependencies import JobId, PageDep, Services, ServicesDep
from api.submission import (
    JsonPostingDep,
    PostingDep,
    job_documents,
    store,
    store_retry,
    submit,
)
from shared import lifecycle, repository
from shared.errors import InvalidInput, PredictionsNotReady
from shared.storage import Storage
from skipline import schemas
from skipline.specs import JobRequest, RequestSpec, parse_request

router = APIRouter(tags=["jobs"])

CSV = "text/csv"


@router.post(
    "/jobs",
    status_code=202,
    summary="Start a training, an evaluation or a batch prediction",
    response_model=schemas.Job,
    responses=openapi.responses(
        examples.TRAIN_JOB, 202, problems=(400, 404, 409, 413, 415, 422, 429), location=True
    ),
    openapi_extra=openapi.json_body(TypeAdapter(JobRequest), examples.JOB_REQUESTS),
)
def create_job(
    spec: Annotated[RequestSpec, Depends(json_body(parse_request))],
    posting: JsonPostingDep,
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
    kind = schemas.JobKind.dry_run if dry_run else None
    return submit(
        posting,
        lambda session: store(session, spec, posting.submitter, services.settings, kind),
        services,
        background,
        response,
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


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    summary="Delete a job",
    responses=openapi.no_content(problems=(404, 409)),
)
def delete_job(job_id: JobId, services: ServicesDep, background: BackgroundTasks) -> None:
    """Deletes a job that is over or waits, with all that it has written, and the files of its
    checkpoints. 409 `illegal_transition` while it runs, 409 `in_use` while another job waits for
    it or needs a checkpoint of it."""
    with services.database.session_scope() as session:
        keys = repository.delete_job(session, job_id)
    # Files that are left over because the process dies meanwhile are found by housekeeping.
    background.add_task(_delete_files, services.storage, keys)


def _delete_files(storage: Storage, keys: list[str]) -> None:
    for key in keys:
        storage.delete(key)


# -------------------------------------------------------------------------- changing its course


def _request(services: Services, job_id: str, action: lifecycle.Action) -> schemas.Job:
    with services.database.session_scope() as session:
        lifecycle.request(session, job_id, action)
        return job_documents(session, [repository.get_job(session, job_id)])[0]


@router.post(
    "/jobs/{job_id}/cancel",
    summary="Cancel a job",
    responses=openapi.responses(examples.CANCELLED_JOB, problems=(404, 409)),
)
def cancel_job(job_id: JobId, services: ServicesDep) -> schemas.Job:
    """Ends a job and gives up its result: at once if it waits, within seconds if it runs. Doing
    it again changes nothing; a job that is over otherwise answers 409."""
    return _request(services, job_id, "cancel")


@router.post(
    "/jobs/{job_id}/pause",
    summary="Pause a job",
    responses=openapi.responses(examples.PAUSING_JOB, problems=(404, 409)),
)
def pause_job(job_id: JobId, services: ServicesDep) -> schemas.Job:
    """Has a running job write a checkpoint and leave its worker, until it is resumed. Doing it
    again changes nothing; a job that does not run answers 409."""
    return _request(services, job_id, "pause")


@router.post(
    "/jobs/{job_id}/resume",
    summary="Resume a paused job",
    responses=openapi.responses(examples.RESUMED_JOB, problems=(404, 409)),
)
def resume_job(job_id: JobId, services: ServicesDep, background: BackgroundTasks) -> schemas.Job:
    """Queues a paused job again, in its old place; it goes on where it was. Doing it again changes
    nothing; a job that is not paused answers 409."""
    document = _request(services, job_id, "resume")
    background.add_task(services.bell.ring)
    return document


@router.post(
    "/jobs/{job_id}/stop",
    summary="End a training early",
    responses=openapi.responses(examples.STOPPING_JOB, problems=(404, 409)),
)
def stop_job(job_id: JobId, services: ServicesDep) -> schemas.Job:
    """Ends a running training and keeps what it has learnt: it succeeds, with report and result,
    and `stop_reason` is `user`. Doing it again changes nothing; what does not run, or is no
    training, answers 409."""
    return _request(services, job_id, "stop")


@router.post(
    "/jobs/{job_id}/retry",
    status_code=202,
    summary="Retry a job that has failed or was cancelled",
    response_model=schemas.Job,
    responses=openapi.responses(
        examples.RETRY_JOB, 202, problems=(404, 409, 422, 429), location=True
    ),
)
def retry_job(
    job_id: JobId,
    posting: PostingDep,
    services: ServicesDep,
    background: BackgroundTasks,
    response: Response,
    from_start: Annotated[
        bool, Query(description="Train afresh, instead of going on from the last checkpoint")
    ] = False,
) -> schemas.Job:
    """Stores a new job with the same spec; its `parent_id` is the old one, which stays as it is. A
    training goes on from the old one's last checkpoint, if there is one. Another than a failed or
    cancelled job answers 409."""
    return submit(
        posting,
        lambda session: store_retry(
            session, job_id, posting.submitter, services.settings, from_start=from_start
        ),
        services,
        background,
        response,
    )


# ------------------------------------------------------------------------------ what it has made


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
    response_model=schemas.Report,
    responses=openapi.responses(
        examples.REPORT,
        problems=(404, 422),
        also={CSV: {"schema": {"type": "string"}, "example": examples.REPORT_CSV}},
    ),
)
def get_report(
    job_id: JobId,
    services: ServicesDep,
    format: Annotated[
        Literal["json", "csv"], Query(description="csv: a line for each class")
    ] = "json",
) -> schemas.Report | Response:
    """Of an evaluation, or of the end of a training; 404 `report_not_ready` until it succeeds."""
    with services.database.read_scope() as session:
        report = repository.get_report(session, job_id)
    return report if format == "json" else Response(_class_table(report), media_type=CSV)


@router.get(
    "/jobs/{job_id}/predictions",
    summary="Read a batch prediction's answers",
    response_model=schemas.BatchPredictions,
    responses=openapi.responses(
        examples.BATCH_PREDICTIONS,
        problems=(404, 422),
        also={CSV: {"schema": {"type": "string"}, "example": examples.BATCH_CSV}},
    ),
)
def get_predictions(
    job_id: JobId,
    services: ServicesDep,
    format: Annotated[
        Literal["json", "csv"], Query(description="csv: a line for each image")
    ] = "json",
) -> FileResponse:
    """Of every image, in the order of the dataset or archive; 404 `predictions_not_ready` until
    the job succeeds."""
    with services.database.read_scope() as session:
        key = repository.predictions_key(session, job_id)
    path = services.storage.path(key) / f"predictions.{format}"
    if not path.is_file():
        raise PredictionsNotReady("The file is gone from the storage: post the job again")
    return FileResponse(path, media_type=CSV if format == "csv" else "application/json")


def _class_table(report: schemas.Report) -> str:
    """The report's classes as RFC 4180 has it."""
    table = StringIO()
    names = ("label", "num_samples", "accuracy", "precision", "recall", "f1")
    writer = csv.writer(table)
    writer.writerow([*names, "accuracy_low", "accuracy_high"])
    for row in report.per_class:
        interval = row.accuracy_interval or ("", "")
        writer.writerow([*(getattr(row, name) for name in names), *interval])
    return table.getvalue()
