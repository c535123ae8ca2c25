"""What a job has told so far, and goes on to tell: metrics, events, attempts, logs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse

from api import examples, openapi
from api.curves import read_curves
from api.dependencies import JobId, PageDep, PageRequest, Services, ServicesDep, unknown_cursor
from api.feeds import EVENTS, METRICS
from api.streams import Feed, Stream
from api.thinning import MIN_POINTS
from shared import repository
from shared.errors import AttemptNotFound
from skipline import schemas

router = APIRouter(tags=["jobs"])

MAX_NUMBER = 2**63 - 1
"""Of a point or an event: what a database's integer holds."""
MAX_ATTEMPT = 2**31 - 1
EVENT_STREAM = "text/event-stream"

AcceptHeader = Annotated[str, Header()]
LastEventId = Annotated[int | None, Header(ge=0, le=MAX_NUMBER)]


async def _follow(services: Services, feed: Feed[Any], job_id: str, cursor: int) -> Response:
    await run_in_threadpool(_check_job, services, job_id)
    return Stream(services.streams.subscribe(feed, job_id, cursor))


def _check_job(services: Services, job_id: str) -> None:
    with services.database.read_scope() as session:
        repository.get_job(session, job_id)


# The next two are asynchronous, since a stream belongs to the event loop; the database is asked in
# a thread.
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
    accept: AcceptHeader = "",
    last_event_id: LastEventId = None,
) -> Response:
    """As JSON: the points after `after`, of the series in `names`. A series that is longer than
    `max_points` is thinned without losing its extremes.

    With `Accept: text/event-stream`: every point as an event `metric`, those there are and then
    those to come, after `Last-Event-ID` or else `after`; `rewind` says to drop the points after a
    step, which are written anew; `end` carries the final status. `names` and `max_points` do not
    concern streams."""
    if EVENT_STREAM in accept:
        cursor = after if last_event_id is None else last_event_id
        return await _follow(services, METRICS, job_id, cursor)
    wanted = None if names is None else [name for name in names.split(",") if name.isprintable()]
    metrics = await run_in_threadpool(_metrics, services, job_id, wanted, after, max_points)
    # As it is: thousands of points are not checked once more on their way out.
    return Response(metrics, media_type="application/json")


def _metrics(
    services: Services, job_id: str, names: list[str] | None, after: int, max_points: int | None
) -> bytes:
    """The document `schemas.Metrics`, as JSON."""
    last: int | None
    limit = services.settings.max_metric_points
    with services.database.read_scope() as session:
        # The status first: of a job that is over, every point is there to be read.
        status = repository.get_job(session, job_id).status
        if max_points is None:
            series, last = repository.series(session, job_id, names=names, after=after, limit=limit)
        else:
            series, last = read_curves(
                session, job_id, names, after=after, max_points=max_points, limit=limit
            )
    next_ = str(max(last or 0, after)) if last or after else None
    document = schemas.Metrics(
        job_id=job_id, status=schemas.JobStatus(status), series=series, next=next_
    )
    return document.model_dump_json().encode()


@router.get(
    "/jobs/{job_id}/events",
    summary="List or follow what happens to a job",
    response_model=schemas.Page[schemas.Event],
    responses=openapi.responses(
        examples.EVENTS,
        problems=(404, 422, 429),
        also={EVENT_STREAM: {"schema": {"type": "string"}, "example": examples.EVENT_STREAM}},
    ),
)
async def get_events(
    job_id: JobId,
    page: PageDep,
    services: ServicesDep,
    accept: AcceptHeader = "",
    last_event_id: LastEventId = None,
) -> schemas.Page[schemas.Event] | Response:
    """As JSON: oldest first. An event's `id` is its number within the job; `after` takes one.

    With `Accept: text/event-stream`: every one as an event `event`, those there are and then those
    to come, after `Last-Event-ID` or else `after`; `end` carries the final status."""
    after = _number(page.after)
    if EVENT_STREAM in accept:
        cursor = after if last_event_id is None else last_event_id
        return await _follow(services, EVENTS, job_id, cursor)
    return await run_in_threadpool(_events, services, job_id, page, after)


def _events(
    services: Services, job_id: str, page: PageRequest, after: int
) -> schemas.Page[schemas.Event]:
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
    "/jobs/{job_id}/attempts",
    summary="List the attempts at a job",
    responses=openapi.responses(examples.ATTEMPTS, problems=(404, 422)),
)
def list_attempts(
    job_id: JobId, page: PageDep, services: ServicesDep
) -> schemas.Page[schemas.Attempt]:
    """Oldest first: where each one ran, how it ended, and why."""
    with services.database.read_scope() as session:
        repository.get_job(session, job_id)
        rows = repository.list_attempts(session, job_id)
    items = [repository.attempt_document(row) for row in rows]
    items, next_ = page.cut(items, lambda attempt: str(attempt.number))
    return schemas.Page[schemas.Attempt](items=items, next=next_)


@router.get(
    "/jobs/{job_id}/logs",
    summary="Read what a job's trainer printed",
    response_class=PlainTextResponse,
    responses=openapi.text(examples.LOG, problems=(404, 422)),
)
def get_logs(
    job_id: JobId,
    services: ServicesDep,
    attempt: Annotated[
        int | None, Query(ge=1, le=MAX_ATTEMPT, description="Its number; the last one by default")
    ] = None,
) -> PlainTextResponse:
    """Of one attempt, as far as it is kept: of a long log the beginning goes first. 404
    `attempt_not_found` for one that never was."""
    with services.database.read_scope() as session:
        last = repository.get_job(session, job_id).attempt
        if attempt is not None and attempt > last:
            raise AttemptNotFound(f"The job has had {last} attempts")
        return PlainTextResponse(repository.read_log(session, job_id, attempt or last))
