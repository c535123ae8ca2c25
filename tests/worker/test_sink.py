"""What the sink writes beside metrics, and whom it tells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from shared import lifecycle, schema
from shared.database import Database
from shared.lifecycle import Superseded
from shared.storage import Storage
from shared.vision.bundle import Bundle, BundleDataset
from shared.vision.preprocessing import Preprocessing
from skipline.schemas import JobStatus, Progress
from skipline.specs import CheckpointSpec
from tests.shared.jobs import finish, get, running
from worker.engine.events import Control, TrainingCheckpoint
from worker.sink import DatabaseSink, num_tensor_bytes

PREPROCESSING = Preprocessing(
    image_size=8, channel_mean=(0.5, 0.5, 0.5), channel_std=(0.2, 0.2, 0.2)
)


@dataclass
class Told:
    """A sink that is not entered, so that no thread writes, and how often it told of something."""

    sink: DatabaseSink
    database: Database
    storage: Storage
    times: int = 0

    def tell(self) -> None:
        self.times += 1


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite3'}")
    schema.migrate(database)
    fence, storage = running(database), Storage(tmp_path / "artifacts")
    told: Told
    sink = DatabaseSink(database, storage, fence, Control(), lambda: told.tell())
    sink.keep, sink.reserved_disk_bytes = CheckpointSpec(keep_last=9), 0
    told = Told(sink, database, storage)
    sink.describe = lambda checkpoint: Bundle(
        spec=get_spec(database, fence.job_id),
        classes=("a", "b"),
        preprocessing=PREPROCESSING,
        dataset=BundleDataset(name="x", id="ds_1", hash="abc"),
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        metrics={},
    )
    yield told
    database.dispose()


def get_spec(database: Database, job_id: str) -> object:
    return get(database, job_id).spec


def checkpoint(step: int) -> TrainingCheckpoint:
    return TrainingCheckpoint(
        epoch=1,
        step=step,
        metrics={},
        is_best=False,
        is_kept=False,
        weights={"weight": torch.zeros(3)},
        resume={"step": step},
    )


def test_it_tells_once_after_each_transaction_that_wrote_something(told: Told) -> None:
    sink = told.sink
    sink.flush()
    assert told.times == 0  # There was nothing to write.
    sink.metrics({"train_loss": 1.0, "lr": 0.1}, step=1, epoch=1)
    assert told.times == 0
    sink.flush()
    assert told.times == 1
    sink.flush()
    assert told.times == 1
    sink.progress(Progress(step=1, num_steps=2, epoch=1, num_epochs=1))
    sink.flush()
    assert told.times == 2
    sink.event("info", "resumed", "Goes on", {})
    assert told.times == 3
    sink.save_checkpoint(checkpoint(1))
    assert told.times == 4


def test_what_was_not_written_is_not_told(told: Told) -> None:
    finish(told.database, told.sink._fence, JobStatus.succeeded)
    with pytest.raises(Superseded):
        told.sink.event("info", "resumed", "Goes on", {})
    assert told.times == 0


def test_the_status_is_there_when_it_is_told(told: Told) -> None:
    fence, seen = told.sink._fence, []
    told.sink._on_written = lambda: seen.append(get(told.database, fence.job_id).status)
    told.sink.finish(
        lambda session: lifecycle.finish(session, fence, JobStatus.succeeded, result={})
    )
    assert seen == [JobStatus.succeeded]


def test_a_step_that_comes_by_twice_within_an_attempt_gets_a_key_of_its_own(told: Told) -> None:
    told.sink.save_checkpoint(checkpoint(5))
    told.sink.save_checkpoint(checkpoint(5))
    fence = told.sink._fence
    first, second = told.storage.keys("jobs")
    assert first == f"jobs/{fence.job_id}/{fence.attempt}/5"
    assert second.startswith(f"{first}-")


def test_the_bytes_of_all_tensors_are_counted() -> None:
    # Three floats, two doubles, and five bytes.
    state = {
        "a": torch.zeros(3),
        "step": 7,
        "b": {0: [torch.zeros(2, dtype=torch.float64), None], "c": (torch.zeros(5).byte(),)},
    }
    assert num_tensor_bytes(state) == 12 + 16 + 5
