"""Datasets: their names and versions, who depends on them, and how they go.

Every query about them, within the caller's transaction. Whoever stores a job for a dataset locks
its row, and so does whoever deletes it: no job is accepted for a dataset that goes at that moment.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, exists, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from shared import lifecycle, repository
from shared.database import db_now
from shared.errors import DatasetGone, DatasetInUse, DatasetNotFound, InvalidInput, UnknownDataset
from shared.tables import Checkpoint, Dataset, DatasetVersion, Job
from skipline import schemas
from skipline.catalog import BUILTIN_DATASETS, DatasetFacts
from skipline.schemas import JobStatus

LABEL = re.compile(r"(?P<name>.+):(?P<version>[1-9][0-9]{0,8})", re.DOTALL)
"""A name with one of its versions."""
MAX_DEPENDENTS = 20
"""That are listed when a dataset cannot be deleted."""


def add_dataset(session: Session, **values: Any) -> tuple[Dataset, str]:
    """Stores a dataset, or finds the one with the same hash: the same images are one dataset,
    however often they are brought in, and what of it was dropped is there again. Also returns its
    label: the next version of its name, unless it is the newest one already."""
    dataset = session.scalar(select(Dataset).where(Dataset.hash == values["hash"]))
    if dataset is None:
        dataset = Dataset(created_at=session.scalar(select(db_now())), dropped_at=None, **values)
        try:
            with session.begin_nested():
                session.add(dataset)
        except IntegrityError:  # Another worker has just brought in the same images.
            found = select(Dataset).where(Dataset.hash == values["hash"])
            dataset = session.scalars(found).one()
    if dataset.dropped_at is not None:
        dataset.dropped_at, dataset.key = None, values["key"]
    if dataset.name not in BUILTIN_DATASETS:
        dataset.name = values["name"]
    return dataset, _give_name(session, dataset, values["name"])


def _give_name(session: Session, dataset: Dataset, name: str) -> str:
    """Makes the dataset the newest version of the name; returns the label."""
    while True:
        newest = session.scalar(_versions(name).limit(1))
        if newest is not None and newest.dataset_id == dataset.id:
            return label_of(newest)
        version = DatasetVersion(
            name=name,
            version=newest.version + 1 if newest else 1,
            dataset_id=dataset.id,
            created_at=session.scalars(select(db_now())).one(),
        )
        try:
            with session.begin_nested():
                session.add(version)
            return label_of(version)
        except IntegrityError:  # Another dataset has just become that version.
            session.expire_all()


def _versions(name: str) -> Any:
    """Of a name, the newest first."""
    named = select(DatasetVersion).where(DatasetVersion.name == name)
    return named.order_by(DatasetVersion.version.desc())


def label_of(version: DatasetVersion) -> str:
    """`name:version`."""
    return f"{version.name}:{version.version}"


def find_dataset(session: Session, reference: str, *, lock: bool = False) -> Dataset | None:
    """The dataset that a client means: by its id, by a name with a version, or by a name, which
    stands for its newest version. `lock` keeps it from being deleted in this transaction."""
    dataset = session.get(Dataset, reference)
    if dataset is None:
        version = session.scalar(_versions(reference).limit(1))
        if version is None and (parts := LABEL.fullmatch(reference)):
            key = (parts["name"], int(parts["version"]))
            version = session.get(DatasetVersion, key)
        dataset = session.get(Dataset, version.dataset_id) if version else None
    if dataset is not None and lock:
        locked = select(Dataset).where(Dataset.id == dataset.id).with_for_update(read=True)
        return session.scalar(locked.execution_options(populate_existing=True))
    return dataset


def get_dataset(session: Session, reference: str) -> Dataset:
    """As `find_dataset`. Raises `DatasetNotFound`."""
    dataset = find_dataset(session, reference)
    if dataset is None:
        raise DatasetNotFound("There is no stored dataset of this id, label or name")
    return dataset


def get_split(session: Session, reference: str | None, split: str | None) -> tuple[Dataset, str]:
    """The images that models are judged by: a dataset and one of its splits, by default `test`,
    else `val`.

    Raises:
        DatasetNotFound: as `get_dataset`.
        InvalidInput: there is no such split, or no dataset is named.
    """
    if reference is None:
        message = "What the model was trained on is unknown: name a dataset to judge it by"
        raise InvalidInput(message, errors=[{"loc": "dataset", "message": message}])
    dataset = get_dataset(session, reference)
    split = split or ("test" if "test" in dataset.splits else "val")
    # A training may have held images out itself: then `val` is a split of its report alone.
    if split not in dataset.splits and split != "val":
        message = f"{dataset.name} has {', '.join(dataset.splits)}"
        raise InvalidInput(message, errors=[{"loc": "split", "message": message}])
    return dataset, split


def list_datasets(
    session: Session, *, limit: int, after: str | None
) -> tuple[list[Dataset], str | None]:
    """Datasets, newest first, with the cursor of the next page."""
    query = select(Dataset).order_by(Dataset.created_at.desc(), Dataset.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(repository.before_cursor(session, Dataset, after))
    return repository.cut_page(list(session.scalars(query)), limit)


def dataset_facts(
    session: Session, reference: str, *, lock: bool = False
) -> tuple[DatasetFacts, str | None]:
    """What is known of a dataset that a spec names, with its id; a built-in that was not used
    yet is known from the catalog and has none. `lock`: for a job that will read it.

    Raises:
        UnknownDataset: neither stored nor built in.
        DatasetGone: with `lock`, for one whose images were deleted.
    """
    dataset = find_dataset(session, reference, lock=lock)
    if dataset is not None and dataset.dropped_at is not None and reference in BUILTIN_DATASETS:
        return BUILTIN_DATASETS[reference], None  # It is brought in anew.
    if dataset is not None:
        if lock and dataset.dropped_at is not None:
            raise DatasetGone(
                f"The images of {reference[:200]} were deleted: bring the same ones in again, and "
                "it is there as it was"
            )
        facts = DatasetFacts(
            name=dataset.name,
            classes=tuple(dataset.classes),
            image_size=dataset.image_size,
            splits={name: split["num_images"] for name, split in dataset.splits.items()},
        )
        return facts, dataset.id
    if reference in BUILTIN_DATASETS:
        return BUILTIN_DATASETS[reference], None
    builtin = ", ".join(BUILTIN_DATASETS)
    raise UnknownDataset(
        f"There is no dataset {reference!r}. Add it with POST /datasets, or use one of: {builtin}",
        errors=[{"loc": "dataset", "message": "Neither a stored dataset nor a built-in"}],
    )


def known_hashes(session: Session) -> set[str]:
    """Of the datasets whose images are there."""
    return set(session.scalars(select(Dataset.hash).where(Dataset.dropped_at.is_(None))))


# --------------------------------------------------------------------------------------- deletion


def delete_dataset(session: Session, reference: str, *, force: bool) -> list[str]:
    """Deletes a dataset with all its names; with `force` only its images, where models or jobs
    depend on it, so that these still know what they were made of. Returns the storage keys that no
    row names any more: their files can go.

    Raises:
        DatasetNotFound: there is no such dataset.
        DatasetInUse: a job reads it; or, without `force`, models or jobs depend on it.
    """
    dataset_id = get_dataset(session, reference).id
    locked = select(Dataset).where(Dataset.id == dataset_id).with_for_update()
    dataset = session.scalar(locked.execution_options(populate_existing=True))
    if dataset is None:
        raise DatasetNotFound("The dataset was deleted at this moment")
    if readers := _dependents(session, _reads(dataset_id, lifecycle.OWNED), "reads it now"):
        raise _in_use("A job reads the dataset: cancel it first, or wait for its end", readers)
    depending = [
        *_dependents(session, _reads(dataset_id, [JobStatus.queued, JobStatus.paused]), "waits"),
        *_dependents(session, _learnt_from(dataset_id), "made a model of it"),
    ]
    if depending and not force:
        raise _in_use(
            "Jobs or models depend on the dataset. ?force=true deletes its images and keeps the "
            "record; what waits will fail",
            depending,
        )
    key = dataset.key
    if depending:
        dataset.dropped_at = session.scalars(select(db_now())).one()
        dataset.key = f"dropped/{dataset.id}"
    else:
        session.delete(dataset)
    session.flush()
    return repository.unnamed_keys(session, [key])


def _reads(dataset_id: str, statuses: Sequence[JobStatus] | Any) -> ColumnElement[bool]:
    return (Job.dataset_id == dataset_id) & Job.status.in_(statuses)


def _learnt_from(dataset_id: str) -> ColumnElement[bool]:
    has_model = exists().where(Checkpoint.job_id == Job.id)
    return (Job.dataset_id == dataset_id) & has_model


def _dependents(
    session: Session, condition: ColumnElement[bool], what: str
) -> list[dict[str, str]]:
    rows = session.execute(select(Job.id, Job.kind).where(condition).order_by(Job.created_at))
    return [
        {"loc": f"jobs/{job_id}", "message": f"a job ({kind}) that {what}"} for job_id, kind in rows
    ]


def _in_use(detail: str, dependents: list[dict[str, str]]) -> DatasetInUse:
    rest = len(dependents) - MAX_DEPENDENTS
    if rest > 0:
        detail += f". {rest} more than these depend on it"
    return DatasetInUse(detail, errors=dependents[:MAX_DEPENDENTS])


# -------------------------------------------------------------------------------------- documents


def dataset_documents(session: Session, rows: Sequence[Dataset]) -> list[schemas.Dataset]:
    """The datasets as clients see them."""
    query = (
        select(DatasetVersion)
        .where(DatasetVersion.dataset_id.in_([row.id for row in rows]))
        .order_by(DatasetVersion.created_at.desc(), DatasetVersion.version.desc())
    )
    labels: dict[str, list[str]] = defaultdict(list)
    for version in session.scalars(query):
        labels[version.dataset_id].append(label_of(version))
    return [_document(row, labels[row.id]) for row in rows]


def _document(row: Dataset, labels: list[str]) -> schemas.Dataset:
    return schemas.Dataset(
        id=row.id,
        name=row.name,
        hash=row.hash,
        num_classes=len(row.classes),
        classes=row.classes,
        splits={name: schemas.SplitInfo(**split) for name, split in row.splits.items()},
        image_size=row.image_size,
        channel_mean=row.channel_mean,
        channel_std=row.channel_std,
        channel_image_std=row.channel_image_std,
        image_sizes=schemas.ImageSizes(**row.image_sizes) if row.image_sizes else None,
        problems=[schemas.Problem(**problem) for problem in row.problems],
        num_bytes=row.num_bytes,
        labels=labels,
        created_at=row.created_at,
        dropped_at=row.dropped_at,
    )
