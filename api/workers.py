"""Who trains: the workers and what they have."""

from __future__ import annotations

from fastapi import APIRouter

from api import examples, openapi
from api.dependencies import PageDep, ServicesDep
from shared import repository
from skipline import schemas

router = APIRouter(tags=["workers"])


@router.get(
    "/workers",
    summary="List the workers",
    responses=openapi.responses(examples.WORKERS, problems=(422,)),
)
def list_workers(page: PageDep, services: ServicesDep) -> schemas.Page[schemas.Worker]:
    """Those that were seen within the last hour, oldest first: their devices, what runs on them,
    and when they were last seen."""
    with services.database.read_scope() as session:
        workers = repository.list_workers(session)
    items, next_ = page.cut(workers, lambda worker: worker.id)
    return schemas.Page[schemas.Worker](items=items, next=next_)
