"""What tests of every area share: an empty database of each kind, and a broker of each kind.

A PostgreSQL is taken from SKIPLINE_TEST_POSTGRES_URL and a Redis from SKIPLINE_TEST_REDIS_URL, by
default from this machine. A server that is missing is a skip with the reason, and a failure in CI.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from shared import schema
from shared.database import Database
from shared.settings import Settings
from tests.soak.servers import Missing, Redis

POSTGRES_URL = "SKIPLINE_TEST_POSTGRES_URL"
REDIS_URL = "SKIPLINE_TEST_REDIS_URL"
NUM_REDIS_DATABASES = 16
CLAIM_SECONDS = 3600
TESTS = Path(__file__).parent
ALONE = ("test_docs.py", "test_containers.py")
"""Files of tests that start whole services, as those in `e2e` do: all else shares the cores."""


def _missing(what: str, variable: str) -> NoReturn:
    reason = f"No {what} answers: start one, or name one in {variable}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(TESTS)
        if path.parts[0] == "e2e" or path.name in ALONE:
            item.add_marker("alone")


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SKIPLINE_") and not name.startswith("SKIPLINE_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a database that only this run of the tests uses."""
    given = os.environ.get(POSTGRES_URL, "postgresql://postgres@127.0.0.1:5432/test")
    server = make_url(given).set(drivername="postgresql+psycopg")
    admin = create_engine(server, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    name = f"skipline_test_{uuid.uuid4().hex[:12]}"
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError:
        _missing("PostgreSQL", POSTGRES_URL)
    yield make_url(given).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, one test of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.sqlite3'}"
    url: str = request.getfixturevalue("postgres_schema_url")
    return url


@pytest.fixture(scope="session")
def new_postgres_schema(postgres_url: str) -> Iterator[Callable[[], str]]:
    """Makes empty schemas and returns their URLs: quicker than a database each."""
    url = make_url(postgres_url)
    admin = create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")

    def make() -> str:
        name = f"test_{uuid.uuid4().hex}"
        with admin.connect() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
        own = url.update_query_dict({"options": f"-csearch_path={name}"})
        return own.render_as_string(hide_password=False)

    yield make
    admin.dispose()


@pytest.fixture
def postgres_schema_url(new_postgres_schema: Callable[[], str]) -> str:
    """The URL of an empty schema; it goes with its database."""
    return new_postgres_schema()


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    """Settings with a home of the test's own and the file-system broker, on each database."""
    return make_settings(home=tmp_path / "home", database_url=SecretStr(database_url))


def make_settings(**values: Any) -> Settings:
    """Settings that read no `.env`. No model is converted beside a test, unless it is what the
    test is about."""
    values.setdefault("predict_backend", "torch")
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """An empty database with the newest schema, of each kind."""
    opened = Database(settings.database)
    schema.migrate(opened)
    yield opened
    opened.dispose()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a Redis database that only this run of the tests uses."""
    base = os.environ.get(REDIS_URL, "redis://127.0.0.1:6379").rstrip("/")
    for number in range(NUM_REDIS_DATABASES - 1, 0, -1):
        client = redis.Redis.from_url(f"{base}/{number}", socket_connect_timeout=3)
        try:
            claimed = client.set("skipline-tests", os.getpid(), nx=True, ex=CLAIM_SECONDS)
        except redis.RedisError:
            _missing("Redis", REDIS_URL)
        if claimed and client.dbsize() == 1:
            yield f"{base}/{number}"
            client.flushdb()
            client.close()
            return
        if claimed:  # Somebody else's data: leave it as it was.
            client.delete("skipline-tests")
        client.close()
    pytest.fail(f"No empty database is left in the Redis of {REDIS_URL}")


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Redis]:
    """A Redis of the test's own, which can be killed and started again at its address."""
    server = Redis(tmp_path)
    try:
        server.start()
    except Missing:
        _missing("redis-server", "PATH")
    yield server
    server.kill()


@pytest.fixture(params=["filesystem", "redis"])
def broker_url(request: pytest.FixtureRequest) -> str | None:
    """The URL of an empty broker, one test of each kind; None means the file-system broker."""
    if request.param == "filesystem":
        return None
    url: str = request.getfixturevalue("redis_url")
    client = redis.Redis.from_url(url)
    client.flushdb()
    client.set("skipline-tests", os.getpid(), ex=CLAIM_SECONDS)
    client.close()
    return url
