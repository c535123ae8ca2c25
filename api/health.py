"""Probes and metrics: is the process up, can it do its work, and how much does it do?"""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from api import examples, openapi
from api.dependencies import ServicesDep
from skipline import schemas

router = APIRouter(tags=["health"])


# Asynchronous and without a look at anything: it answers as long as the event loop turns.
@router.get(
    "/healthz",
    summary="Is the process up?",
    responses=openapi.responses({"status": "ok"}),
)
async def healthz() -> dict[str, str]:
    """Touches nothing."""
    return {"status": "ok"}


@router.get(
    "/readyz",
    summary="Do database, broker and storage answer?",
    response_model=schemas.Readiness,
    responses=openapi.responses(examples.READY)
    | openapi.responses(examples.NOT_READY, 503, schemas.Readiness),
)
async def readyz(services: ServicesDep, response: Response) -> schemas.Readiness:
    """503 when one of them does not; `checks` says which. A process that serves predictions alone
    asks for no broker, and is ready once what `production` stands for has answered."""
    checks = await services.checks.run()
    if all(result == "ok" for result in checks.values()):
        return schemas.Readiness(status="ready", checks=checks)
    response.status_code = 503
    return schemas.Readiness(status="not_ready", checks=checks)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses=openapi.text(examples.EXPOSITION, problems=()),
)
async def get_metrics(services: ServicesDep) -> Response:
    """Never waits behind predictions. `skipline_database_up` is 0, and jobs and workers are not
    told, while the database does not answer."""
    text = await run_in_threadpool(services.metering.exposition)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
