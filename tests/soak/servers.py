"""The processes of a soak: a PostgreSQL and a Redis of its own, an API and workers, on loopback.

Each can be killed and started again. Knows nothing of jobs.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import redis
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

START_SECONDS = 90.0
POSTGRES_USERS = ("postgres", "nobody")
"""Who runs PostgreSQL where the soak is run by root, whom it refuses."""
POSTGRES_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "fsync": "off",  # The machine does not lose its power, only its processes.
}


class Missing(Exception):
    """A server that a soak needs is not installed."""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> Any:
    """The first true value of `condition`. Raises `TimeoutError` when none comes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"no {what} within {seconds:.0f} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server(Protocol):
    """What can be killed and started again."""

    def start(self) -> None:
        """Returns when it answers."""

    def kill(self) -> None:
        """Ends it without a warning, and waits until it is gone."""


class Postgres:
    """An own instance, with an own data folder. Raises `Missing`."""

    def __init__(self, folder: Path) -> None:
        self._bin = postgres_folder()
        self._data = folder / "postgres"
        self._log_path = folder / "postgres.log"
        self._user = _postgres_user()
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._data.mkdir(mode=0o700)
        if self._user:
            shutil.chown(self._data, *self._user)
        command = [self._bin / "initdb", "-D", self._data, "-U", "soak", "-A", "trust"]
        if self._run([*command, "-E", "UTF8", "--locale=C", "--no-sync"]).wait() != 0:
            raise RuntimeError(f"initdb failed: {self._log_path.read_text()[-1000:]}")

    @property
    def url(self) -> str:
        return f"postgresql://soak@127.0.0.1:{self._port}/postgres"

    def _run(self, command: list[Any]) -> subprocess.Popen[bytes]:
        user, group = self._user or (None, None)
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                command,
                user=user,
                group=group,
                extra_groups=[] if self._user else None,
                cwd="/",
                stdout=log,
                stderr=log,
            )

    def start(self) -> None:
        options = [
            word for name, value in POSTGRES_OPTIONS.items() for word in ("-c", f"{name}={value}")
        ]
        command = [self._bin / "postgres", "-D", self._data, "-p", str(self._port), *options]
        self._process = self._run(command)
        engine = create_engine(self.url.replace("postgresql", "postgresql+psycopg"))

        def answers() -> bool:
            try:
                with engine.connect() as connection:
                    return connection.scalar(text("SELECT 1")) == 1
            except DBAPIError:
                return False

        try:
            wait_for(answers, "PostgreSQL")
        finally:
            engine.dispose()

    def kill(self) -> None:
        """As `pg_ctl stop -m immediate`: every backend ends at once, and the next start recovers
        from the log."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)


def postgres_folder() -> Path:
    """Where PostgreSQL's programs are. Raises `Missing`."""
    config = shutil.which("pg_config")
    if config is not None:
        answer = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=True)
        if (Path(answer.stdout.strip()) / "initdb").exists():
            return Path(answer.stdout.strip())
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        raise Missing("PostgreSQL's initdb is not there: install a PostgreSQL server")
    return found[-1].parent


def _postgres_user() -> tuple[int, int] | None:
    if os.geteuid() != 0:
        return None
    for name in POSTGRES_USERS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise Missing(f"PostgreSQL refuses root: there must be a user {' or '.join(POSTGRES_USERS)}")


class Redis:
    """An own instance that keeps nothing: whoever kills it wipes the broker. Raises `Missing`."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("redis-server") is None:
            raise Missing("There is no redis-server: install one")
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        command = ["redis-server", "--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)

        def answers() -> bool:
            with redis.Redis.from_url(self.url) as client:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    return False

        wait_for(answers, "Redis")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Skipline:
    """An API or a worker, with a home folder of its own, as on a host of its own."""

    def __init__(self, folder: Path, name: str, words: list[str], variables: Mapping[str, str]):
        self.home = folder / name
        self._words = words
        self._log = folder / f"{name}.log"
        others = {k: v for k, v in os.environ.items() if not k.startswith("SKIPLINE_")}
        self._environment = {**others, **variables, "SKIPLINE_HOME": str(self.home)}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns at once: what it has to do, it does when it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "skipline", *self._words],
                env=self._environment,
                cwd=self.home.parent,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self, seconds: float) -> int | None:
        """Asks it to leave; its exit code, or None when it had to be killed."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def trainers(self, *, with_job: bool = False) -> list[int]:
        """Its trainers and their ranks; or the trainers alone that have a job, whose output goes
        to a file named after it."""
        found = processes(f"SKIPLINE_HOME={self.home}\0", "worker.")
        if not with_job:
            return found
        return [pid for pid in found if _output(pid).name.count(".") == 2]


def _output(pid: int) -> Path:
    try:
        return Path(os.readlink(f"/proc/{pid}/fd/1"))
    except OSError:
        return Path("gone")


def processes(variable: str, word: str = "") -> list[int]:
    """The living processes that have `variable` in their environment and `word` in their command
    line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes()
            is_zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if variable.encode() in environment and word.encode() in command and not is_zombie:
            found.append(int(entry.name))
    return found
