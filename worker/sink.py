"""Where a trainer's reports go: metrics and progress into the database, checkpoints into the
storage. Every write is fenced by the attempt; a thread writes what has gathered, so that training
waits for the database only at a checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from shared import repository
from shared.database import Database
from shared.lifecycle import Fence, Superseded
from shared.repository import NewPoint
from shared.storage import Storage
from shared.vision.bundle import Bundle, write_bundle
from skipline.schemas import Progress
from skipline.specs import CheckpointSpec
from worker.datasets.disk import full_disk_is_reported
from worker.engine.events import Control, TrainingCheckpoint
from worker.engine.resume import RESUME_FILE, save_resume

log = structlog.get_logger(__name__)

FLUSH_SECONDS = 0.5
RETRY_SECONDS = 1.0

T = TypeVar("T")


class DatabaseSink:
    """Implements the engine's `Sink`. A context: its thread writes as long as it is open, and
    `finish` writes the rest.

    Attributes:
        describe: makes the bundle's document for a checkpoint; set before training begins.
        keep: how many checkpoints to keep.
    """

    describe: Callable[[TrainingCheckpoint], Bundle]
    keep: CheckpointSpec

    def __init__(
        self, database: Database, storage: Storage, fence: Fence, control: Control
    ) -> None:
        self._database = database
        self._storage = storage
        self._fence = fence
        self._control = control
        self._gathering = threading.Lock()
        self._points: list[NewPoint] = []
        self._progress: Progress | None = None
        # Held during a transaction, whose outcome the attributes below are about.
        self._writing = threading.Lock()
        self._num_written = 0
        self._progress_written: Progress | None = None
        self._commit_unanswered = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._flush_loop, name="sink", daemon=True)

    def __enter__(self) -> DatabaseSink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    # What the engine calls

    def metrics(self, values: Mapping[str, float], *, step: int, epoch: int) -> None:
        with self._gathering:
            self._points += [NewPoint(name, step, epoch, value) for name, value in values.items()]

    def progress(self, progress: Progress) -> None:
        with self._gathering:
            self._progress = progress

    def event(
        self,
        level: Literal["info", "warning"],
        type: str,
        message: str,
        data: Mapping[str, Any],
    ) -> None:
        def add(session: Session) -> None:
            repository.add_event(session, self._fence, level, type, message, dict(data))

        self.persist(add)

    def save_checkpoint(self, checkpoint: TrainingCheckpoint) -> None:
        """Files first, then the row, together with the metrics that lead up to it: a resumed
        attempt finds either both or none."""
        key = f"jobs/{self._fence.job_id}/{self._fence.attempt}/{checkpoint.step}"
        with (
            full_disk_is_reported("a checkpoint"),
            self._storage.writing(key, self._fence.owner) as folder,
        ):
            write_bundle(folder, self.describe(checkpoint), checkpoint.weights)
            save_resume(folder / RESUME_FILE, checkpoint.resume)
        num_bytes = self._storage.num_bytes(key)

        def register(session: Session) -> list[str]:
            if self._commit_unanswered and key in repository.registered_keys(
                session, self._fence.job_id
            ):
                return []
            self._write_gathered(session)
            repository.register_checkpoint(
                session,
                self._fence,
                kinds=("best", "last") if checkpoint.is_best else ("last",),
                key=key,
                epoch=checkpoint.epoch,
                step=checkpoint.step,
                metrics=checkpoint.metrics,
                num_bytes=num_bytes,
            )
            keep = {"best": self.keep.keep_best, "last": self.keep.keep_last}
            return repository.retire_checkpoints(session, self._fence.job_id, keep)

        for unused in self.persist(register):
            self._storage.delete(unused)

    # Writing

    def flush(self) -> None:
        """Writes what has gathered. Raises `Superseded`."""
        self.persist(self._write_gathered)

    def finish(self, write: Callable[[Session], T]) -> T:
        """Writes what has gathered and, in the same transaction, what `write` does.

        Raises:
            Superseded: the job is no longer this attempt's.
        """

        def both(session: Session) -> T:
            self._write_gathered(session)
            return write(session)

        return self.persist(both)

    def persist(self, write: Callable[[Session], T]) -> T:
        """Runs `write` in a transaction, again and again while the database is away: the
        supervisor ends this process before its lease has run out.

        Raises:
            Superseded: the job is no longer this attempt's.
        """
        with self._writing:
            while True:
                try:
                    with self._database.session_scope() as session:
                        result = write(session)
                except (OperationalError, InterfaceError) as error:
                    log.warning("the database is away", error=type(error).__name__)
                    self._commit_unanswered = True
                    time.sleep(RETRY_SECONDS)
                else:
                    self._forget_written()
                    return result

    def _write_gathered(self, session: Session) -> None:
        with self._gathering:
            points, progress = list(self._points), self._progress
        self._num_written, self._progress_written = len(points), progress
        if not points and progress is None:
            return
        if self._commit_unanswered:
            points = repository.missing_points(session, self._fence, points)
        document = progress.model_dump(mode="json") if progress else None
        repository.write_progress(session, self._fence, document, points)

    def _forget_written(self) -> None:
        with self._gathering:
            del self._points[: self._num_written]
            if self._progress is self._progress_written:
                self._progress = None
        self._num_written, self._progress_written = 0, None
        self._commit_unanswered = False

    def _flush_loop(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except Superseded:
                self._control.request = "cancel"  # There is nobody left to write for.
                return
