"""An attempt at a job, and all it works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sqlalchemy.orm import Session

from shared import lifecycle, repository
from shared.comparison import Outcomes
from shared.database import Database
from shared.lifecycle import Fence
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Job
from skipline.schemas import JobStatus, Progress, Report
from skipline.specs import AnySpec
from worker.engine.events import Control
from worker.sink import DatabaseSink


@dataclass(frozen=True)
class Context:
    """Handed to whatever carries a job out."""

    settings: Settings
    database: Database
    storage: Storage
    fence: Fence
    control: Control
    sink: DatabaseSink
    job: Job
    spec: AnySpec

    def should_stop(self) -> bool:
        """Whether to leave off work that is no training, which alone can be stopped early."""
        return self.control.interrupts()

    def show_images(self, done: int, total: int | None) -> None:
        """Progress of a job whose steps are images."""
        self.sink.progress(Progress(step=done, num_steps=total or done, epoch=1, num_epochs=1))

    def succeed(
        self,
        result: dict[str, Any],
        report: Report | None = None,
        outcomes: Outcomes | None = None,
        stop_reason: str | None = None,
        pictures: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Report, pictures, result and status become visible together."""

        def write(session: Session) -> None:
            for name, png in pictures.items():
                repository.add_picture(session, self.fence, name, png)
            if report is not None:
                packed = None if outcomes is None else outcomes.encode()
                repository.add_report(session, self.fence.job_id, report, packed)
            lifecycle.finish(
                session,
                self.fence,
                JobStatus.succeeded,
                result=result,
                stop_reason=stop_reason,
            )

        self.sink.finish(write)


def remove_unregistered(context: Context) -> None:
    """Deletes what was written for the job and never came to be registered."""
    job_id = context.fence.job_id
    prefixes = (f"jobs/{job_id}", f"datasets/{job_id}")
    keys = [key for prefix in prefixes for key in context.storage.keys(prefix)]
    with context.database.read_scope() as session:
        unnamed = repository.unnamed_keys(session, keys)
    for key in unnamed:
        context.storage.delete(key)
