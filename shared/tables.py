"""The rows. SQLAlchemy 2 style; relations are never loaded behind one's back because there are
none: `shared.repository` joins where it must."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.database import Timestamp

ID = String(64)
READY = "status = 'queued' AND waits_for IS NULL"
"""Of a job that waits for nothing but a worker. `lifecycle.IS_READY` says it in the same words, so
that the database recognizes its index."""


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can name them too."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own declaration
        datetime: Timestamp,
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
    }


class Job(Base):
    """A job and who owns it now. `attempt`, `owner` and `lease_until` are the fence: a worker's
    write lands only while they are its own."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "status", "created_at", "id"),
        # The queue in its order, with what an estimate sums up, and nothing else: a claim stays
        # quick however many jobs have been, and whatever the database believes of their number.
        Index(
            "ix_jobs_ready",
            *("rank", "created_at", "id", "speed_key", "num_images"),
            postgresql_where=text(READY),
            sqlite_where=text(READY),
        ),
        Index(None, "created_at", "id"),
        Index(None, "waits_for"),
        Index(None, "checkpoint_id"),
        Index(None, "speed_key", "finished_at"),
    )

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str | None] = mapped_column(String(200))
    status: Mapped[str] = mapped_column(String(16))
    spec: Mapped[dict[str, Any]]
    rank: Mapped[int] = mapped_column(default=0, server_default="0")
    """The spec's `priority` with its sign turned: the queue is in ascending order of these."""
    device: Mapped[str] = mapped_column(String(16))
    """The spec's `resources.device`, or `any` for a job that computes nothing."""
    num_processes: Mapped[int] = mapped_column(default=1, server_default="1")
    """With `device`, the spec's `resources`: what a worker must have to claim the job."""
    submitter: Mapped[str] = mapped_column(String(64), default="", server_default="")
    """Whose it is: a digest of the key with which it was posted, empty without keys."""
    parent_id: Mapped[str | None] = mapped_column(ID)
    waits_for: Mapped[str | None] = mapped_column(ID)
    """The job that has to succeed first; null once it has."""
    dataset_id: Mapped[str | None] = mapped_column(ID)
    checkpoint_id: Mapped[str | None] = mapped_column(ID)
    """The checkpoint that an evaluation measures, or that a training starts from; it is kept as
    long as the job is not over."""
    runtime: Mapped[dict[str, Any] | None]
    """What `auto` chose at the first attempt; a resumed one keeps it."""

    attempt: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    """Crashed attempts in a row that registered no checkpoint."""
    stop_requested: Mapped[bool] = mapped_column(default=False, server_default="0")
    """Kept through crashes, which the status `stopping` is not."""
    owner: Mapped[str | None] = mapped_column(ID)
    worker_id: Mapped[str | None] = mapped_column(ID)
    host: Mapped[str | None] = mapped_column(String(255))
    lease_until: Mapped[datetime | None]

    speed_key: Mapped[str | None] = mapped_column(String(64))
    """Jobs with the same one go about equally fast."""
    num_images: Mapped[int | None] = mapped_column(BigInteger)
    """That the whole job passes through its network."""
    images_per_second: Mapped[float | None]
    """As last measured."""

    progress: Mapped[dict[str, Any] | None]
    progress_at: Mapped[datetime | None]
    last_point: Mapped[int] = mapped_column(BigInteger, default=0)
    last_event: Mapped[int] = mapped_column(BigInteger, default=0)

    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    stop_reason: Mapped[str | None] = mapped_column(String(16))
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Attempt(Base):
    """One try of one worker at a job, and how it ended."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(ID)
    host: Mapped[str] = mapped_column(String(255))
    gpus: Mapped[list[Any] | None]
    """The numbers of the worker's GPUs that it has to itself; null for none."""
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(16))
    """succeeded, failed, cancelled, paused, released or lost."""
    reason: Mapped[str | None] = mapped_column(String(4000))


class LogPart(Base):
    """A piece of what an attempt's trainer printed, numbered within the attempt."""

    __tablename__ = "log_parts"
    __table_args__ = (
        ForeignKeyConstraint(
            ["job_id", "attempt"], ["attempts.job_id", "attempts.number"], ondelete="CASCADE"
        ),
    )

    job_id: Mapped[str] = mapped_column(ID, primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(Text)


class IdempotencyKey(Base):
    """A key that a client gave with a request, and the job that came of it."""

    __tablename__ = "idempotency_keys"

    submitter: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_hash: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime]


class MetricPoint(Base):
    """A point of a job's series, numbered within the job without a gap by its writer.

    A row named `rewind` tells readers to drop what they have after `step`; those points are gone
    from the table by then.
    """

    __tablename__ = "metric_points"
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "name", "step"),
        Index(
            "ix_metric_points_extremes",
            "job_id",
            "number",
            postgresql_where=text("is_extreme"),
            sqlite_where=text("is_extreme = 1"),
        ),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt: Mapped[int]
    name: Mapped[str] = mapped_column(String(64))
    step: Mapped[int] = mapped_column(BigInteger)
    epoch: Mapped[int]
    value: Mapped[float | None]
    time: Mapped[datetime]
    is_extreme: Mapped[bool] = mapped_column(default=False, server_default="0")
    """The lowest or highest of its series within a stretch of numbers: enough to draw a long
    curve by."""


