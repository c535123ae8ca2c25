"""The engine: times, transactions, and what it says when it cannot be used."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from shared import database as database_module
from shared import schema
from shared.database import Database, db_now
from shared.errors import SetupError
from shared.tables import Job


def job(name: str) -> Job:
    now = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    return Job(id=name, kind="train", status="queued", spec={}, device="auto", created_at=now)


def test_times_come_back_in_utc_to_the_millisecond(database: Database) -> None:
    with database.session_scope() as session:
        session.add(job("a"))
    with database.read_scope() as session:
        stored = session.scalar(select(Job.created_at))
    assert stored == datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)


def test_the_databases_clock_tells_the_time_and_can_look_ahead(database: Database) -> None:
    with database.read_scope() as session:
        before = datetime.now(UTC)
        now, later = session.execute(select(db_now(), db_now(90.5))).one()
    assert abs(now - before) < timedelta(seconds=5)
    assert timedelta(seconds=90) < later - now < timedelta(seconds=91)


def test_the_clock_goes_on_within_a_transaction(database: Database) -> None:
    with database.session_scope() as session:
        first = session.scalar(select(db_now()))
        deadline = time.monotonic() + 5
        while session.scalar(select(db_now())) == first:
            assert time.monotonic() < deadline


def test_an_exception_takes_everything_back(database: Database) -> None:
    with pytest.raises(RuntimeError), database.session_scope() as session:
        session.add(job("a"))
        session.flush()
        raise RuntimeError
    with database.read_scope() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_writers_at_once_wait_for_each_other(database: Database) -> None:
    def write(prefix: str) -> None:
        for number in range(10):
            with database.session_scope() as session:
                count = session.scalar(select(func.count()).select_from(Job))
                assert count is not None
                session.add(job(f"{prefix}{number}"))

    threads = [threading.Thread(target=write, args=(prefix,)) for prefix in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read_scope() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 40


@pytest.mark.parametrize("url", ["mysql://localhost/x", "nonsense", "sqlite://"])
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(SetupError):
        Database(url)


def test_a_database_that_does_not_answer_is_named_without_its_password() -> None:
    database = Database("postgresql+psycopg://me:secret@127.0.0.1:1/test")
    with pytest.raises(SetupError) as raised:
        database.check()
    assert "127.0.0.1:1" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert "SKIPLINE_DATABASE_URL" in str(raised.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="SKIPLINE_HOME"):
        Database(f"sqlite:///{tmp_path}/file/skipline.sqlite3")


def test_a_process_that_falls_asleep_in_a_transaction_keeps_nobody_waiting(
    postgres_schema_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "IDLE_TRANSACTION_SECONDS", 0.5)
    opened = Database(postgres_schema_url.replace("postgresql://", "postgresql+psycopg://"))
    schema.migrate(opened)
    with opened.session_scope() as session:
        session.add(job("a"))
    lock = select(Job.id).with_for_update()
    with pytest.raises(OperationalError), opened.session_scope() as asleep:
        assert asleep.scalar(lock) == "a"
        began = time.monotonic()
        with opened.session_scope() as session:
            assert session.scalar(lock) == "a"
        assert time.monotonic() - began < 10
        asleep.scalar(lock)  # It finds that it was put out.
    with opened.read_scope() as session:
        assert session.scalar(select(Job.id)) == "a"
    opened.dispose()
