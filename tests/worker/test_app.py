"""How a worker's main process leaves: a real one, with an executor that needs a moment to give its
jobs back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from sqlalchemy import select

from shared.database import Database
from shared.settings import Settings
from shared.tables import Worker
from skipline.schemas import JobStatus
from tests.e2e.conftest import wait_for
from tests.shared.jobs import add_job, get, status

GRACE_SECONDS = 10.0
WORKER = textwrap.dedent(
    """
    import threading, time, uuid
    from shared import lifecycle
    from shared.settings import get_settings
    from worker.app import run

    class Slow:
        def __init__(self, settings, database, num_slots):
            self.database, self.draining = database, threading.Event()
        def prepare(self):
            return uuid.uuid4().hex
        def put_back(self, owner, *, may_own=False): ...
        def run(self, fence, gpus, claimed_at):
            self.draining.wait()
            time.sleep(1.5)
            with self.database.session_scope() as session:
                lifecycle.release(session, fence, "leaving")
        def warm_up(self): ...
        def drain(self):
            self.draining.set()
        def close(self): ...

    run(get_settings(), 2, Slow)
    """
)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_worker_that_is_asked_to_leave_again_and_again_still_gives_its_jobs_back(
    settings: Settings, database: Database
) -> None:
    jobs = [add_job(database) for _ in range(3)]
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env={
            **os.environ,
            "SKIPLINE_HOME": str(settings.home_path),
            "SKIPLINE_DATABASE_URL": settings.database,
            "SKIPLINE_GRACE_SECONDS": str(GRACE_SECONDS),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for job in jobs[:2]:
            wait_for(lambda job=job: status(database, job) is JobStatus.running, "run", 30)
        began = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
            wait_for(lambda: is_draining(database), "worker that drains", 20)
        assert process.wait(30) == 0
        assert time.monotonic() - began < GRACE_SECONDS
    finally:
        process.kill()
        process.wait()
    assert [status(database, job) for job in jobs] == [JobStatus.queued] * 3
    assert [get(database, job).attempt for job in jobs] == [1, 1, 0]
    with database.read_scope() as session:
        assert session.scalars(select(Worker)).all() == []


def is_draining(database: Database) -> bool:
    with database.read_scope() as session:
        return bool(session.scalar(select(Worker.is_draining)))
