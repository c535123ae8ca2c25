"""What a supervisor tells its trainer, and what becomes of the job when that ends. The trainers are
real processes, which do what the test says instead of training; the database is real."""

from __future__ import annotations

import json
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shared import lifecycle, locks, repository
from shared.database import Database
from shared.hints import Hints
from shared.lifecycle import Action, Fence
from shared.settings import Settings
from shared.tables import Attempt
from skipline.schemas import JobStatus
from tests.e2e.conftest import wait_for
from tests.shared.jobs import add_job, ask, event_types, get, status
from worker import logs, trainer_process
from worker.logs import LogShipper
from worker.supervisor import Supervisor
from worker.trainer_process import TrainerProcess

CHILD = textwrap.dedent(
    """
    import os, signal, sys, threading, time
    def say(*words):
        print(*words, flush=True)
    say("job", sys.stdin.readline().strip())
    def hear():
        for line in sys.stdin:
            say("order", line.strip(), time.monotonic())
            on_order(line.strip())
        os._exit(70)
    def on_order(order):
        pass
    def run():
        signal.pause()
    {}
    threading.Thread(target=hear, daemon=True).start()
    run()
    """
)
"""A trainer that says what it hears. Its test adds what it does."""

Child = Callable[[str], None]

OBEYS = """
def on_order(order):
    os._exit(0)
"""
DEAF = """
signal.signal(signal.SIGTERM, lambda *_: say("term", time.monotonic()))
def run():
    while True:
        time.sleep(60)
"""


on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For rules in which the database has no part: a schema of PostgreSQL takes half a second."""


class KeptHints(Hints):
    """Keeps the hints that were given."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.given: list[str] = []

    def publish(self, job_id: str) -> None:
        self.given.append(job_id)


class Watch:
    """An attempt under its supervisor."""

    def __init__(self, settings: Settings, database: Database, **keys: Any) -> None:
        self.settings, self.database = settings, database
        self.draining = threading.Event()
        self.hints = KeptHints(settings)
        self.trainer = TrainerProcess(settings, 1)
        self.job_id = add_job(database, **keys)
        with database.session_scope() as session:
            claim = lifecycle.claim(
                session, self.trainer.owner, locks.host_name(), 60, lifecycle.Capacity(("auto",))
            )
        assert claim is not None
        assert claim.fence.job_id == self.job_id
        self.fence: Fence = claim.fence
        self._pool = ThreadPoolExecutor(1)
        self._end: Future[None] | None = None

    def begin(self) -> None:
        supervisor = Supervisor(
            self.settings,
            self.database,
            self.hints,
            self.trainer,
            self.fence,
            [],
            time.monotonic(),
            self.draining,
        )
        self._end = self._pool.submit(supervisor.run)

    def begin_and_wait(self) -> None:
        """Returns when the trainer has its job."""
        self.begin()
        wait_for(lambda: "job " in self.printed(), "trainer that has its job", 20)

    def end(self) -> None:
        assert self._end is not None
        self._end.result(timeout=30)
        self._pool.shutdown()

    def printed(self) -> str:
        try:
            return self.trainer.log_path.read_text()
        except FileNotFoundError:
            return ""

    def orders(self) -> list[str]:
        return re.findall(r"^order (\w+)", self.printed(), re.MULTILINE)

    def said_at(self, word: str) -> float:
        """When the trainer said this, by the clock of this machine."""
        return float(re.findall(rf"^{word} (\S+)$", self.printed(), re.MULTILINE)[0])

    def attempt(self) -> Attempt:
        with self.database.read_scope() as session:
            return session.scalars(select(Attempt).where(Attempt.job_id == self.job_id)).one()


@pytest.fixture
def quick(settings: Settings) -> Settings:
    return settings.model_copy(update={"control_seconds": 0.02})


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    """Makes trainers processes that do this."""

    def use(code: str) -> None:
        command = (sys.executable, "-S", "-E", "-c", CHILD.format(code))
        monkeypatch.setattr(trainer_process, "COMMAND", command)

    return use


