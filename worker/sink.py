"""Where a trainer's reports go: metrics and progress into the database, checkpoints into the
storage. Every write is fenced by the attempt; a thread writes what has gathered, so that training
waits for the database only at a checkpoint."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import structlog
import torch
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
from worker.datasets.disk import check_free_disk, full_disk_is_reported
from worker.engine.events import Control, TrainingCheckpoint
from worker.engine.resume import RESUME_FILE, save_resume

log = structlog.get_logger(__name__)

FLUSH_SECONDS = 0.5
RETRY_SECONDS = 1.0

T = TypeVar("T")


class DatabaseSink:
    """Implements the engine's `Sink`. A context: its thread writes as long as it is open, and
    `finish` writes the rest.

    Args:
        on_written: called after each transaction that wrote something; never raises.

    Attributes, of checkpoints, set before training begins:
        describe: makes a bundle's document.
        keep: how many to keep.
        reserved_disk_bytes: that they leave free.
    """

    describe: Callable[[TrainingCheckpoint], Bundle]
    keep: CheckpointSpec
    reserved_disk_bytes: int

    def __init__(
        self,
        database: Database,
        storage: Storage,
        fence: Fence,
        control: Control,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._storage = storage
        self._fence = fence
        self._control = control
        self._on_written = on_written
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
        attempt finds either both or none.

        Raises:
            Superseded: the job is no longer this attempt's.
            TrainingError: `disk_full`; nothing of it is left.
        """
        key = self._new_key(checkpoint.step)
        needed = num_tensor_bytes(checkpoint.weights) + num_tensor_bytes(checkpoint.resume)
        with full_disk_is_reported("a checkpoint"):
            check_free_disk(self._storage.root, needed, self.reserved_disk_bytes, "a checkpoint")
            with self._storage.writing(key, self._fence.owner) as folder:
                write_bundle(folder, self.describe(checkpoint), checkpoint.weights)
                save_resume(folder / RESUME_FILE, checkpoint.resume)
        num_bytes = self._storage.num_bytes(key)
        kinds: list[Literal["best", "last", "epoch"]] = ["last"]
        if checkpoint.is_best:
            kinds.append("best")
        if checkpoint.is_kept:
            kinds.append("epoch")

        def register(session: Session) -> list[str]:
            if self._commit_unanswered and not repository.unnamed_keys(session, [key]):
                return []  # The commit that was not answered had landed.
            self._write_gathered(session)
            repository.register_checkpoint(
                session,
                self._fence,
                kinds=kinds,
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

    def _new_key(self, step: int) -> str:
        key = f"jobs/{self._fence.job_id}/{self._fence.attempt}/{step}"
        # Ranks that began again within the attempt may come by the same step once more.
        return f"{key}-{uuid.uuid4().hex[:8]}" if self._storage.path(key).exists() else key

    # Writing

    def flush(self) -> None:
        """Writes what has gathered, if anything has. Raises `Superseded`."""
        with self._gathering:
            is_empty = not self._points and self._progress is None
        if not is_empty:
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
                    break
        self._on_written()
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


def num_tensor_bytes(state: object) -> int:
    """The size of all tensors in nested mappings and sequences. One that is in there twice counts
    twice."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(num_tensor_bytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(num_tensor_bytes, state))
    return 0
