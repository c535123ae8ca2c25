"""What a migration does to the rows that are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from alembic import command
from sqlalchemy import text

from shared import datasets, lifecycle, repository, schema
from shared.database import Database
from shared.lifecycle import Capacity, Fence
from shared.settings import Settings
from skipline.catalog import BUILTIN_DATASETS, resolve
from skipline.schemas import JobStatus
from skipline.specs import TrainSpec, dump_spec, parse_request


@pytest.fixture
def opened(settings: Settings) -> Iterator[Database]:
    """An empty database without a schema, of each kind."""
    database = Database(settings.database)
    yield database
    database.dispose()


def alembic(database: Database, what: Any, revision: str) -> None:
    with database.session_scope() as session:
        config = schema._config()
        config.attributes["connection"] = session.connection()
        what(config, revision)


def stored(database: Database, table: str) -> list[Any]:
    with database.read_scope() as session:
        return list(session.execute(text(f"SELECT * FROM {table}")).mappings())


def test_jobs_and_datasets_of_the_first_schema_are_kept(opened: Database) -> None:
    alembic(opened, command.upgrade, "0001")
    with opened.session_scope() as session:
        session.execute(
            text(
                "INSERT INTO jobs (id, kind, status, spec, device, attempt, crashes, last_point, "
                "last_event, created_at) "
                "VALUES ('j', 'train', 'queued', '{}', 'auto', 0, 0, 0, 1, 5)"
            )
        )
        session.execute(
            text(
                "INSERT INTO events (job_id, number, attempt, level, type, message, data, time) "
                "VALUES ('j', 1, 0, 'info', 'created', 'Stored', '{}', 5)"
            )
        )
        session.execute(
            text(
                "INSERT INTO datasets (id, name, hash, classes, splits, image_size, channel_mean, "
                "channel_std, problems, num_bytes, key, created_at) "
                "VALUES ('d', 'own', 'h', '[]', '{}', 32, '[]', '[]', '[]', 1, 'k', 5)"
            )
        )
    schema.migrate(opened)
    with opened.read_scope() as session:
        job = repository.get_job(session, "j")
        dataset = datasets.find_dataset(session, "own")
    assert (job.num_processes, len(stored(opened, "events"))) == (1, 1)
    assert dataset is not None
    assert dataset.channel_image_std is None


def test_going_back_to_the_first_schema_keeps_jobs_and_their_events(opened: Database) -> None:
    schema.migrate(opened)
    spec = parse_request({"dataset": "digits"})
    assert isinstance(spec, TrainSpec)
    with opened.session_scope() as session:
        job = repository.add_job(session, resolve(spec, BUILTIN_DATASETS["digits"]))
        assert job.spec == dump_spec(resolve(spec, BUILTIN_DATASETS["digits"]))
    alembic(opened, command.downgrade, "0001")
    [row] = stored(opened, "jobs")
    assert row["id"] == job.id
    assert "num_processes" not in row
    assert len(stored(opened, "events")) == 1
    schema.migrate(opened)
    assert stored(opened, "jobs")[0]["num_processes"] == 1


SECOND_SCHEMA = (
    "INSERT INTO jobs (id, kind, status, spec, device, num_processes, attempt, crashes, owner, "
    "lease_until, last_point, last_event, created_at, started_at, finished_at) VALUES "
    "('old', 'train', 'queued', '{}', 'auto', 1, 0, 0, NULL, NULL, 0, 1, 5, NULL, NULL), "
    "('ingest', 'ingest', 'queued', '{}', 'auto', 1, 0, 0, NULL, NULL, 0, 0, 4, NULL, NULL), "
    "('run', 'train', 'running', '{}', 'cuda', 2, 1, 1, 'o', 9, 1, 1, 3, 4, NULL), "
    "('done', 'train', 'succeeded', '{}', 'cpu', 1, 1, 0, NULL, NULL, 0, 0, 1, 2, 3)",
    "INSERT INTO attempts (job_id, number, owner, host, started_at) VALUES ('run', 1, 'o', 'h', 4)",
    "INSERT INTO events (job_id, number, attempt, level, type, message, data, time) "
    "VALUES ('run', 1, 1, 'info', 'started', 'Begins', '{}', 4)",
    "INSERT INTO metric_points (job_id, number, attempt, name, step, epoch, value, time) "
    "VALUES ('run', 1, 1, 'train_loss', 1, 1, 0.5, 4)",
    "INSERT INTO checkpoints (id, job_id, attempt, kind, epoch, step, metrics, last_point, "
    "num_bytes, key, created_at) VALUES ('c', 'run', 1, 'last', 1, 1, '{}', 1, 1, 'k', 4)",
    "INSERT INTO workers (id, host, num_gpus, num_cores, seen_at) VALUES ('w', 'h', 2, 8, 7)",
)
TABLES = ("jobs", "attempts", "events", "metric_points", "checkpoints", "workers")


def all_rows(database: Database) -> dict[str, list[Any]]:
    return {table: sorted(stored(database, table), key=str) for table in TABLES}


def fill_second_schema(database: Database) -> dict[str, list[Any]]:
    """One row or more in each table; returns them."""
    alembic(database, command.upgrade, "0002")
    with database.session_scope() as session:
        for statement in SECOND_SCHEMA:
            session.execute(text(statement))
    return all_rows(database)


def test_what_waits_and_runs_at_the_upgrade_to_the_third_schema_goes_on(opened: Database) -> None:
    before = fill_second_schema(opened)
    schema.migrate(opened)
    for table, rows in before.items():
        after = {row[next(iter(row))]: row for row in stored(opened, table)}
        for row in rows:
            kept = dict(row) | ({"device": "any"} if row.get("kind") == "ingest" else {})
            new = after[row[next(iter(row))]]
            assert {name: new[name] for name in kept} == kept

    with opened.read_scope() as session:
        job = repository.get_job(session, "old")
        assert (job.submitter, job.parent_id, job.waits_for, job.stop_requested) == (
            *("", None, None),
            False,
        )
        [attempt] = [
            repository.attempt_document(row) for row in repository.list_attempts(session, "run")
        ]
        [worker] = repository.list_workers(session)
        old, ingest = (repository.get_job(session, name) for name in ("old", "ingest"))
        places = repository.queue_places(session, [old, ingest])
    assert attempt.gpus == []
    assert (worker.status, worker.num_slots, worker.devices) == ("lost", 1, [])
    assert worker.started_at == worker.seen_at
    assert [places[name].position for name in ("ingest", "old")] == [1, 2]

    # The one that ran is finished by its worker; the others are claimed, first come, first served.
    with opened.session_scope() as session:
        lifecycle.finish(session, Fence("run", 1, "o"), JobStatus.succeeded, result={})
        capacity = Capacity(("any", "auto", "cpu"))
        taken = [lifecycle.claim(session, "o", "h", 60, capacity) for _ in range(3)]
    assert [one and one.fence.job_id for one in taken] == ["ingest", "old", None]


def test_going_back_to_the_second_schema_keeps_every_row(opened: Database) -> None:
    before = fill_second_schema(opened)
    schema.migrate(opened)
    with opened.session_scope() as session:
        repository.remember_request(session, "me", "key", "hash", "old")
        repository.add_log_part(session, Fence("run", 1, "o"), 1, "Hello")
    alembic(opened, command.downgrade, "0002")
    assert all_rows(opened) == before
    schema.migrate(opened)
    assert [row["device"] for row in stored(opened, "jobs") if row["id"] == "ingest"] == ["any"]
    assert stored(opened, "log_parts") == stored(opened, "idempotency_keys") == []