@contextmanager
def watching(settings: Settings, database: Database, **keys: Any) -> Iterator[Watch]:
    watch = Watch(settings, database, **keys)
    watch.begin_and_wait()
    yield watch
    watch.end()


# ----------------------------------------------------------------------------------------- orders


@on_sqlite
@pytest.mark.parametrize(
    ("action", "order"), [("stop", "stop"), ("pause", "release"), ("cancel", "cancel")]
)
def test_each_request_reaches_the_trainer_as_its_order(
    action: Action, order: str, quick: Settings, database: Database, child: Child
) -> None:
    child(OBEYS)
    with watching(quick, database) as watch:
        ask(database, watch.job_id, action)
    assert watch.orders() == [order]


@on_sqlite
def test_an_order_reaches_the_trainer_within_two_seconds(
    settings: Settings, database: Database, child: Child
) -> None:
    child(OBEYS)
    with watching(settings, database) as watch:
        asked_at = time.monotonic()
        ask(database, watch.job_id, "pause")
    assert 0 < watch.said_at("order release") - asked_at < 2


@on_sqlite
def test_a_stronger_order_takes_the_place_of_a_weaker_one_and_never_the_reverse(
    quick: Settings, database: Database, child: Child
) -> None:
    child("")
    with watching(quick, database) as watch:
        ask(database, watch.job_id, "stop")
        wait_for(lambda: watch.orders() == ["stop"], "first order", 10)
        watch.draining.set()
        wait_for(lambda: watch.orders() == ["stop", "release"], "second order", 10)
        ask(database, watch.job_id, "cancel")
        wait_for(lambda: len(watch.orders()) == 3, "third order", 10)
        watch.trainer.signal(signal.SIGKILL)
    assert watch.orders() == ["stop", "release", "cancel"]


@on_sqlite
def test_a_trainer_that_does_not_obey_is_ended_within_the_grace_period_of_its_last_order(
    quick: Settings, database: Database, child: Child
) -> None:
    child(DEAF)
    with watching(quick.model_copy(update={"grace_seconds": 1.0}), database) as watch:
        watch.draining.set()
        wait_for(lambda: watch.orders() == ["release"], "first order", 10)
        time_to_ask = watch.said_at("order release") + 0.4
        wait_for(lambda: time.monotonic() > time_to_ask, "middle of the grace period", 10)
        ask(database, watch.job_id, "cancel")
        wait_for(lambda: not watch.trainer.is_alive, "end of the trainer", 10)
        ended_at = time.monotonic()
    ordered_at = watch.said_at("order cancel")
    assert 0.6 < watch.said_at("term") - ordered_at < 1
    assert 0.7 < ended_at - ordered_at < 1.5
    assert status(database, watch.job_id) is JobStatus.cancelled


@on_sqlite
def test_a_trainer_that_stops_may_take_its_time(
    quick: Settings, database: Database, child: Child
) -> None:
    child("def on_order(order):\n    time.sleep(0.6)\n    os._exit(5)")
    with watching(quick.model_copy(update={"grace_seconds": 0.2}), database) as watch:
        ask(database, watch.job_id, "stop")
    assert watch.attempt().reason == "The trainer ended with exit code 5"


# ------------------------------------------------------------------- what becomes of the job then


@pytest.mark.parametrize(
    ("action", "target", "crashes"),
    [
        (None, JobStatus.queued, 1),
        ("pause", JobStatus.paused, 1),
        ("stop", JobStatus.queued, 1),
        ("cancel", JobStatus.cancelled, 0),
    ],
)
def test_a_job_whose_trainer_died_goes_where_its_state_says(
    action: Action | None,
    target: JobStatus,
    crashes: int,
    quick: Settings,
    database: Database,
    child: Child,
) -> None:
    child("")
    with watching(quick, database) as watch:
        if action is not None:
            ask(database, watch.job_id, action)
            wait_for(watch.orders, "order", 10)
        watch.trainer.signal(signal.SIGKILL)
    job = get(database, watch.job_id)
    assert (job.status, job.crashes) == (target, crashes)
    assert job.stop_requested == (action == "stop")
    attempt = watch.attempt()
    assert attempt.outcome == ("cancelled" if action == "cancel" else "lost")
    if action != "cancel":
        assert attempt.reason == "The trainer was killed by signal 9"


