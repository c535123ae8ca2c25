"""What a migration does to the rows that are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from alembic import command
from sqlalchemy import text

from shared import repository, schema
from shared.database import Database
from shared.settings import Settings
from skipline.catalog import BUILTIN_DATASETS, resolve
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
        dataset = repository.find_dataset(session, "own")
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
