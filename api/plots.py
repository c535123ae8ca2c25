"""`GET /jobs/{id}/plots/{name}.png`: a job's pictures. `skipline.plots` draws them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, cast

from fastapi import APIRouter, Path
from fastapi.responses import Response

from api import openapi
from api.curves import read_curves
from api.dependencies import JobId, Services, ServicesDep
from shared import repository
from shared.errors import NotFound, PictureNotReady
from skipline import plots, schemas

router = APIRouter(tags=["jobs"])

MAX_POINTS = 1000
"""Of one series in a picture: about as many as it has columns of pixels."""
STORED = ("samples", "hardest")
"""Drawn by the worker, which has the images."""
OF_REPORT = {"confusion": plots.draw_confusion, "calibration": plots.draw_calibration}
NAMES = (*plots.CURVES, *OF_REPORT, *STORED)


@router.get(
    "/jobs/{job_id}/plots/{name}.png",
    summary="Draw a picture of a job",
    response_class=Response,
    responses=openapi.picture(problems=(404, 429)),
)
async def get_plot(
    job_id: JobId,
    name: Annotated[str, Path(json_schema_extra={"enum": list(NAMES)})],
    services: ServicesDep,
) -> Response:
    """`loss`, `accuracy` and `lr` over the steps so far; the `confusion` matrix and the
    `calibration` of the report; `samples`, images as the training sees them; and `hardest`, those
    with the highest loss in the end. 404 until there is something to show."""
    if name not in NAMES:
        raise NotFound(f"There is no such plot; choose one of: {', '.join(NAMES)}")
    png = await services.drawing.run(partial(_plot, services, job_id, name))
    return Response(png, media_type=openapi.PNG)


def _plot(services: Services, job_id: str, name: str) -> bytes:
    with services.database.read_scope() as session:
        job = repository.job_document(repository.get_job(session, job_id), None)
        if name in STORED:
            return repository.get_picture(session, job_id, name)
        report = repository.get_report(session, job_id) if name in OF_REPORT else None
    title = plots.title_of(job)
    try:
        if report is not None:
            return OF_REPORT[name](report, title)
        curve = cast(plots.CurveName, name)
        return plots.draw_plot(curve, _metrics(services, job, curve), title)
    except plots.NothingToDraw as error:
        raise PictureNotReady(str(error)) from None


def _metrics(services: Services, job: schemas.Job, name: plots.CurveName) -> schemas.Metrics:
    """The series that a picture shows, thinned."""
    with services.database.read_scope() as session:
        series, _ = read_curves(
            session,
            job.id,
            plots.CURVES[name],
            max_points=MAX_POINTS,
            limit=services.settings.max_metric_points,
        )
    return schemas.Metrics(job_id=job.id, status=job.status, series=series, next=None)
