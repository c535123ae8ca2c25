"""What must hold when a soak is over: nothing lost, nothing done twice, nothing left over.

Reads the database and the storage as they are. Knows nothing of how jobs were asked for but what
was promised.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import repository
from shared.database import Database
from shared.errors import CheckpointCorrupt
from shared.housekeeping import MIN_AGE_SECONDS, Housekeeper
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Attempt, Checkpoint, Dataset, Event, Job, MetricPoint, Predictions, Report
from shared.vision.bundle import read_bundle
from tests.soak.stories import LOG_EVERY_STEPS, STEPS_PER_EPOCH, Ledger, Promise
from worker.engine.resume import RESUME_FILE, load_resume

COUNTS_ONCE = ("succeeded", "failed")
"""An attempt that ended so has run to the end."""


def judge(settings: Settings, database: Database, ledger: Ledger) -> list[str]:
    """Everything that is wrong, in words."""
    storage = Storage(settings.artifacts_path)
    wrongs = list(ledger.wrongs)
    with database.read_scope() as session:
        wrongs += _all_are_there(session, ledger)
        for promise in ledger.promises.values():
            if promise.job_id not in ledger.deleted:
                job = session.get(Job, promise.job_id)
                if job is not None:
                    found = [*_status(job, promise), *_attempts(session, job)]
                    found += _curve(session, job, promise)
                    wrongs += [f"{promise.story}, job {job.id}: {wrong}" for wrong in found]
        wrongs += _checkpoints_load(session, storage)
    wrongs += _storage_is_tidy(settings, database, storage)
    return wrongs


def _all_are_there(session: Session, ledger: Ledger) -> Iterator[str]:
    """Every job that was accepted, and no other: a request that was sent twice made one."""
    there = set(session.scalars(select(Job.id)))
    wanted = set(ledger.promises) - ledger.deleted
    if lost := wanted - there:
        yield f"lost: {sorted(lost)}"
    if doubled := there - wanted:
        yield f"nobody was told of: {sorted(doubled)}"


def _status(job: Job, promise: Promise) -> Iterator[str]:
    if job.status != promise.status:
        yield f"{job.status} instead of {promise.status}, error {job.error}"
    elif promise.stop_reason != job.stop_reason:
        yield f"stop_reason {job.stop_reason} instead of {promise.stop_reason}"
    code = job.error["code"] if job.error else None
    if job.status == promise.status and code != promise.error_code:
        yield f"error {code} instead of {promise.error_code}"
    if (job.status == "succeeded") != (job.result is not None):
        yield f"{job.status} with the result {job.result}"
    if job.owner is not None or job.lease_until is not None:
        yield "over, and owned by somebody"


def _attempts(session: Session, job: Job) -> Iterator[str]:
    """Numbered without a gap, all ended; one at most ran to the end, and it was the last."""
    rows = repository.list_attempts(session, job.id)
    if [row.number for row in rows] != list(range(1, job.attempt + 1)):
        yield f"attempts {[row.number for row in rows]} of {job.attempt}"
    outcomes = [row.outcome for row in rows]
    if any(row.ended_at is None or row.outcome is None for row in rows):
        yield f"an attempt has not ended: {outcomes}"
    finished = [row.number for row in rows if row.outcome in COUNTS_ONCE]
    if job.status == "succeeded" and outcomes[-1:] != ["succeeded"]:
        yield f"succeeded after attempts that {outcomes}"
    if len(finished) > 1 or (finished and finished[0] != job.attempt):
        yield f"attempts that ran to the end: {finished} of {job.attempt}"
    ends = select(Event.type).where(Event.job_id == job.id, Event.type.in_(COUNTS_ONCE))
    if len(told := list(session.scalars(ends))) > 1:
        yield f"ended more than once: {told}"


def _curve(session: Session, job: Job, promise: Promise) -> Iterator[str]:
    """A training that succeeded has each step once and a report."""
    if job.status != "succeeded" or promise.num_epochs is None:
        return
    if session.get(Report, job.id) is None:
        yield "no report"
    rows = session.execute(
        select(MetricPoint.name, MetricPoint.step)
        .where(MetricPoint.job_id == job.id, MetricPoint.name != repository.REWIND)
        .order_by(MetricPoint.number)
    ).all()
    steps = {name: [step for other, step in rows if other == name] for name, _ in rows}
    for name, found in steps.items():
        if found != sorted(set(found)):
            yield f"{name} runs back or has doubles: {found}"
    if promise.num_epochs == 0:  # Stopped: validated where it ended.
        end = (job.progress or {}).get("step")
        if steps.get("val_loss", [])[-1:] != [end]:
            yield f"val_loss at {steps.get('val_loss', [])[-3:]}, stopped at step {end}"
        return
    end = STEPS_PER_EPOCH * promise.num_epochs
    wanted = {
        "train_loss": list(range(LOG_EVERY_STEPS, end + 1, LOG_EVERY_STEPS)),
        "val_loss": list(range(STEPS_PER_EPOCH, end + 1, STEPS_PER_EPOCH)),
    }
    for name, expected in wanted.items():
        if steps.get(name) != expected:
            yield f"{name} at {steps.get(name)} instead of {expected}"


def _checkpoints_load(session: Session, storage: Storage) -> Iterator[str]:
    for key in sorted(set(session.scalars(select(Checkpoint.key)))):
        try:
            folder = storage.verify(key)
            read_bundle(folder)
            load_resume(folder / RESUME_FILE)
        except CheckpointCorrupt as error:
            yield f"checkpoint {key}: {error}"


def _storage_is_tidy(settings: Settings, database: Database, storage: Storage) -> list[str]:
    """A kill may leave a folder between its last file and its row: the housekeeper finds it, once
    it is an hour old. Everything that a row names is there."""
    if staged := os.listdir(storage.root / "staging"):
        return [f"half-written folders were left: {staged}"]
    age(storage.root, 2 * MIN_AGE_SECONDS)
    Housekeeper(settings, database, storage).tidy()
    with database.read_scope() as session:
        columns = (Checkpoint.key, Dataset.key, Predictions.key)
        named = {key for column in columns for key in session.scalars(select(column))}
    there = {*storage.keys("jobs"), *storage.keys("datasets")}
    return [
        *(f"no row names the folder {key}" for key in sorted(there - named)),
        *(f"the folder {key} is gone" for key in sorted(named - there)),
    ]


def age(root: Path, seconds: float) -> None:
    """Makes every folder below as old as if it had been written so long ago."""
    then = time.time() - seconds
    for folder, _, _ in os.walk(root):
        os.utime(folder, (then, then))


def table(database: Database, ledger: Ledger, faults: Counter[str]) -> str:
    """What was done, and what came of it."""
    with database.read_scope() as session:
        statuses = Counter(f"{job.kind} {job.status}" for job in session.scalars(select(Job)))
        outcomes = Counter(
            f"{row.outcome}: {row.reason}" if row.outcome == "lost" else str(row.outcome)
            for row in session.execute(select(Attempt.outcome, Attempt.reason))
        )
    statuses["deleted"] = len(ledger.deleted)
    parts = {
        "what was done": faults,
        "what was asked": ledger.asked,
        "jobs by what became of them": statuses,
        "attempts by how they ended": outcomes,
    }
    lines = []
    for title, counts in parts.items():
        lines += [f"{title}: {counts.total()}"]
        lines += [f"  {count:5} {what}" for what, count in sorted(counts.items())]
    return "\n".join(lines)
