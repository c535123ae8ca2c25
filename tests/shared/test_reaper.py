"""Which attempts are given up, and when, on each database."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import update

from shared import lifecycle, locks, reaper, repository
from shared.database import Database, db_now
from shared.lifecycle import Capacity, Fence
from shared.locks import OwnerLock
from shared.reaper import Reaper
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Job
from skipline.catalog import BUILTIN_DATASETS, resolve
from skipline.schemas import JobStatus
from skipline.specs import TrainSpec


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.artifacts_path)


def claimed(database: Database, owner: str, host: str) -> Fence:
    spec = resolve(TrainSpec(dataset="digits"), BUILTIN_DATASETS["digits"])
    with database.session_scope() as session:
        repository.add_job(session, spec)
        claim = lifecycle.claim(session, owner, host, 60, Capacity(("auto",)))
    assert claim is not None
    return claim.fence


def status(database: Database, fence: Fence) -> str:
    with database.read_scope() as session:
        return repository.get_job(session, fence.job_id).status


def expire(database: Database, fence: Fence) -> None:
    with database.session_scope() as session:
        past = update(Job).where(Job.id == fence.job_id).values(lease_until=db_now(-1))
        session.execute(past, execution_options={"synchronize_session": False})


def test_an_owner_on_this_host_is_missed_at_once(
    settings: Settings, database: Database, storage: Storage
) -> None:
    lock = OwnerLock(settings.home_path / "locks")
    fence = claimed(database, lock.owner, locks.host_name())
    looks = Reaper(settings, database, storage)
    assert looks.look() == 0
    lock.release()
    assert looks.look() == 1
    assert status(database, fence) == JobStatus.queued
    assert looks.look() == 0
    assert list((settings.home_path / "locks").iterdir()) == []


def test_a_lock_of_another_host_says_nothing(
    settings: Settings, database: Database, storage: Storage
) -> None:
    lock = OwnerLock(settings.home_path / "locks")
    fence = claimed(database, lock.owner, "elsewhere")
    lock.release()
    assert Reaper(settings, database, storage).look() == 0
    assert status(database, fence) == JobStatus.running


def test_a_lease_that_ran_out_is_taken_wherever_its_owner_is(
    settings: Settings, database: Database, storage: Storage
) -> None:
    fence, other = claimed(database, "w1", "elsewhere"), claimed(database, "w2", "elsewhere")
    expire(database, fence)
    assert Reaper(settings, database, storage).look() == 1
    assert status(database, fence) == JobStatus.queued
    assert status(database, other) == JobStatus.running


def test_after_the_clock_jumped_leases_get_one_more_term(
    settings: Settings,
    database: Database,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fence = claimed(database, "w1", "elsewhere")
    expire(database, fence)
    clock = {"wall": time.time(), "monotonic": 1000.0}
    monkeypatch.setattr(reaper.time, "time", lambda: clock["wall"])
    monkeypatch.setattr(reaper.time, "monotonic", lambda: clock["monotonic"])
    looks = Reaper(settings, database, storage)
    with database.session_scope() as session:
        lifecycle.renew(session, fence, 60)
    assert looks.look() == 0
    expire(database, fence)
    clock["wall"] += 3600  # The machine slept for an hour; its workers wake now, too.
    clock["monotonic"] += 2
    assert looks.look() == 0
    clock["wall"] += 59
    clock["monotonic"] += 59
    assert looks.look() == 0
    clock["wall"] += 2
    clock["monotonic"] += 2
    assert looks.look() == 1


def test_what_a_dead_owner_left_half_written_is_removed(
    settings: Settings, database: Database, storage: Storage
) -> None:
    lock = OwnerLock(settings.home_path / "locks")
    with storage.writing("jobs/j/1/1", lock.owner) as folder:
        (folder / "a.bin").write_bytes(b"half")
        Reaper(settings, database, storage).look()
        assert folder.exists()
        lock.release()
        Reaper(settings, database, storage).look()
        assert not folder.exists()
        folder.mkdir()
