"""The version of the database's schema: bringing it up to date, and refusing one that is not."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

import migrations
from shared.database import Database
from shared.errors import SetupError

_ADVISORY_LOCK = 7_236_511
"""Any number that nothing else on the server uses: one migration at a time."""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config


def migrate(database: Database) -> None:
    """Brings the schema to the newest version, all of it in one transaction; several processes
    may do so at once. Raises `SetupError` when the database does not answer."""
    database.check()
    with database.session_scope() as session:  # On SQLite the scope itself is the lock.
        if not database.is_sqlite:
            session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        config = _config()
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "head")


def check(database: Database) -> None:
    """Raises `SetupError` when the database does not answer, or has another schema than this
    version of the program needs."""
    database.check()
    head = ScriptDirectory.from_config(_config()).get_current_head()
    with database.read_scope() as session:
        current = MigrationContext.configure(session.connection()).get_current_revision()
    if current != head:
        raise SetupError(
            f"The database has the schema {current or 'of an empty database'}, this version "
            f"needs {head}: run `skipline migrate`"
        )
