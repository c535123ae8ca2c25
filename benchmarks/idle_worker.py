"""A worker as it is, but for its executor: every job succeeds at once, in the worker's process.

    python -m benchmarks.idle_worker

Settings come from the environment, as a real worker's do.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence

from shared import lifecycle, logs
from shared.database import Database
from shared.lifecycle import Fence, Superseded
from shared.settings import Settings, get_settings
from skipline.schemas import JobStatus
from worker.app import run


class Idle:
    """Does nothing with a job but end it; see `worker.slots.Executor`."""

    def __init__(self, settings: Settings, database: Database, num_slots: int) -> None:
        self._database = database

    def prepare(self) -> str:
        return f"{os.getpid()}.{uuid.uuid4().hex}"

    def put_back(self, owner: str, *, may_own: bool = False) -> None:
        """There is nothing to keep."""

    def run(self, fence: Fence, gpus: Sequence[int], claimed_at: float) -> None:
        try:
            with self._database.session_scope() as session:
                lifecycle.finish(session, fence, JobStatus.succeeded, result={})
        except Superseded:
            return

    def warm_up(self) -> None:
        """Always ready."""

    def drain(self) -> None:
        """Jobs end before they could be asked to."""

    def close(self) -> None:
        """There is nothing to let go of."""


def main() -> None:
    settings = get_settings()
    logs.configure(settings)
    run(settings, 1, Idle)


if __name__ == "__main__":
    main()
