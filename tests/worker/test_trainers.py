"""Trainers that are kept ready, and what is left of one that got no job. The processes are real,
and wait for a job for ever."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared import locks
from shared.database import Database
from shared.settings import Settings
from tests.conftest import make_settings
from tests.e2e.conftest import wait_for
from worker import trainer_process, trainers
from worker.trainers import Trainers


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    waits = (sys.executable, "-S", "-E", "-c", "import sys; sys.stdin.read()")
    monkeypatch.setattr(trainer_process, "COMMAND", waits)
    return make_settings(home=tmp_path, warm_trainers=2)


@contextmanager
def opened(settings: Settings, num_slots: int = 2) -> Iterator[Trainers]:
    database = Database(settings.database)
    made = Trainers(settings, database, num_slots)
    yield made
    made.close()
    database.dispose()


def lock_files(settings: Settings) -> set[str]:
    return {path.stem for path in (settings.home_path / "locks").glob("*.lock")}


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_trainers_are_kept_warm_at_most_one_for_each_slot(settings: Settings) -> None:
    with opened(settings, num_slots=1) as one:
        one.warm_up()
        one.warm_up()
        assert len(one._warm) == 1
    with opened(settings, num_slots=3) as three:
        three.warm_up()
        pids = [trainer.pid for trainer in three._warm]
        assert len(pids) == 2
    assert all(map(is_gone, pids))
    assert lock_files(settings) == set()
    assert list((settings.home_path / "logs").iterdir()) == []


def test_a_warm_trainer_is_taken_first_and_stays_warm_without_a_job(settings: Settings) -> None:
    with opened(settings) as own:
        own.warm_up()
        [first, second] = [trainer.owner for trainer in own._warm]
        assert own.prepare() == first
        own.put_back(first)
        assert [trainer.owner for trainer in own._warm] == [second, first]


def test_a_warm_trainer_that_died_is_not_taken(settings: Settings) -> None:
    with opened(settings) as own:
        own.warm_up()
        [dead, alive] = own._warm
        dead.signal(signal.SIGKILL)
        wait_for(lambda: not dead.is_alive, "end of the trainer", 10)
        assert own.prepare() == alive.owner
        own.put_back(alive.owner)


def test_an_owner_without_a_process_is_prepared_in_no_time_and_forgotten(
    settings: Settings,
) -> None:
    with opened(settings) as own:
        owner = own.prepare()
        assert not locks.is_dead(settings.home_path / "locks", owner)
        assert lock_files(settings) == {owner}
        own.put_back(owner)
        assert lock_files(settings) == set()
        assert own._warm == []


def test_the_lock_of_one_that_may_own_a_job_is_left_for_a_reaper(settings: Settings) -> None:
    with opened(settings) as own:
        own.warm_up()
        [warm, _] = own._warm
        owners = [own.prepare(), own.prepare(), own.prepare()]
        for owner in owners:
            own.put_back(owner, may_own=True)
        assert is_gone(warm.pid)
        assert lock_files(settings) == set(owners)
        assert all(locks.is_dead(settings.home_path / "locks", owner) for owner in owners)


def test_no_trainer_is_warmed_beside_a_job_that_has_just_begun(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        def __init__(self, *_: Any) -> None: ...

        def run(self) -> None: ...

    monkeypatch.setattr(trainers, "Supervisor", Ended)
    with opened(settings) as own:
        owner = own.prepare()
        trainer = own._prepared[owner]
        now = trainers.time.monotonic()
        own.run(trainers.Fence("job", 1, owner), [], now)
        trainer.close()
        own.warm_up()
        assert own._warm == []
        monkeypatch.setattr(trainers, "SETTLE_SECONDS", 0.0)
        own.warm_up()
        assert len(own._warm) == 2


def test_a_worker_that_leaves_warms_no_trainer(settings: Settings) -> None:
    with opened(settings) as own:
        own.drain()
        own.warm_up()
        assert own._warm == []


def test_a_trainer_that_cannot_be_started_stops_nobody(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trainer_process, "COMMAND", (str(tmp_path / "nothing"),))
    with opened(settings) as own:
        own.warm_up()
        assert own._warm == []
    assert lock_files(settings) == set()
