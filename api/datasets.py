"""Datasets: what there is, and how one goes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends, Query

from api import examples, openapi
from api.dependencies import PageDep, ServicesDep
from shared import datasets
from shared.errors import DatasetNotFound
from skipline import schemas
from skipline.catalog import BUILTIN_DATASETS

router = APIRouter(tags=["datasets"])

MAX_REFERENCE = 220
"""A name of 200 characters, and a version."""


async def _reference(dataset_id: str) -> str:
    is_text = dataset_id.isprintable() and len(dataset_id) <= MAX_REFERENCE
    try:
        dataset_id.encode()
    except UnicodeEncodeError:
        is_text = False
    if not is_text:
        raise DatasetNotFound("There is no stored dataset of this id, label or name")
    return dataset_id


DatasetRef = Annotated[str, Depends(_reference)]
"""The `dataset_id` of the path: an id, a label, or a name."""


@router.get(
    "/datasets",
    summary="List the datasets",
    responses=openapi.responses(examples.DATASETS, problems=(422,)),
)
def list_datasets(page: PageDep, services: ServicesDep) -> schemas.DatasetPage:
    """The stored ones, newest first, and those that can be had by name."""
    with services.database.read_scope() as session:
        rows, next_ = datasets.list_datasets(session, limit=page.limit, after=page.after)
        items = datasets.dataset_documents(session, rows)
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
    return schemas.DatasetPage(items=items, next=next_, builtin=builtin)


@router.get(
    "/datasets/{dataset_id}",
    summary="Show a dataset",
    responses=openapi.responses(examples.DATASET, problems=(404,)),
)
def get_dataset(dataset_id: DatasetRef, services: ServicesDep) -> schemas.Dataset:
    """By its id, by a label (`name:version`), or by a name, which stands for its newest version."""
    with services.database.read_scope() as session:
        row = datasets.get_dataset(session, dataset_id)
        return datasets.dataset_documents(session, [row])[0]


@router.delete(
    "/datasets/{dataset_id}",
    status_code=204,
    summary="Delete a dataset",
    responses=openapi.no_content(problems=(404, 409, 422)),
)
def delete_dataset(
    dataset_id: DatasetRef,
    services: ServicesDep,
    background: BackgroundTasks,
    force: Annotated[
        bool, Query(description="Delete the images though models or jobs depend on them")
    ] = False,
) -> None:
    """Under all its names. 409 `in_use` lists the jobs and models that depend on it; with `force`
    its record stays for them, and its images go. Never while a job reads it."""
    with services.database.session_scope() as session:
        keys = datasets.delete_dataset(session, dataset_id, force=force)
    # Files that are left over because the process dies meanwhile are found by housekeeping.
    for key in keys:
        background.add_task(services.storage.delete, key)
