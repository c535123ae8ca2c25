"""A worker shows itself in the database, with what it has, as long as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from shared import repository
from shared.database import Database
from shared.settings import Settings
from shared.tables import Worker
from skipline.catalog import BUILTIN_DATASETS, ClusterFacts, resolve
from skipline.specs import TrainSpec, parse_request
from worker import slots
from worker.slots import Slots


@pytest.fixture
def new_slots(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Slots]]:
    """Makes workers without warm trainers on a machine with two GPUs and three cores; they leave
    with the test."""
    monkeypatch.setattr(slots, "num_gpus", lambda settings: 2)
    monkeypatch.setattr(slots, "num_cores", lambda: 3)
    quick = settings.model_copy(update={"warm_trainers": 0, "idle_look_seconds": 0.01})
    made: list[Slots] = []

    def make() -> Slots:
        made.append(Slots(quick, database, 1))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


def workers(database: Database) -> list[Worker]:
    with database.read_scope() as session:
        return list(session.scalars(select(Worker)))


def test_a_worker_is_seen_from_its_start_until_it_closes(
    new_slots: Callable[[], Slots], database: Database
) -> None:
    one, other = new_slots(), new_slots()
    for worker in (one, other):
        worker.look_forever()
        worker.drain()
        for thread in worker._threads:
            thread.join()
    assert len(workers(database)) == 2
    assert {(row.num_gpus, row.num_cores) for row in workers(database)} == {(2, 3)}
    with database.read_scope() as session:
        assert repository.cluster_facts(session) == ClusterFacts(max_gpus=2)
    one.close()
    assert len(workers(database)) == 1
    other.close()
    assert workers(database) == []


def test_a_worker_shows_itself_again_when_it_is_time_and_not_before(
    new_slots: Callable[[], Slots], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_slots()
    worker._show()
    [first] = workers(database)
    worker._show()
    assert workers(database)[0].seen_at == first.seen_at
    monkeypatch.setattr(slots, "SHOW_SECONDS", 0.0)
    monkeypatch.setattr(slots, "num_cores", lambda: 5)
    worker._show()
    [again] = workers(database)
    assert (again.id, again.num_cores) == (first.id, 5)


def test_a_database_that_is_away_is_tried_again(
    new_slots: Callable[[], Slots], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_slots()

    def away(*_: object) -> None:
        raise OperationalError("INSERT", {}, Exception("gone"))

    with monkeypatch.context() as patched:
        patched.setattr(repository, "see_worker", away)
        worker._show()
    assert workers(database) == []
    worker._show()
    assert len(workers(database)) == 1
    with monkeypatch.context() as patched:
        patched.setattr(repository, "forget_worker", away)
        worker.close()
    assert len(workers(database)) == 1


def test_a_job_for_more_gpus_than_there_are_starts_no_trainer(
    new_slots: Callable[[], Slots], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "claimable_devices", lambda settings: ("auto", "cuda"))
    spec = parse_request({"dataset": "digits", "resources": {"device": "cuda", "num_processes": 4}})
    assert isinstance(spec, TrainSpec)
    with database.session_scope() as session:
        repository.add_job(session, resolve(spec, BUILTIN_DATASETS["digits"]))
    assert not new_slots()._run_next()
