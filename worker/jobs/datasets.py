"""Bringing a dataset in, finding it again, and its images as training takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from sqlalchemy.orm import Session

from shared import lifecycle, repository
from shared.errors import TrainingError
from shared.tables import Dataset
from skipline.catalog import BUILTIN_DATASETS
from skipline.schemas import JobStatus
from skipline.specs import IngestSpec
from worker.datasets.cache import packed_path
from worker.datasets.files import open_files
from worker.datasets.ingest import DatasetRecord, ingest
from worker.datasets.packing import pack
from worker.datasets.sources import dataset_name, open_source
from worker.engine.data import DataPath
from worker.jobs.context import Context
from worker.jobs.plan import Images


def bring_in(context: Context, spec: IngestSpec) -> None:
    """Ingests a dataset."""

    def and_finish(session: Session, dataset: Dataset) -> None:
        result = {
            "dataset_id": dataset.id,
            "name": dataset.name,
            "num_images": sum(split["num_images"] for split in dataset.splits.values()),
            "num_problems": len(dataset.problems),
        }
        lifecycle.finish(session, context.fence, JobStatus.succeeded, result=result)

    store_dataset(context, spec, and_finish)


def dataset_of(context: Context, reference: str) -> Dataset:
    """The job's dataset; a built-in is brought in when it is first used."""
    with context.database.read_scope() as session:
        dataset = repository.find_dataset(session, context.job.dataset_id or reference)
    if dataset is None:
        if reference not in BUILTIN_DATASETS:
            raise TrainingError(
                "dataset_gone", f"The dataset {reference} is not there any more", "Add it again"
            )
        dataset = store_dataset(context, IngestSpec(source="builtin", name=reference))
    if context.job.dataset_id is None:
        dataset_id = dataset.id
        context.sink.persist(
            lambda session: repository.store_dataset_id(session, context.fence, dataset_id)
        )
    return dataset


def store_dataset(
    context: Context,
    spec: IngestSpec,
    and_then: Callable[[Session, Dataset], None] = lambda session, dataset: None,
) -> Dataset:
    """Writes a dataset's files and its row; one that is there already is found by its hash."""
    key = f"datasets/{context.fence.job_id}/{context.fence.attempt}"
    source = open_source(spec, context.settings, context.should_stop)
    with context.storage.writing(key, context.fence.owner) as folder:
        record = ingest(
            source,
            dataset_name(spec),
            spec.val_fraction,
            spec.seed,
            folder,
            context.settings,
            context.show_images,
            context.should_stop,
        )
    num_bytes = context.storage.num_bytes(key)

    def register(session: Session) -> Dataset:
        repository.check_fence(session, context.fence)
        dataset = repository.add_dataset(
            session, key=key, num_bytes=num_bytes, **dataset_columns(record)
        )
        if not context.storage.path(dataset.key).exists():
            dataset.key = key
        and_then(session, dataset)
        return dataset

    dataset = context.sink.finish(register)
    if dataset.key != key:
        context.storage.delete(key)
    return dataset


def dataset_columns(record: DatasetRecord) -> dict[str, Any]:
    """The record as the columns of its row."""
    columns = {name: getattr(record, name) for name in ("id", "name", "hash", "classes")}
    return columns | {
        "splits": {name: split.model_dump() for name, split in record.splits.items()},
        "image_size": record.image_size,
        "channel_mean": record.channel_mean,
        "channel_std": record.channel_std,
        "channel_image_std": record.channel_image_std,
        "problems": [problem.model_dump() for problem in record.problems],
    }


def images_of(
    context: Context, dataset: Dataset, image_size: int, data_path: DataPath | Literal["auto"]
) -> Images:
    """The dataset's images at `image_size` pixels: packed, once for each size, unless that would
    take too much disk or `files` are asked for.

    Raises:
        TrainingError: `dataset_changed`, `dataset_damaged`, `disk_full`.
    """
    settings = context.settings
    num_images = sum(split["num_images"] for split in dataset.splits.values())
    is_large = num_images * image_size**2 * 3 > settings.max_packed_bytes
    folder = context.storage.path(dataset.key)
    if data_path == "files" or (data_path == "auto" and is_large):
        return open_files(
            folder,
            image_size,
            settings.cache_path / "verified",
            dataset.hash,
            max_pixels=settings.max_image_pixels,
            num_threads=torch.get_num_threads(),
            progress=context.show_images,
            should_stop=context.should_stop,
        )
    return pack(
        folder,
        image_size,
        packed_path(settings),
        dataset.hash,
        max_pixels=settings.max_image_pixels,
        reserved_bytes=settings.reserved_disk_bytes,
        num_threads=torch.get_num_threads(),
        progress=context.show_images,
        should_stop=context.should_stop,
    )
