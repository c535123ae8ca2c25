"""Writes checkpoints as a trainer does and is killed at each point of that: at the first call to
the system or the database, then at the second, and so on, until one comes to its end.

    python -m tests.faults.checkpoint_writer FOLDER DATABASE_URL

Each try is an attempt of its own in a process of its own. After each, what a reader and the next
attempt find is checked; prints as JSON at which calls it was killed, and how often the new
checkpoint was there all the same.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import event

from shared import lifecycle, repository, schema
from shared.database import Database
from shared.lifecycle import Fence
from shared.storage import Storage
from shared.vision.bundle import Bundle, BundleDataset, read_bundle
from shared.vision.preprocessing import Preprocessing
from skipline.specs import CheckpointSpec, TrainSpec
from tests.shared import jobs
from worker.engine.events import Control, TrainingCheckpoint
from worker.engine.resume import RESUME_FILE, load_resume
from worker.sink import DatabaseSink

AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class Killer:
    """Kills this process at the `last`-th call; writes the name of each into a pipe before."""

    def __init__(self, last: int, pipe: int) -> None:
        self.last, self.pipe, self.count = last, pipe, 0

    def watch(self, database: Database) -> None:
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            self.call("fsync")
            sync(descriptor)

        os.fsync = fsync
        event.listen(database.engine, "before_cursor_execute", lambda *_: self.call("statement"))
        event.listen(database.engine, "commit", lambda _: self.call("commit"))
        sys.addaudithook(lambda name, _: self.call(name) if name in AUDITED else None)

    def call(self, name: str) -> None:
        self.count += 1
        os.write(self.pipe, f"{name}\n".encode())
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def write(url: str, folder: Path, fence: Fence, step: int, killer: Killer) -> None:
    """One checkpoint in place of the one before. Two points lead up to it."""
    database, storage = Database(url), Storage(folder / "artifacts")
    sink = DatabaseSink(database, storage, fence, Control())
    sink.keep, sink.reserved_disk_bytes = CheckpointSpec(keep_last=1), 0
    sink.describe = lambda checkpoint: Bundle(
        spec=TrainSpec(dataset="digits"),
        classes=("a", "b"),
        preprocessing=Preprocessing(
            image_size=8, channel_mean=(0.5, 0.5, 0.5), channel_std=(0.2, 0.2, 0.2)
        ),
        dataset=BundleDataset(name="digits", id="ds_1", hash="abc"),
        epoch=1,
        step=checkpoint.step,
        metrics={},
    )
    killer.watch(database)
    sink.metrics({"train_loss": 1.0, "lr": 0.1}, step=step, epoch=1)
    weights = {"weight": torch.full((10_000,), float(step))}
    sink.save_checkpoint(
        TrainingCheckpoint(
            epoch=1,
            step=step,
            metrics={},
            is_best=False,
            is_kept=False,
            weights=weights,
            resume={"step": step, "momentum": weights["weight"]},
        )
    )


def found(database: Database, storage: Storage, job_id: str) -> int:
    """The step of the job's only checkpoint, after all that can be seen of it was read."""
    with database.read_scope() as session:
        rows = repository.list_checkpoints(session, job_id)
        num_points = len(repository.points_after(session, {job_id: 0}, 10_000))
    [row] = rows
    folder = storage.verify(row.key)
    bundle, weights = read_bundle(folder)
    resume = load_resume(folder / RESUME_FILE)
    assert bundle.step == resume["step"] == row.step
    assert torch.equal(weights["weight"], torch.full((10_000,), float(row.step)))
    assert row.last_point == num_points  # Checkpoint and metrics come together, or not at all.
    return row.step


def write_until(last: int, url: str, folder: Path, fence: Fence, step: int) -> str | None:
    """Has a process write the checkpoint that is killed at call number `last`. Returns that call's
    name, or None when the checkpoint was written before."""
    reader, pipe = os.pipe()
    if (child := os.fork()) == 0:
        write(url, folder, fence, step, Killer(last, pipe))
        os._exit(0)
    os.close(pipe)
    with os.fdopen(reader) as calls:
        names = calls.read().split()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return names[-1]
    assert os.waitstatus_to_exitcode(status) == 0
    return None


def main(folder: Path, url: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    database, storage = Database(url), Storage(folder / "artifacts")
    schema.migrate(database)
    fence = jobs.running(database)
    database.dispose()  # No connection may cross a fork.
    assert write_until(0, url, folder, fence, 1) is None
    step, num_new = 1, 0
    points: list[str] = []
    while True:
        name = write_until(len(points) + 1, url, folder, fence, step + 1)
        now = found(database, storage, fence.job_id)
        assert now in (step, step + 1)
        if name is None:
            assert now == step + 1
            break
        points.append(name)
        num_new += now - step
        step = now
        storage.sweep(fence.owner)  # As a reaper does.
        with database.session_scope() as session:
            lifecycle.release(session, fence, "killed")
        fence = jobs.claimed(database, f"owner{len(points)}")
        database.dispose()
    assert list((storage.root / "staging").iterdir()) == []
    return {"killed_at": points, "num_new": num_new}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