class Event(Base):
    """What happened to a job, a line each."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt: Mapped[int]
    level: Mapped[str] = mapped_column(String(16))
    type: Mapped[str] = mapped_column(String(64))
    message: Mapped[str] = mapped_column(String(4000))
    data: Mapped[dict[str, Any]]
    time: Mapped[datetime]


class Checkpoint(Base):
    """A complete checkpoint in the storage below `key`. Rows may share one key: `best` and `last`
    of one job, and those of a job and of its retry, which begins with its parent's."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index(None, "job_id", "kind", "step"), Index(None, "key"))

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    kind: Mapped[str] = mapped_column(String(16))
    epoch: Mapped[int]
    step: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[dict[str, Any]]
    last_point: Mapped[int] = mapped_column(BigInteger)
    """The number of the job's last metric point when this was registered: resuming from here
    drops the later ones."""
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    key: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[datetime]


class Alias(Base):
    """A name under which a model is served: `production`, `candidate`, any."""

    __tablename__ = "aliases"
    __table_args__ = (Index(None, "checkpoint_id"), Index(None, "former_id"))

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoints.id"))
    former_id: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.id"))
    """What it stood for before; kept like the present one, so that a move can be taken back."""
    number: Mapped[int]
    """Of its newest move."""
    notes: Mapped[str] = mapped_column(Text)
    tags: Mapped[list[Any]]
    moved_at: Mapped[datetime]


class AliasMove(Base):
    """A line of an alias's history, which outlives the alias and the checkpoints."""

    __tablename__ = "alias_moves"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    checkpoint_id: Mapped[str | None] = mapped_column(String(64))
    """Null: the alias was deleted."""
    job_id: Mapped[str | None] = mapped_column(String(64))
    submitter: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]


class Dataset(Base):
    """An immutable dataset; its images lie in the storage below `key`."""

    __tablename__ = "datasets"
    __table_args__ = (UniqueConstraint("hash"), Index(None, "name", "created_at"))

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    hash: Mapped[str] = mapped_column(String(64))
    classes: Mapped[list[Any]]
    splits: Mapped[dict[str, Any]]
    image_size: Mapped[int]
    channel_mean: Mapped[list[Any]]
    channel_std: Mapped[list[Any]]
    channel_image_std: Mapped[list[Any] | None]
    """The mean over the training images of each one's standard deviation; null in old rows."""
    image_sizes: Mapped[dict[str, Any] | None]
    """How large its images are (`skipline.schemas.ImageSizes`); null in old rows."""
    problems: Mapped[list[Any]]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    key: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[datetime]
    dropped_at: Mapped[datetime | None]
    """When its images were deleted, though models depend on it: the record is all there is."""


class DatasetVersion(Base):
    """A name that a dataset was given: `name:version`. Versions of a name count from 1."""

    __tablename__ = "dataset_versions"
    __table_args__ = (Index(None, "dataset_id"),)

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]


class Upload(Base):
    """A file that a client sends in parts. How much of it has come is the size of the file in the
    storage, at `uploads/<id>`: a second account of it could only be wrong."""

    __tablename__ = "uploads"
    __table_args__ = (Index(None, "job_id"), Index(None, "submitter"))

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    submitter: Mapped[str] = mapped_column(String(64))
    file_name: Mapped[str] = mapped_column(String(200))
    num_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Of the whole file; null while a form is being received that does not say so."""
    created_at: Mapped[datetime]
    touched_at: Mapped[datetime]
    """When bytes came last, or a job was made of it."""
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    """The newest job that reads it."""


class Report(Base):
    """The report of an evaluation, or of the end of a training."""

    __tablename__ = "reports"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    document: Mapped[dict[str, Any]]


class Outcomes(Base):
    """What an evaluation said of each image: `shared.comparison.Outcomes`, encoded."""

    __tablename__ = "outcomes"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    split: Mapped[str] = mapped_column(String(16))
    columns: Mapped[bytes] = mapped_column(LargeBinary)


class Predictions(Base):
    """The answers of a batch prediction, in files below `key` in the storage."""

    __tablename__ = "predictions"
    __table_args__ = (Index(None, "key"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255))


class Summary(Base):
    """The network of a training, layer by layer."""

    __tablename__ = "summaries"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    document: Mapped[dict[str, Any]]


class Picture(Base):
    """A picture that a worker drew, since only it has the images: the file's bytes."""

    __tablename__ = "pictures"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    png: Mapped[bytes] = mapped_column(LargeBinary)


class Worker(Base):
    """A worker process and what it has. It shows itself every few seconds: a row that is old is
    of a worker that is gone."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    num_gpus: Mapped[int]
    num_cores: Mapped[int]
    num_slots: Mapped[int] = mapped_column(default=1, server_default="1")
    devices: Mapped[list[Any] | None]
    """As `skipline.schemas.WorkerDevice`, without the jobs."""
    is_draining: Mapped[bool] = mapped_column(default=False, server_default="0")
    started_at: Mapped[datetime | None]
    seen_at: Mapped[datetime]
