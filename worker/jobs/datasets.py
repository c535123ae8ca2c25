"""Bringing a dataset in, finding it again, and its images as training takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from sqlalchemy.orm import Session

from shared import datasets, lifecycle, repository, uploads
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
    """Ingests a dataset. Of an upload nothing is left then; one whose ingest failed stays until it
    expires, for another try."""

    def and_finish(session: Session, dataset: Dataset, label: str) -> None:
        problems = [{key: p[key] for key in ("code", "level", "count")} for p in dataset.problems]
        result = {
            "dataset_id": dataset.id,
            "name": dataset.name,
            "label": label,
            "num_images": sum(split["num_images"] for split in dataset.splits.values()),
            "num_problems": len(problems),
            "problems": problems,
        }
        if spec.upload_id is not None:
            uploads.forget(session, spec.upload_id)
        lifecycle.finish(session, context.fence, JobStatus.succeeded, result=result)

    store_dataset(context, spec, and_finish)
    if spec.upload_id is not None:
        uploads.remove_files(context.storage.root, spec.upload_id)


def dataset_of(context: Context, reference: str) -> Dataset:
    """The job's dataset, which its row names from now on; a built-in is brought in when it is first
    used. What is odd about it is told once, as an event of the job.

    Raises:
        TrainingError: `dataset_gone`.
    """

    def find(session: Session) -> Dataset | None:
        reference_ = context.job.dataset_id or reference
        dataset = datasets.find_dataset(session, reference_, lock=True)
        if dataset is None or dataset.dropped_at is not None:
            return None
        repository.store_dataset_id(session, context.fence, dataset.id)
        return dataset

    dataset = context.sink.persist(find)
    if dataset is None:
        if reference not in BUILTIN_DATASETS:
            raise TrainingError(
                "dataset_gone",
                f"The images of the dataset {reference} were deleted",
                "Bring them in again, then retry",
            )
        store_dataset(context, IngestSpec(source="builtin", name=reference))
        dataset = context.sink.persist(find)
        assert dataset is not None, "it was stored just now"
    if context.fence.attempt == 1 and dataset.problems:
        tell_problems(context, dataset)
    return dataset


def tell_problems(context: Context, dataset: Dataset) -> None:
    """Repeats what was found when the dataset was brought in."""
    counts = ", ".join(f"{problem['code']} {problem['count']:,}" for problem in dataset.problems)
    found = [{key: p[key] for key in ("code", "level", "count")} for p in dataset.problems]
    context.sink.event(
        "warning",
        "dataset_problems",
        f"Odd about {dataset.name}: {counts}. skipline datasets show {dataset.id} says where",
        {"dataset_id": dataset.id, "problems": found},
    )


def store_dataset(
    context: Context,
    spec: IngestSpec,
    and_then: Callable[[Session, Dataset, str], None] = lambda session, dataset, label: None,
) -> None:
    """Writes a dataset's files and its row, and gives it the spec's name; one that is there already
    is found by its hash."""
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

    def register(session: Session) -> bool:
        repository.check_fence(session, context.fence)
        dataset, label = datasets.add_dataset(
            session, key=key, num_bytes=num_bytes, **dataset_columns(record)
        )
        if not context.storage.path(dataset.key).exists():
            dataset.key = key
        and_then(session, dataset, label)
        return dataset.key == key

    if not context.sink.finish(register):
        context.storage.delete(key)


def dataset_columns(record: DatasetRecord) -> dict[str, Any]:
    """The record as the columns of its row."""
    columns = {name: getattr(record, name) for name in ("id", "name", "hash", "classes")}
    return columns | {
        "splits": {name: split.model_dump() for name, split in record.splits.items()},
        "image_size": record.image_size,
        "channel_mean": record.channel_mean,
        "channel_std": record.channel_std,
        "channel_image_std": record.channel_image_std,
        "image_sizes": record.image_sizes.model_dump(),
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
