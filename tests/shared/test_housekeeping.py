"""What is cleared away and what stays, with real files, on each database."""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from shared import datasets, repository
from shared.database import Database
from shared.housekeeping import Housekeeper
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import IdempotencyKey
from tests.shared.jobs import add_job, finish, register, running

HOUR = 3600


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.artifacts_path)


@pytest.fixture
def keeper(settings: Settings, database: Database, storage: Storage) -> Housekeeper:
    return Housekeeper(settings, database, storage)


def write(storage: Storage, key: str, age_seconds: float = 2 * HOUR) -> str:
    """A complete folder that was written so long ago, and the folders above it with it."""
    with storage.writing(key, "owner") as folder:
        (folder / "model.bin").write_bytes(b"weights")
    make_old(storage.path(key), storage.root, age_seconds)
    return key


def make_old(path: Path, root: Path, age_seconds: float = 2 * HOUR) -> None:
    then = time.time() - age_seconds
    while path != root:
        os.utime(path, (then, then))
        path = path.parent


def add_dataset(database: Database, key: str) -> None:
    with database.session_scope() as session:
        datasets.add_dataset(
            session,
            id="ds_1",
            name="squares",
            hash="abc",
            key=key,
            num_bytes=1,
            classes=["a", "b"],
            splits={},
            image_size=8,
            channel_mean=[0.5] * 3,
            channel_std=[0.2] * 3,
            channel_image_std=[0.2] * 3,
            problems=[],
        )


def test_folders_that_no_row_names_go(
    keeper: Housekeeper, database: Database, storage: Storage
) -> None:
    fence = running(database)
    named = write(storage, f"jobs/{fence.job_id}/1/5")
    register(database, fence, 5, key=named)
    dataset = write(storage, "datasets/bringer/1")
    add_dataset(database, dataset)
    finish(database, fence)
    unregistered = write(storage, f"jobs/{fence.job_id}/1/6")
    of_deleted = [write(storage, f"jobs/deleted/2/{step}") for step in (5, 10)]
    replaced = write(storage, "datasets/replaced/1")
    keeper.tidy()
    assert storage.keys("jobs") + storage.keys("datasets") == [named, dataset]
    for key in (unregistered, *of_deleted, replaced):
        assert not storage.path(key).exists()


def test_what_is_new_stays_until_it_can_have_no_row_any_more(
    keeper: Housekeeper, database: Database, storage: Storage
) -> None:
    fence = running(database)
    register(database, fence, 5, key=write(storage, f"jobs/{fence.job_id}/1/5"))
    fresh = write(storage, "jobs/other/1/5", age_seconds=HOUR - 60)
    keeper.tidy()
    assert storage.path(fresh).exists()
    make_old(storage.path(fresh), storage.root, HOUR + 60)
    keeper.tidy()
    assert not storage.path(fresh).exists()


def test_what_lies_below_a_job_that_is_worked_at_is_left_to_its_attempts(
    keeper: Housekeeper, database: Database, storage: Storage
) -> None:
    fence = running(database)
    register(database, fence, 5, key=write(storage, f"jobs/{fence.job_id}/1/5"))
    old = write(storage, f"jobs/{fence.job_id}/1/3")
    ingesting = write(storage, f"datasets/{fence.job_id}/1")
    keeper.tidy()
    assert storage.path(old).exists()
    assert storage.path(ingesting).exists()
    finish(database, fence)
    keeper.tidy()
    assert not storage.path(old).exists()
    assert not storage.path(ingesting).exists()


def test_the_empty_folders_of_deleted_jobs_go(
    keeper: Housekeeper, database: Database, storage: Storage
) -> None:
    fence = running(database)
    register(database, fence, 5, key=write(storage, f"jobs/{fence.job_id}/1/5"))
    key = write(storage, "jobs/deleted/1/5")
    keeper.tidy()
    attempt = storage.path(key).parent
    assert attempt.exists()  # What is in it was removed a moment ago.
    for path in (attempt, attempt.parent):
        make_old(path, storage.root)
        keeper.tidy()
        assert not path.exists()
    assert storage.path(f"jobs/{fence.job_id}/1/5").exists()


def test_the_files_of_another_database_stay(keeper: Housekeeper, storage: Storage) -> None:
    keys = [write(storage, f"jobs/unknown/1/{step}") for step in (5, 6)]
    keeper.tidy()
    assert storage.keys("jobs") == keys


def test_idempotency_keys_hold_for_a_day(keeper: Housekeeper, database: Database) -> None:
    job_id = add_job(database)
    ages = {"old": 24 * HOUR + 60, "young": 24 * HOUR - 60}
    for key, seconds in ages.items():
        with database.session_scope() as session:
            repository.remember_request(session, "me", key, "hash", job_id)
            then = datetime.now(UTC) - timedelta(seconds=seconds)
            mine = update(IdempotencyKey).where(IdempotencyKey.key == key)
            session.execute(mine.values(created_at=then))
    keeper.tidy()
    with database.read_scope() as session:
        found = {key: repository.recall_request(session, "me", key, "hash") for key in ages}
    assert found["old"] is None
    assert found["young"] is not None


def test_what_fails_keeps_nobody_from_the_rest_and_is_tried_again(
    settings: Settings, database: Database, storage: Storage
) -> None:
    done: list[str] = []

    def fail() -> None:
        done.append("failed")
        raise OSError("the disk does not answer")

    keeper = Housekeeper(settings, database, storage, [fail, lambda: done.append("done")])
    keeper.tidy()
    keeper.tidy()
    assert done == ["failed", "done"] * 2


def test_the_thread_tidies_again_and_again_until_it_is_stopped(
    settings: Settings, database: Database, storage: Storage
) -> None:
    thrice = threading.Event()
    times: list[float] = []

    def note() -> None:
        times.append(time.monotonic())
        if len(times) == 3:
            thrice.set()

    often = settings.model_copy(update={"tidy_seconds": 0.01})
    keeper = Housekeeper(often, database, storage, [note])
    keeper.start()
    assert thrice.wait(30)
    keeper.stop()
    num_times = len(times)
    assert not [t for t in threading.enumerate() if t.name == "housekeeper"]
    assert len(times) == num_times
