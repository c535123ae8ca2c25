"""Migrations: the same schema as the tables, reached by any number of processes at once."""

from __future__ import annotations

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from shared import schema
from shared.database import Database
from shared.errors import SetupError
from shared.settings import Settings
from shared.tables import Base


def test_the_migrations_lead_to_the_tables(database: Database) -> None:
    with database.session_scope() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_an_empty_database_is_refused_until_it_is_migrated(settings: Settings) -> None:
    database = Database(settings.database)
    with pytest.raises(SetupError, match="skipline migrate"):
        schema.check(database)
    schema.migrate(database)
    schema.check(database)
    database.dispose()


def test_several_processes_may_migrate_at_once(settings: Settings) -> None:
    database = Database(settings.database)
    errors: list[Exception] = []

    def migrate() -> None:
        try:
            schema.migrate(database)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    schema.check(database)
    database.dispose()
