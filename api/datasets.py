"""Datasets: bringing them in, and what there is."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Response
from pydantic import TypeAdapter

from api import examples, openapi
from api.bodies import json_body
from api.dependencies import PageDep, ServicesDep
from api.submission import JsonPostingDep, store, submit
from shared import repository
from shared.errors import DatasetNotFound
from skipline import schemas
from skipline.catalog import BUILTIN_DATASETS, SpecRefused
from skipline.specs import IngestSpec

router = APIRouter(tags=["datasets"])

_adapter = TypeAdapter(IngestSpec)


def parse_ingest(document: Any) -> IngestSpec:
    """Checks what a client sent. Raises pydantic's `ValidationError`, or `SpecRefused`."""
    spec = _adapter.validate_python(document)
    builtin = ", ".join(BUILTIN_DATASETS)
    if spec.source == "builtin" and spec.name not in BUILTIN_DATASETS:
        message = f"There is no such built-in; choose one of: {builtin}"
        raise SpecRefused([{"loc": "name", "message": message}], code="unknown_dataset")
    # Without a name the dataset takes the path's, up to its suffix.
    name = spec.name or PurePath(spec.path or "").name.split(".")[0]
    if spec.source == "path" and name in BUILTIN_DATASETS:
        message = f"This name is a built-in's; give another. Built in are: {builtin}"
        raise SpecRefused([{"loc": "name", "message": message}])
    return spec


@router.post(
    "/datasets",
    status_code=202,
    summary="Bring a dataset in",
    response_model=schemas.Job,
    responses=openapi.responses(
        examples.INGEST_JOB, 202, problems=(400, 409, 413, 415, 422, 429), location=True
    ),
    openapi_extra=openapi.json_body(_adapter, examples.INGEST_REQUESTS),
)
def add_dataset(
    spec: Annotated[IngestSpec, Depends(json_body(parse_ingest))],
    posting: JsonPostingDep,
    services: ServicesDep,
    background: BackgroundTasks,
    response: Response,
) -> schemas.Job:
    """Stores a job of kind `ingest`, which reads a folder or an archive of class folders on the
    server's disk, or a built-in dataset. Its `result.dataset_id` names the dataset."""
    return submit(
        posting,
        lambda session: store(session, spec, posting.submitter, services.settings),
        services,
        background,
        response,
    )


@router.get(
    "/datasets",
    summary="List the datasets",
    responses=openapi.responses(examples.DATASETS, problems=(422,)),
)
def list_datasets(page: PageDep, services: ServicesDep) -> schemas.DatasetPage:
    """The stored ones, newest first, and those that can be had by name."""
    with services.database.read_scope() as session:
        rows, next_ = repository.list_datasets(session, limit=page.limit, after=page.after)
    builtin = [
        schemas.BuiltinDataset(
            name=facts.name,
            num_classes=facts.num_classes,
            image_size=facts.image_size,
            splits=dict(facts.splits),
            description=facts.description,
            needs_network=facts.needs_network,
        )
        for facts in BUILTIN_DATASETS.values()
    ]
    items = [repository.dataset_document(row) for row in rows]
    return schemas.DatasetPage(items=items, next=next_, builtin=builtin)


@router.get(
    "/datasets/{dataset_id}",
    summary="Show a dataset",
    responses=openapi.responses(examples.DATASET, problems=(404,)),
)
def get_dataset(dataset_id: str, services: ServicesDep) -> schemas.Dataset:
    """By its id; a name stands for the newest dataset of that name."""
    not_found = DatasetNotFound("There is no stored dataset of this id or name")
    if not dataset_id.isprintable():
        raise not_found
    with services.database.read_scope() as session:
        row = repository.find_dataset(session, dataset_id)
        if row is None:
            raise not_found
        return repository.dataset_document(row)
