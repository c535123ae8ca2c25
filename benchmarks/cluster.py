"""What a benchmark has to itself: an empty database, a Redis, an API, workers.

All on loopback, in a temporary folder, and gone when the block ends. Knows nothing of what is
measured.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr
from sqlalchemy import create_engine, make_url, text

from benchmarks.baselines.problem import WrongUsage
from shared import schema
from shared.database import Database
from shared.settings import Settings

Kind = Literal["sqlite", "postgresql"]

POSTGRES_URL = "SKIPLINE_TEST_POSTGRES_URL"
START_SECONDS = 120.0
STOP_SECONDS = 60.0
MAX_QUEUED_JOBS = 1_000_000
"""The limit of the queue is not what is measured."""


def wait_for(
    condition: Callable[[], Any],
    what: str,
    seconds: float = START_SECONDS,
    pause_seconds: float = 0.02,
) -> Any:
    """The first true value of `condition`. Raises `SystemExit` when none comes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(pause_seconds)
    raise SystemExit(f"{what} did not come within {seconds:.0f} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def empty_database(kind: Kind, folder: Path) -> Iterator[str]:
    """The URL of a database without tables; it is dropped when the block ends. Raises
    `WrongUsage` when there is no PostgreSQL."""
    name = f"skipline_bench_{uuid.uuid4().hex[:12]}"
    if kind == "sqlite":
        yield f"sqlite:///{folder / name}.sqlite3"
        return
    given = make_url(os.environ.get(POSTGRES_URL, "postgresql://postgres@127.0.0.1:5432/test"))
    admin = create_engine(
        given.set(drivername="postgresql+psycopg"),
        isolation_level="AUTOCOMMIT",
        connect_args={"connect_timeout": 3},
    )
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except Exception as error:
        raise WrongUsage(
            f"--database postgresql: no server answers ({type(error).__name__}); start one, or "
            f"name one in {POSTGRES_URL}"
        ) from None
    try:
        yield given.set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


@contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """The URL of a Redis that keeps nothing; None where none is installed."""
    if shutil.which("redis-server") is None:
        yield None
        return
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with process(command, folder, "redis", os.environ):
        wait_for(lambda: _listens(port), "Redis")
        yield f"redis://127.0.0.1:{port}/0"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def process(
    command: Sequence[str], folder: Path, name: str, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs as long as the block; what it prints is in `folder/<name>.log`."""
    with (folder / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


class Connection:
    """One connection to a server, with as little between it and the socket as can be."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, method: str, path: str, document: object = None) -> Any:
        """The answer's JSON. Raises `RuntimeError` for any status but 2xx."""
        return json.loads(self.ask_raw(method, path, document))

    def ask_raw(self, method: str, path: str, document: object = None) -> bytes:
        body = None if document is None else json.dumps(document)
        self._http.request(method, path, body, {"Content-Type": "application/json"})
        answer = self._http.getresponse()
        content = answer.read()
        if not 200 <= answer.status < 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:500]!r}")
        return content

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()


@dataclass
class Cluster:
    """A database with the newest schema and a broker, for any number of processes."""

    folder: Path
    settings: Settings
    environment: Mapping[str, str] = field(repr=False)

    @cached_property
    def database(self) -> Database:
        return Database(self.settings.database)

    def without_redis(self) -> Cluster:
        """The same with the broker of files."""
        environment = {
            name: value for name, value in self.environment.items() if name != "SKIPLINE_BROKER_URL"
        }
        return Cluster(
            self.folder, self.settings.model_copy(update={"broker_url": None}), environment
        )

    @contextmanager
    def api(self) -> Iterator[int]:
        """A `skipline api` that is ready: its port."""
        port = free_port()
        command = [sys.executable, "-m", "skipline", "api", "--port", str(port)]
        with process(command, self.folder, f"api-{port}", self.environment) as running:

            def is_ready() -> bool:
                if running.poll() is not None:
                    raise SystemExit((self.folder / f"api-{port}.log").read_text()[-2000:])
                return _listens(port)

            wait_for(is_ready, "the API")
            yield port

    @contextmanager
    def idle_workers(self, num_workers: int) -> Iterator[None]:
        """Worker processes of one slot whose jobs do nothing; all of them look for jobs."""
        command = [sys.executable, "-m", "benchmarks.idle_worker"]
        root = str(Path(__file__).resolve().parents[1])
        environment = {**self.environment, "PYTHONPATH": root}
        with ExitStack() as stack:
            running = [
                stack.enter_context(process(command, self.folder, f"worker-{number}", environment))
                for number in range(num_workers)
            ]

            def are_there() -> bool:
                for number, one in enumerate(running):
                    if one.poll() is not None:
                        raise SystemExit((self.folder / f"worker-{number}.log").read_text()[-2000:])
                return self._num_workers() >= num_workers

            wait_for(are_there, "the workers", START_SECONDS + 5 * num_workers)
            yield

    def _num_workers(self) -> int:
        with self.database.read_scope() as session:
            return int(session.scalar(text("SELECT count(*) FROM workers")) or 0)


@contextmanager
def cluster(kind: Kind) -> Iterator[Cluster]:
    """An empty cluster of its own, with Redis where there is one."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skipline-bench-")))
        database_url = stack.enter_context(empty_database(kind, folder))
        broker_url = stack.enter_context(redis_server(folder))
        variables = {
            "SKIPLINE_HOME": str(folder / "home"),
            "SKIPLINE_DATABASE_URL": database_url,
            "SKIPLINE_MAX_QUEUED_JOBS": str(MAX_QUEUED_JOBS),
            "SKIPLINE_DEVICE": "cpu",
        }
        if broker_url is not None:
            variables["SKIPLINE_BROKER_URL"] = broker_url
        others = {k: v for k, v in os.environ.items() if not k.startswith("SKIPLINE_")}
        settings = Settings(
            _env_file=None,  # type: ignore[call-arg]
            home=folder / "home",
            database_url=SecretStr(database_url),
            broker_url=SecretStr(broker_url) if broker_url else None,
        )
        made = Cluster(folder, settings, {**others, **variables})
        schema.migrate(made.database)
        stack.callback(made.database.dispose)
        yield made
