"""Clears away what nobody needs any more: files that no row names, uploads that expired, old
Idempotency-Keys, and what else it is given to do on this machine.

Several housekeepers at a time are harmless. Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import structlog
from sqlalchemy import select

from shared import lifecycle, repository, uploads
from shared.database import Database
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Job
from shared.timers import Timer

log = structlog.get_logger(__name__)

KEYS = ("jobs/*/*/*", "datasets/*/*")
"""Where folders lie that a row may name: of each attempt at a job the checkpoints, or the
dataset."""
PARENTS = ("jobs/*/*", "jobs/*", "datasets/*")
MIN_AGE_SECONDS = 3600.0
"""What was written last so long ago will not be registered any more."""
REMEMBERED_SECONDS = 24 * 3600.0
"""How long an Idempotency-Key holds."""


class Housekeeper:
    """Call `tidy` now and then, or `start` a thread that does.

    Args:
        also: what else there is to do each time.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: Storage,
        also: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._tasks = (self._remove_unnamed, self._tidy_uploads, self._forget_requests, *also)
        self._timer = Timer("housekeeper", settings.tidy_seconds, self.tidy)

    def tidy(self) -> None:
        """One round. What fails is tried again in the next one."""
        for task in self._tasks:
            try:
                task()
            except Exception as error:
                log.warning("tidying failed", error=type(error).__name__)

    def _remove_unnamed(self) -> None:
        """Deletes the folders that no row names, but for new ones, and those of a job that is
        worked at, which its next attempt removes."""
        # The folders first: what is registered from here on is found to be named.
        keys = [str(path.relative_to(self._storage.root)) for path in self._folders(KEYS)]
        with self._database.read_scope() as session:
            unnamed = repository.unnamed_keys(session, keys)
            owned = set(session.scalars(select(Job.id).where(Job.status.in_(lifecycle.OWNED))))
        doomed = [key for key in unnamed if self._is_left(self._storage.root / key, owned)]
        if doomed and len(unnamed) == len(keys):
            # More likely the files of another database than leftovers and nothing else.
            log.warning("no folder in the storage is known: none is deleted", num_folders=len(keys))
            return
        for key in doomed:
            self._storage.delete(key)
            log.info("unnamed folder deleted", key=key)
        for path in self._folders(PARENTS):
            if self._is_left(path, owned):
                with contextlib.suppress(OSError):  # It is not empty.
                    path.rmdir()

    def _folders(self, patterns: Iterable[str]) -> Iterator[Path]:
        for pattern in patterns:
            yield from (path for path in self._storage.root.glob(pattern) if path.is_dir())

    def _is_left(self, path: Path, owned: Collection[str]) -> bool:
        """Whether nobody writes there: it is old, and its job is not worked at."""
        job_id = path.relative_to(self._storage.root).parts[1]
        try:
            age_seconds = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return False
        return job_id not in owned and age_seconds > MIN_AGE_SECONDS

    def _tidy_uploads(self) -> None:
        uploads.tidy(self._settings, self._database, self._storage)

    def _forget_requests(self) -> None:
        with self._database.session_scope() as session:
            repository.forget_requests(session, REMEMBERED_SECONDS)

    def start(self) -> None:
        """Tidies every `tidy_seconds` until `stop`."""
        self._timer.start()

    def stop(self) -> None:
        self._timer.stop()
