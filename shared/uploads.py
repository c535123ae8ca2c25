"""Files that clients send in parts, until a job has read them.

A file lies in the storage at `uploads/<id>/data`. How much of it has come is its size, and nothing
else says so; whoever writes to it holds a lock on it, which the system frees with the process. The
row says whose it is, how long it will be, and when it was last touched.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from shared import repository
from shared.archive_kinds import HEAD_BYTES, KINDS, archive_kind
from shared.database import Database, db_now
from shared.errors import (
    BadArchive,
    BadModelFile,
    BodyTooLarge,
    DiskFull,
    InvalidInput,
    TooManyUploads,
    UploadBusy,
    UploadIncomplete,
    UploadInUse,
    UploadNotFound,
)
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Job, Upload
from skipline import schemas
from skipline.schemas import JobStatus

FOLDER = "uploads"
_DATA = "data"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def data_path(root: Path, upload_id: str) -> Path:
    """Where the bytes of an upload lie below the storage's root."""
    return root / FOLDER / upload_id / _DATA


def offset_of(root: Path, upload_id: str) -> int:
    """How many bytes have come. Raises `UploadNotFound` when the file is gone."""
    try:
        return data_path(root, upload_id).stat().st_size
    except FileNotFoundError:
        raise _not_found() from None


# ------------------------------------------------------------------------------------------- rows


def create(
    session: Session,
    settings: Settings,
    root: Path,
    *,
    submitter: str,
    file_name: str,
    num_bytes: int | None,
) -> Upload:
    """Makes room for a file of `num_bytes`, or of a length that is not told beforehand.

    Raises:
        BodyTooLarge: it would be longer than uploads may be.
        TooManyUploads: the submitter has too many that no job has read.
        DiskFull: the disk would not hold it.
    """
    if num_bytes is not None and num_bytes > settings.max_upload_bytes:
        raise BodyTooLarge(f"At most {settings.max_upload_bytes:,} bytes are taken here")
    count = select(func.count()).select_from(Upload).where(Upload.submitter == submitter)
    if (session.scalar(count) or 0) >= settings.max_uploads_per_key:
        raise TooManyUploads(
            f"{settings.max_uploads_per_key} uploads are there already: make datasets of them, or "
            "delete some"
        )
    check_free_disk(settings, root, num_bytes or 0)
    now = session.scalars(select(db_now())).one()
    upload = Upload(
        id=repository.new_id(),
        submitter=submitter,
        file_name=file_name,
        num_bytes=num_bytes,
        created_at=now,
        touched_at=now,
        job_id=None,
    )
    session.add(upload)
    session.flush()
    path = data_path(root, upload.id)
    path.parent.mkdir(parents=True)
    path.touch()
    return upload


def check_free_disk(settings: Settings, root: Path, num_bytes: int) -> None:
    """Raises `DiskFull` where `num_bytes` more would leave too little."""
    free = shutil.disk_usage(root).free
    if num_bytes + settings.reserved_disk_bytes > free:
        raise _disk_full()


def _disk_full() -> DiskFull:
    return DiskFull("There is no room for the file: free some disk on the server, then go on")


def get(session: Session, upload_id: str, submitter: str, *, lock: bool = False) -> Upload:
    """The submitter's upload. Raises `UploadNotFound`."""
    query = select(Upload).where(Upload.id == upload_id, Upload.submitter == submitter)
    upload = session.scalar(query.with_for_update() if lock else query)
    if upload is None:
        raise _not_found()
    return upload


def _not_found() -> UploadNotFound:
    return UploadNotFound("There is no upload of this id; one that is not used expires")


def list_uploads(
    session: Session, submitter: str, *, limit: int, after: str | None
) -> tuple[list[Upload], str | None]:
    """The submitter's uploads, newest first, with the cursor of the next page."""
    query = (
        select(Upload)
        .where(Upload.submitter == submitter)
        .order_by(Upload.created_at.desc(), Upload.id.desc())
        .limit(limit + 1)
    )
    if after is not None:
        query = query.where(repository.before_cursor(session, Upload, after))
    return repository.cut_page(list(session.scalars(query)), limit)


def touch(session: Session, upload_id: str) -> datetime:
    """Notes that it was written to; returns when. Raises `UploadNotFound`."""
    upload = session.get(Upload, upload_id)
    if upload is None:
        raise _not_found()
    upload.touched_at = session.scalars(select(db_now())).one()
    return upload.touched_at


def hold_for_job(
    session: Session,
    root: Path,
    upload_id: str,
    submitter: str,
    check: Callable[[Path], None] | None = None,
) -> Upload:
    """Locks a complete upload, for the job that is about to be stored to read it. `check` looks at
    its beginning: by default `check_archive`.

    Raises:
        InvalidInput: there is no such upload.
        UploadIncomplete: bytes are missing.
        BadArchive: it is no archive by its first bytes; or what `check` raises.
    """
    try:
        upload = get(session, upload_id, submitter, lock=True)
        offset = offset_of(root, upload_id)
    except UploadNotFound:
        message = "There is no such upload (one that is not used expires): send the file again"
        raise InvalidInput(message, errors=[{"loc": "upload_id", "message": message}]) from None
    if upload.num_bytes != offset:
        raise UploadIncomplete(
            f"{offset} of {upload.num_bytes} bytes have come: send the rest with PATCH"
        )
    (check or check_archive)(data_path(root, upload_id))
    return upload


def pin(session: Session, upload: Upload, job_id: str) -> None:
    """Keeps the upload for the job."""
    upload.job_id = job_id
    upload.touched_at = session.scalars(select(db_now())).one()
    session.flush()