@on_sqlite
@pytest.mark.parametrize(
    ("action", "target", "outcome"),
    [
        (None, JobStatus.queued, "released"),
        ("pause", JobStatus.paused, "paused"),
        ("stop", JobStatus.queued, "released"),
    ],
)
def test_a_trainer_that_dies_while_its_worker_leaves_is_no_crash(
    action: Action | None,
    target: JobStatus,
    outcome: str,
    quick: Settings,
    database: Database,
    child: Child,
) -> None:
    child("")
    with watching(quick, database) as watch:
        if action is not None:
            ask(database, watch.job_id, action)
            wait_for(watch.orders, "order", 10)
        watch.draining.set()
        wait_for(lambda: "release" in watch.orders(), "release", 10)
        watch.trainer.signal(signal.SIGTERM)
    job = get(database, watch.job_id)
    assert (job.status, job.crashes, watch.attempt().outcome) == (target, 0, outcome)


@on_sqlite
def test_a_trainer_that_keeps_crashing_fails_its_job_with_its_last_words(
    quick: Settings, database: Database, child: Child
) -> None:
    child("def run():\n    say('one\\ntwo')\n    sys.exit('out of luck')")
    watch = Watch(quick.model_copy(update={"max_crashes": 1}), database)
    watch.begin()
    watch.end()
    error = get(database, watch.job_id).error
    assert error is not None
    assert error["code"] == "trainer_crashed"
    assert error["message"].startswith("The trainer ended with exit code 1. ")
    assert error["message"].endswith("\none\ntwo\nout of luck")


@on_sqlite
def test_a_trainer_that_settles_its_job_itself_is_left_alone(
    quick: Settings, database: Database, child: Child
) -> None:
    child("def run():\n    time.sleep(0.5)\n    say('a last word')\n    os._exit(1)")
    with watching(quick, database) as watch, database.session_scope() as session:
        lifecycle.finish(session, watch.fence, JobStatus.succeeded, result={})
    assert get(database, watch.job_id).crashes == 0
    assert watch.attempt().outcome == "succeeded"
    assert read_log(database, watch.fence).endswith("a last word\n")


@on_sqlite
def test_a_trainer_that_cannot_be_started_gives_its_job_back_uncounted(
    quick: Settings, database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trainer_process, "COMMAND", (str(tmp_path / "nothing"),))
    watch = Watch(quick, database)
    watch.begin()
    with pytest.raises(FileNotFoundError):
        watch.end()
    job = get(database, watch.job_id)
    assert (job.status, job.crashes, watch.attempt().outcome) == (JobStatus.queued, 0, "released")
    assert locks.is_dead(quick.home_path / "locks", watch.trainer.owner)


@on_sqlite
def test_a_trainer_learns_its_gpus_with_its_job(
    quick: Settings, database: Database, child: Child
) -> None:
    child("")
    trainer = TrainerProcess(quick, 1)
    fence = Fence("job", 2, trainer.owner)
    trainer.begin(fence, [1, 3])
    wait_for(lambda: "job " in trainer.last_output(), "trainer that has its job", 20)
    document = json.loads(trainer.last_output().removeprefix("job "))
    assert document == {"job_id": "job", "attempt": 2, "owner": trainer.owner, "gpus": [1, 3]}
    trainer.close()


@on_sqlite
def test_hints_are_given_when_an_attempt_begins_and_ends(
    quick: Settings, database: Database, child: Child
) -> None:
    child(OBEYS)
    with watching(quick, database) as watch:
        assert watch.hints.given == [watch.job_id]
        ask(database, watch.job_id, "cancel")
    assert watch.hints.given == [watch.job_id] * 2
    assert event_types(database, watch.job_id)[-1] == "cancelled"


# ------------------------------------------------------------------------------------------- logs


