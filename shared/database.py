"""The engine and its sessions, over SQLite or PostgreSQL.

One session style, synchronous; `Database.session_scope` is the only place that commits. Times
come from the database's clock (`db_now`), so that workers with wrong clocks cannot disagree.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Dialect, create_engine, event
from sqlalchemy.engine import Connection, Engine, ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from shared.errors import SetupError

BUSY_TIMEOUT_SECONDS = 30
TRUSTED_SECONDS = 0.2
"""A PostgreSQL connection that was used within so long is taken to be alive."""
_PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,
}
"""For PostgreSQL: a server that was cut off is noticed within 20 s, not after the system's
quarter of an hour. In seconds, the last one in milliseconds."""
IDLE_TRANSACTION_SECONDS = 15
"""After which PostgreSQL ends a session that has begun a transaction and says nothing more: a
process that sleeps in the middle of one, or a host that froze, must not keep a job's row locked
from those who would take the job over."""
IDLE_TOO_LONG = "25P03"
"""PostgreSQL's word for that."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Timestamp(TypeDecorator[datetime]):
    """A UTC time, stored as whole milliseconds since 1970: one form and one arithmetic on every
    database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        return None if value is None else round((value - _EPOCH) / timedelta(milliseconds=1))

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        return None if value is None else _EPOCH + timedelta(milliseconds=value)


class db_now(FunctionElement[datetime]):  # noqa: N801 - reads as the SQL function that it is
    """The database's clock, `seconds` from now. The time of the statement, not of the
    transaction."""

    type = Timestamp()
    inherit_cache = True
    name = "db_now"

    def __init__(self, seconds: float = 0.0) -> None:
        from sqlalchemy import literal

        super().__init__(literal(round(seconds * 1000), BigInteger))


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    days = "(julianday('now') - 2440587.5)"
    return (
        f"(CAST(ROUND({days} * 86400000.0) AS INTEGER) + {compiler.process(element.clauses, **kw)})"
    )


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    milliseconds = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"
    return f"({milliseconds} + {compiler.process(element.clauses, **kw)})"


class Database:
    """An engine with the two ways to use it: `session_scope` writes, `read_scope` reads."""

    def __init__(self, url: str) -> None:
        """Raises `SetupError` when the URL is not one of a supported database."""
        try:
            parsed = make_url(url)
            if parsed.get_backend_name() == "sqlite":
                self.engine = _sqlite_engine(url, parsed.database)
            elif parsed.get_backend_name() == "postgresql":
                self.engine = _postgresql_engine(url)
            else:
                raise SetupError("SKIPLINE_DATABASE_URL must be a postgresql:// or sqlite:/// URL")
        except (ArgumentError, ImportError):
            raise SetupError("SKIPLINE_DATABASE_URL is not a database URL that is known") from None
        self._writer = self.engine.execution_options(writes=True)

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def session_scope(self) -> Iterator[Session]:
        """A transaction that may write: commits on return, rolls back on an exception. On SQLite
        it takes the write lock at once, so that it never fails half-way for a busy database."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read_scope(self) -> Iterator[Session]:
        """A transaction that reads, and is rolled back."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    def check(self) -> None:
        """Raises `SetupError` when the database does not answer."""
        try:
            with self.engine.connect() as connection:
                connection.exec_driver_sql("SELECT 1")
        except DBAPIError as error:
            where = self.engine.url.render_as_string(hide_password=True)
            reason = str(error.orig).strip().splitlines()[0] if error.orig else "no answer"
            raise SetupError(
                f"The database {where} cannot be reached ({reason}): start it, or correct "
                "SKIPLINE_DATABASE_URL"
            ) from None

    def dispose(self) -> None:
        self.engine.dispose()


def _postgresql_engine(url: str) -> Engine:
    """An engine that asks a connection whether it still lives before it is used again, as
    SQLAlchemy's `pool_pre_ping` does, but not at every turn of a busy one."""
    engine = create_engine(url, pool_size=8, connect_args=_PATIENCE)

    @event.listens_for(engine, "connect")
    def _bound_transactions(connection: Any, record: ConnectionPoolEntry) -> None:
        milliseconds = round(1000 * IDLE_TRANSACTION_SECONDS)
        connection.execute(f"SET idle_in_transaction_session_timeout = {milliseconds}").close()
        connection.commit()

    @event.listens_for(engine, "handle_error")
    def _was_put_out(context: ExceptionContext) -> OperationalError | None:
        """As when the server is away: what was begun is begun again."""
        if getattr(context.original_exception, "sqlstate", None) != IDLE_TOO_LONG:
            return None
        context.is_disconnect = True
        return OperationalError(
            context.statement, None, context.original_exception, connection_invalidated=True
        )

    @event.listens_for(engine, "checkin")
    def _note_use(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["used_at"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _check(connection: Any, record: ConnectionPoolEntry, proxy: Any) -> None:
        used_at = record.info.get("used_at")
        if used_at is None or time.monotonic() - used_at < TRUSTED_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error:
            raise DisconnectionError from None  # The pool takes another, or makes one.

    return engine


def _sqlite_engine(url: str, path: str | None) -> Engine:
    if not path or path == ":memory:":
        raise SetupError("SQLite needs a file: sqlite:////a/folder/skipline.sqlite3")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"The folder {Path(path).parent} cannot be written ({error.strerror}): "
            "set SKIPLINE_HOME to one that can"
        ) from None
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, record: Any) -> None:
        # The driver begins no transaction of its own; `_begin` does.
        connection.isolation_level = None
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