def check_archive(path: Path) -> None:
    """Raises `BadArchive` for what no dataset can be read from, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if archive_kind(head) is None:
        what = "neither" if head else "empty, and no archive:"
        raise BadArchive(f"The file is {what} {KINDS}: pack the images as one of these")


def check_model_file(path: Path) -> None:
    """Raises `BadModelFile` for what is no safetensors by its first bytes: the length of a JSON
    object, and the object."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] != b"{" or int.from_bytes(head[:8], "little") > path.stat().st_size:
        raise BadModelFile("The file is no safetensors: export the model with format=safetensors")


def document(upload: Upload, settings: Settings, root: Path) -> schemas.Upload:
    """The upload as clients see it."""
    offset = offset_of(root, upload.id)
    return schemas.Upload(
        id=upload.id,
        file_name=upload.file_name,
        num_bytes=offset if upload.num_bytes is None else upload.num_bytes,
        offset=offset,
        created_at=upload.created_at,
        expires_at=expires_at(upload.touched_at, settings),
        job_id=upload.job_id,
    )


def expires_at(touched_at: datetime, settings: Settings) -> datetime:
    """When an upload is deleted that is not touched any more."""
    return touched_at + timedelta(seconds=settings.upload_expiry_seconds)


# ------------------------------------------------------------------------------------------ bytes


class Writer:
    """Appends to an upload, which nobody else does meanwhile. Blocks: use it in a thread.

    Args:
        end: the length that it may not grow beyond.
    """

    def __init__(self, root: Path, upload_id: str, end: int) -> None:
        """Raises `UploadNotFound`, `UploadBusy`."""
        try:
            self._descriptor = os.open(data_path(root, upload_id), os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            raise _not_found() from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise UploadBusy("Another request writes to the upload: wait for its end") from None
        self.offset = os.fstat(self._descriptor).st_size
        self._end = end

    def write(self, data: bytes) -> None:
        """Raises `BodyTooLarge`, with nothing of `data` written; `DiskFull`, with perhaps some."""
        if self.offset + len(data) > self._end:
            raise BodyTooLarge(f"The upload is announced, or allowed, to have {self._end:,} bytes")
        rest = memoryview(data)
        try:
            while rest:
                written = os.write(self._descriptor, rest)
                self.offset += written
                rest = rest[written:]
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise _disk_full() from error
            raise

    def close(self) -> None:
        """Brings all to the disk and lets others write."""
        try:
            with suppress(OSError):  # What is not on the disk is sent again.
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


# --------------------------------------------------------------------------------------- deletion

_UNUSED = or_(
    Upload.job_id.is_(None),
    select(Job.status)
    .where(Job.id == Upload.job_id)
    .scalar_subquery()
    .in_([status for status in JobStatus if status.is_terminal]),
)


def delete(session: Session, upload_id: str, submitter: str) -> None:
    """Deletes the row; the caller removes the files once that is committed.

    Raises:
        UploadNotFound: there is none.
        UploadInUse: a job will read it, or does.
    """
    upload = get(session, upload_id, submitter, lock=True)
    if session.scalar(select(Upload.id).where(Upload.id == upload_id, _UNUSED)) is None:
        raise UploadInUse(f"The job {upload.job_id} reads it: cancel that one first")
    session.delete(upload)
    session.flush()


def forget(session: Session, upload_id: str) -> None:
    """Deletes the row of an upload that a job has read to its end."""
    upload = session.get(Upload, upload_id)
    if upload is not None:
        session.delete(upload)
        session.flush()


def remove_files(root: Path, upload_id: str) -> None:
    """Removes what lies below the upload's folder, if anything does."""
    shutil.rmtree(root / FOLDER / upload_id, ignore_errors=True)


def tidy(settings: Settings, database: Database, storage: Storage) -> None:
    """Deletes the uploads that nobody took up again for too long, or that a job has read, and files
    of that age without a row. None that is written to at this moment, or that a job will read."""
    long_ago = db_now(-settings.upload_expiry_seconds)
    has_been_read = (
        select(Job.status).where(Job.id == Upload.job_id).scalar_subquery() == JobStatus.succeeded
    )
    with database.read_scope() as session:
        is_over: ColumnElement[bool] = _UNUSED & ((Upload.touched_at < long_ago) | has_been_read)
        doomed = list(session.scalars(select(Upload.id).where(is_over)))
    for upload_id in doomed:
        with _unwritten(storage.root, upload_id) as is_free:
            if not is_free:
                continue
            with database.session_scope() as session:
                query = select(Upload).where(Upload.id == upload_id, is_over).with_for_update()
                upload = session.scalar(query)
                if upload is None:
                    continue
                session.delete(upload)
            remove_files(storage.root, upload_id)
    for folder in (storage.root / FOLDER).glob("*"):
        if _is_older([folder, folder / _DATA], settings.upload_expiry_seconds):
            with database.read_scope() as session:
                is_known = session.get(Upload, folder.name) is not None
            if not is_known:
                remove_files(storage.root, folder.name)


@contextmanager
def _unwritten(root: Path, upload_id: str) -> Iterator[bool]:
    """Keeps others from writing to it; False when one does. True when the file is gone already."""
    try:
        writer = Writer(root, upload_id, 0)
    except UploadBusy:
        yield False
    except UploadNotFound:
        yield True
    else:
        with writer:
            yield True


def _is_older(paths: Sequence[Path], seconds: float) -> bool:
    """Whether none of those that exist has changed for so long."""
    changed = 0.0
    for path in paths:
        with suppress(FileNotFoundError):
            changed = max(changed, path.stat().st_mtime)
    return time.time() - changed > seconds