def read_log(database: Database, fence: Fence) -> str:
    with database.read_scope() as session:
        return repository.read_log(session, fence.job_id, fence.attempt)


@on_sqlite
def test_what_a_trainer_prints_can_be_read_while_it_runs_and_to_its_end(
    quick: Settings, database: Database, child: Child
) -> None:
    child("def on_order(order):\n    say('a last word')\n    os._exit(0)")
    with watching(quick, database) as watch:
        wait_for(lambda: "job {" in read_log(database, watch.fence), "first output", 10)
        ask(database, watch.job_id, "cancel")
    log = read_log(database, watch.fence)
    assert log == watch.printed()
    assert log.endswith("a last word\n")


@pytest.fixture
def fence(database: Database) -> Fence:
    add_job(database)
    with database.session_scope() as session:
        claim = lifecycle.claim(session, "w1", "host", 60, lifecycle.Capacity(("auto",)))
    assert claim is not None
    return claim.fence


def test_characters_are_never_cut_and_what_is_none_is_replaced(
    database: Database, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PART_BYTES", 4)
    path = tmp_path / "log"
    whole = "größer\0 als 5 €: ".encode() + b"\xff\xfe" + "…".encode()
    shipper = LogShipper(database, fence, path, 1000)
    for end in range(len(whole) + 1):  # As if each byte came by itself.
        path.write_bytes(whole[:end])
        shipper.ship()
    path.write_bytes(whole + b"\xe2\x82")
    shipper.ship()
    assert read_log(database, fence) == "größer als 5 €: ��…"
    shipper.ship_rest()
    assert read_log(database, fence) == "größer als 5 €: ��…�"


def test_the_oldest_output_goes_first(database: Database, fence: Fence, tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [f"line {number:04}\n" for number in range(25)]
    shipper = LogShipper(database, fence, path, 45)
    for line in lines:
        with path.open("a") as file:
            file.write(line)
        shipper.ship()
    assert read_log(database, fence) == "".join(lines[-4:])
    with path.open("a") as file:
        file.write("more")
    shipper.ship_rest()
    assert read_log(database, fence) == "".join([*lines[-4:], "more"])
    with path.open("a") as file:
        file.write(" and more")
    shipper.ship_rest()
    assert read_log(database, fence) == "".join([*lines[-3:], "more and more"])


@on_sqlite
def test_output_that_comes_too_fast_is_passed_over_but_for_its_end(
    database: Database, fence: Fence, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    shipper = LogShipper(database, fence, path, 1000)
    path.write_text("a beginning\n")
    shipper.ship()
    with path.open("a") as file:
        file.write("€" * 1_000_000)
    began = time.monotonic()
    shipper.ship_rest()
    assert time.monotonic() - began < 5
    assert read_log(database, fence) == "€" * 333


def test_an_unreachable_database_costs_no_output_and_doubles_none(
    database: Database, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    path.write_text("one ")
    shipper = LogShipper(database, fence, path, 1000)
    real = Database.session_scope

    @contextmanager
    def away(own: Database) -> Iterator[Session]:
        raise OperationalError("BEGIN", {}, Exception("gone"))
        yield

    @contextmanager
    def unanswered(own: Database) -> Iterator[Session]:
        with real(own) as session:
            yield session
        raise OperationalError("COMMIT", {}, Exception("gone"))

    for scope, more in ((away, "two "), (unanswered, "three "), (away, "four")):
        with monkeypatch.context() as patched:
            patched.setattr(Database, "session_scope", scope)
            shipper.ship()
        with path.open("a") as file:
            file.write(more)
    shipper.ship_rest()
    assert read_log(database, fence) == "one two three four"


def test_output_of_a_job_that_was_deleted_is_dropped(
    database: Database, fence: Fence, tmp_path: Path
) -> None:
    with database.session_scope() as session:
        lifecycle.finish(session, fence, JobStatus.succeeded, result={})
        repository.delete_job(session, fence.job_id)
    path = tmp_path / "log"
    path.write_text("a last word")
    LogShipper(database, fence, path, 1000).ship_rest()
    assert read_log(database, fence) == ""
