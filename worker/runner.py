"""The child process: runs one attempt at one job, and ends.

It imports torch at once, then waits for its job on standard input, so that a warm one starts
training within a moment. What it does with a job is in `worker.jobs`; here is how an attempt ends.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from contextlib import closing
from functools import partial
from typing import Any, cast, get_args

import structlog

from shared import lifecycle, lifeline, logs, repository
from shared.database import Database
from shared.errors import AppError, TrainingError
from shared.hints import Hints
from shared.lifecycle import Fence, Superseded
from shared.settings import Settings, get_settings
from shared.storage import Storage
from skipline.schemas import JobStatus
from skipline.specs import load_spec
from worker import jobs
from worker.datasets.locks import Interrupted as DatasetInterrupted
from worker.devices import see_only
from worker.engine.events import Cancelled, Control, Released, Request
from worker.sink import DatabaseSink

log = structlog.get_logger(__name__)

ORPHANED = 70
"""Exit code of a trainer whose supervisor is gone: its job is given to another attempt."""


def main() -> None:
    """Waits for the job, runs it. Ends at once, wherever it is, when the supervisor is gone; and
    at once when all is written, since to take torch apart keeps a slot for seconds."""
    settings = get_settings()
    logs.configure(settings)
    control = Control()
    first: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def on_line(line: str) -> None:
        if line in get_args(Request):
            control.request = cast(Request, line)
        else:
            first.put(json.loads(line))

    lifeline.watch(sys.stdin.fileno(), on_line, lambda: os._exit(ORPHANED))
    document = first.get()
    see_only(document.pop("gpus"))
    fence = Fence(**document)
    database = Database(settings.database)
    run_attempt(settings, database, Storage(settings.artifacts_path), fence, control)
    database.dispose()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def run_attempt(
    settings: Settings, database: Database, storage: Storage, fence: Fence, control: Control
) -> None:
    """Runs the job and writes how it ended, unless another attempt owns it by now. An exception
    that nobody expected passes through: the supervisor counts it as a crash."""
    hints = Hints(settings)
    on_written = partial(hints.publish, fence.job_id)
    with closing(hints), DatabaseSink(database, storage, fence, control, on_written) as sink:
        try:
            # Tried again while the database is away: it is no crash that the job began then.
            job = sink.persist(lambda session: repository.get_job(session, fence.job_id))
            context = jobs.Context(
                settings, database, storage, fence, control, sink, job, load_spec(job.spec)
            )
            try:
                jobs.run(context)
            except DatasetInterrupted:
                control.check()
                raise
        except Superseded:
            log.warning("the job was given to another worker", job_id=fence.job_id)
        except Cancelled:
            end(sink, fence, JobStatus.cancelled)
        except Released:
            reason = "The trainer left when it was asked to"
            sink.finish(lambda session: lifecycle.release(session, fence, reason))
        except TrainingError as error:
            fail(sink, fence, error)
        except AppError as error:
            fail(sink, fence, TrainingError(error.code, error.detail, error.title))


def fail(sink: DatabaseSink, fence: Fence, error: TrainingError) -> None:
    """The job has failed in a way that trying again would not change."""
    document = {"code": error.code, "message": error.message, "hint": error.hint}
    end(sink, fence, JobStatus.failed, document)


def end(
    sink: DatabaseSink, fence: Fence, status: JobStatus, error: dict[str, str] | None = None
) -> None:
    """Writes a final status, unless another attempt owns the job by now."""
    try:
        sink.finish(lambda session: lifecycle.finish(session, fence, status, error=error))
    except Superseded:
        log.warning("the job was given to another worker", job_id=fence.job_id)


if __name__ == "__main__":
    main()
