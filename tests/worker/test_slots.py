"""A worker's slots: who gets which GPUs, when the database is asked, and how a worker leaves. The
database is real; attempts are carried out by an executor that does what the test says."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from shared import lifecycle, repository
from shared import settings as settings_module
from shared.database import Database
from shared.lifecycle import Fence
from shared.settings import Settings
from shared.tables import Attempt, Worker
from skipline.catalog import ClusterFacts
from skipline.schemas import JobStatus
from tests.conftest import make_settings
from tests.e2e.conftest import wait_for
from tests.shared.jobs import add_job, get
from worker import slots
from worker.slots import Slots

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For rules in which the database has no part: a schema of PostgreSQL takes half a second."""


class Hands:
    """An executor without processes: a job ends when the test says so, or the worker drains."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.gpus: dict[str, list[int]] = {}
        """Of the jobs that run."""
        self.ended: list[str] = []
        self.put_backs: list[bool] = []
        self.num_warm_ups = 0
        self.is_deaf = False
        self.fails = False
        self._draining = threading.Event()
        self._may_end: set[str] = set()
        self._news = threading.Condition()

    def prepare(self) -> str:
        return uuid.uuid4().hex

    def put_back(self, owner: str, *, may_own: bool = False) -> None:
        self.put_backs.append(may_own)

    def run(self, fence: Fence, gpus: Sequence[int], claimed_at: float) -> None:
        with self._news:
            self.gpus[fence.job_id] = list(gpus)
            try:
                if self.fails:
                    raise OSError("no more processes")
                self._news.wait_for(lambda: self._is_over(fence.job_id))
            finally:
                del self.gpus[fence.job_id]
            self.ended.append(fence.job_id)
        with self._database.session_scope() as session:
            if fence.job_id in self._may_end:
                lifecycle.finish(session, fence, JobStatus.succeeded, result={})
            else:
                lifecycle.release(session, fence, "The worker leaves")

    def _is_over(self, job_id: str) -> bool:
        return job_id in self._may_end or (self._draining.is_set() and not self.is_deaf)

    def end(self, *job_ids: str) -> None:
        with self._news:
            self._may_end |= set(job_ids)
            self._news.notify_all()

    def warm_up(self) -> None:
        self.num_warm_ups += 1

    def drain(self) -> None:
        with self._news:
            self._draining.set()
            self._news.notify_all()

    def close(self) -> None: ...


class Team:
    """Workers that leave with the test."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.settings = settings
        self.database = database
        self.hands = Hands(database)
        self._made: list[Slots] = []

    def add(self, num_slots: int = 1, *, start: bool = True, **settings: Any) -> Slots:
        own = self.settings.model_copy(update={"idle_look_seconds": 0.02} | settings)
        worker = Slots(own, self.database, num_slots, self.hands)
        self._made.append(worker)
        if start:
            worker.start()
        return worker

    def close(self) -> None:
        self.hands.is_deaf = False
        for worker in self._made:
            worker.close()

    def wait_for_jobs(self, *job_ids: str) -> dict[str, list[int]]:
        """Returns the GPUs of the jobs that run once these do, and no others."""
        wait_for(lambda: set(self.hands.gpus) == set(job_ids), f"run of {job_ids}", 10)
        return dict(self.hands.gpus)


@pytest.fixture
def team(settings: Settings, database: Database) -> Iterator[Team]:
    made = Team(settings, database)
    yield made
    made.close()


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = tmp_path / "devices"
    devices.mkdir()
    for number in range(4):
        (devices / f"nvidia{number}").touch()
    monkeypatch.setattr(settings_module, "DEVICE_FILES", devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(devices))  # No driver's tool.


def add(database: Database, device: str, num_processes: int = 1, **keys: Any) -> str:
    resources = {"device": device, "num_processes": num_processes}
    return add_job(database, resources=resources, **keys)


def workers(database: Database) -> list[Worker]:
    with database.read_scope() as session:
        return list(session.scalars(select(Worker).order_by(Worker.started_at, Worker.id)))


# ------------------------------------------------------------------------------------- placement


@pytest.mark.usefixtures("four_gpus")
def test_four_gpus_run_four_jobs_of_one_gpu_at_once(team: Team) -> None:
    jobs = [add(team.database, "cuda") for _ in range(5)]
    team.add(4)
    gpus = team.wait_for_jobs(*jobs[:4])
    assert [gpus[job] for job in jobs[:4]] == [[0], [1], [2], [3]]
    with team.database.read_scope() as session:
        noted = session.execute(select(Attempt.job_id, Attempt.gpus)).all()
    assert dict(noted) == gpus

    team.hands.end(jobs[2])
    gpus = team.wait_for_jobs(jobs[0], jobs[1], jobs[3], jobs[4])
    assert gpus[jobs[4]] == [2]


@pytest.mark.usefixtures("four_gpus")
def test_four_gpus_run_one_job_of_four_and_whoever_comes_later_waits(team: Team) -> None:
    first, large, small = (
        add(team.database, "cuda"),
        add(team.database, "cuda", 4),
        add(team.database, "cuda"),
    )
    worker = team.add(4)
    assert team.wait_for_jobs(first) == {first: [0]}
    worker.ring()
    team.hands.end(first)
    assert team.wait_for_jobs(large) == {large: [0, 1, 2, 3]}
    team.hands.end(large)
    assert team.wait_for_jobs(small) == {small: [0]}
    assert team.hands.ended == [first, large]


@pytest.mark.usefixtures("four_gpus")
def test_jobs_for_the_cpu_pass_one_that_waits_for_gpus_and_take_none(team: Team) -> None:
    one, large, cpu, auto = (
        add(team.database, "cuda"),
        add(team.database, "cuda", 4),
        add(team.database, "cpu"),
        add(team.database, "auto", 8),
    )
    team.add(4)
    assert team.wait_for_jobs(one, cpu, auto) == {one: [0], cpu: [], auto: []}
    with team.database.read_scope() as session:
        query = select(Attempt.gpus).where(Attempt.job_id.in_([cpu, auto]))
        assert session.scalars(query).all() == [None, None]
    assert get(team.database, large).status == JobStatus.queued


@on_sqlite
@pytest.mark.usefixtures("four_gpus")
def test_there_are_never_more_jobs_than_slots(team: Team) -> None:
    jobs = [add(team.database, "cuda") for _ in range(3)]
    team.add(2)
    team.wait_for_jobs(*jobs[:2])
    team.hands.end(jobs[0])
    assert team.wait_for_jobs(*jobs[1:])[jobs[2]] == [0]


@on_sqlite
@pytest.mark.usefixtures("four_gpus")
def test_a_job_for_more_gpus_than_there_are_is_left_alone(team: Team) -> None:
    job = add(team.database, "cuda", 8)
    small = add(team.database, "cuda")
    team.add(2)
    team.wait_for_jobs(small)
    assert get(team.database, job).attempt == 0


@on_sqlite
@pytest.mark.usefixtures("four_gpus")
def test_gpus_of_an_attempt_that_could_not_be_carried_out_are_free_again(team: Team) -> None:
    job = add(team.database, "cuda", 4)
    team.hands.fails = True
    worker = team.add(4)
    wait_for(lambda: get(team.database, job).attempt == 1, "first attempt", 10)
    wait_for(lambda: worker._num_free == 4, "free slots", 10)
    assert sorted(worker._free_gpus) == [0, 1, 2, 3]


# ---------------------------------------------------------------------------- looking at the queue


@on_sqlite
def test_a_ring_is_answered_at_once(team: Team) -> None:
    worker = team.add(idle_look_seconds=60.0)
    wait_for(lambda: workers(team.database), "first look", 10)
    job = add(team.database, "cpu")
    began = time.monotonic()
    worker.ring()
    team.wait_for_jobs(job)
    assert time.monotonic() - began < 5


@on_sqlite
def test_a_slot_that_becomes_free_is_filled_without_a_ring(team: Team) -> None:
    jobs = [add(team.database, "cpu") for _ in range(3)]
    team.add(idle_look_seconds=60.0)
    for job in jobs:
        team.wait_for_jobs(job)
        team.hands.end(job)
    team.wait_for_jobs()
    assert team.hands.ended == jobs


@on_sqlite
def test_a_busy_worker_holds_one_message_until_it_has_a_slot(team: Team) -> None:
    worker = team.add()
    job = add(team.database, "cpu")
    team.wait_for_jobs(job)
    with ThreadPoolExecutor(1) as pool:
        ring = pool.submit(worker.ring)
        with pytest.raises(TimeoutError):
            ring.result(timeout=0.2)
        team.hands.end(job)
        ring.result(timeout=10)


@on_sqlite
def test_a_busy_worker_gets_ready_for_the_next_job(team: Team) -> None:
    job = add(team.database, "cpu")
    team.add()
    team.wait_for_jobs(job)
    before = team.hands.num_warm_ups
    wait_for(lambda: team.hands.num_warm_ups >= before + 2, "two more warm-ups", 10)
    assert set(team.hands.gpus) == {job}


def writes(database: Database) -> tuple[list[str], Callable[[], None]]:
    """The statements that change something from here on, and what ends the recording."""
    found: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.lstrip().startswith(("SELECT", "BEGIN ", "BEGIN")) or "IMMED" in statement:
            found.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    return found, lambda: event.remove(database.engine, "before_cursor_execute", note)


def test_an_idle_worker_only_reads(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    is_work_for = repository.is_work_for

    def count(*arguments: Any) -> bool:
        nonlocal looks
        looks += 1
        return is_work_for(*arguments)

    monkeypatch.setattr(repository, "is_work_for", count)
    team.add()
    wait_for(lambda: workers(team.database), "worker that is seen", 10)
    wait_for(lambda: looks > 0, "first look", 10)
    written, stop = writes(team.database)
    before = looks
    wait_for(lambda: looks >= before + 5, "five looks", 10)
    stop()
    assert written == []


def test_a_database_that_is_away_at_a_claim_leaves_no_one_to_be_forgotten(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = add(team.database, "cpu")
    claim = lifecycle.claim
    failures = iter([True])

    def away(*arguments: Any) -> Any:
        claimed = claim(*arguments)
        if next(failures, False):
            raise OperationalError("UPDATE", {}, Exception("gone"))
        return claimed

    monkeypatch.setattr(lifecycle, "claim", away)
    team.add()
    team.wait_for_jobs(job)
    assert team.hands.put_backs[0] is True
    assert True not in team.hands.put_backs[1:]
    assert get(team.database, job).attempt == 1


# --------------------------------------------------------------------------- what others see of it


def test_a_worker_is_seen_from_its_start_until_it_closes(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "num_gpus", lambda settings: 2)
    monkeypatch.setattr(slots, "num_cores", lambda: 3)
    one, other = team.add(2), team.add()
    wait_for(lambda: len(workers(team.database)) == 2, "workers that are seen", 10)
    rows = workers(team.database)
    assert {(row.num_gpus, row.num_cores) for row in rows} == {(2, 3)}
    assert sorted(row.num_slots for row in rows) == [1, 2]
    assert {device["type"] for row in rows for device in row.devices or []} == {"cpu"}
    with team.database.read_scope() as session:
        assert repository.cluster_facts(session) == ClusterFacts(max_gpus=2)
    one.close()
    assert [row.num_slots for row in workers(team.database)] == [1]
    other.close()
    assert workers(team.database) == []


@on_sqlite
@pytest.mark.usefixtures("four_gpus")
def test_others_see_whose_a_gpu_is(team: Team) -> None:
    job = add(team.database, "cuda", 2)
    team.add(4)
    team.wait_for_jobs(job)
    with team.database.read_scope() as session:
        [worker] = repository.list_workers(session)
    assert worker.job_ids == [job]
    gpus = [device for device in worker.devices if device.type == "cuda"]
    assert [(gpu.index, gpu.name, gpu.job_id) for gpu in gpus] == [
        (0, "GPU 0", job),
        (1, "GPU 1", job),
        (2, "GPU 2", None),
        (3, "GPU 3", None),
    ]


@on_sqlite
def test_a_worker_shows_itself_again_when_it_is_time_and_not_before(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = team.add(start=False)
    worker._show()
    [first] = workers(team.database)
    worker._show()
    assert workers(team.database)[0].seen_at == first.seen_at
    monkeypatch.setattr(slots, "SHOW_SECONDS", 0.0)
    worker._show_at = 0.0
    wait_for(lambda: _seen_later(worker, team.database, first), "later sight", 10)


def _seen_later(worker: Slots, database: Database, first: Worker) -> bool:
    worker._show()
    [again] = workers(database)
    return again.id == first.id and again.seen_at > first.seen_at


@on_sqlite
def test_a_database_that_is_away_is_shown_the_worker_later(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("INSERT", {}, Exception("gone"))

    with monkeypatch.context() as patched:
        patched.setattr(repository, "see_worker", away)
        worker = team.add(start=False)
        worker._show()
    assert workers(team.database) == []
    worker.start()
    wait_for(lambda: workers(team.database), "worker that is seen", 10)
    with monkeypatch.context() as patched:
        patched.setattr(repository, "forget_worker", away)
        worker.close()
    assert len(workers(team.database)) == 1


# ---------------------------------------------------------------------------------------- leaving


@on_sqlite
def test_a_worker_that_drains_says_so_at_once_and_takes_no_more(team: Team) -> None:
    team.hands.is_deaf = True
    jobs = [add(team.database, "cpu") for _ in range(3)]
    worker = team.add(2, idle_look_seconds=60.0)
    team.wait_for_jobs(*jobs[:2])
    worker.drain()
    wait_for(lambda: workers(team.database)[0].is_draining, "sight of the drain", 5)
    team.hands.end(jobs[0])
    worker.ring()
    team.wait_for_jobs(jobs[1])
    team.hands.end(jobs[1])
    worker.close()
    assert get(team.database, jobs[2]).attempt == 0
    assert workers(team.database) == []


@on_sqlite
def test_a_worker_leaves_as_soon_as_its_jobs_are_given_back(team: Team) -> None:
    jobs = [add(team.database, "cpu") for _ in range(2)]
    worker = team.add(2)
    team.wait_for_jobs(*jobs)
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 5
    assert [get(team.database, job).status for job in jobs] == [JobStatus.queued] * 2


@on_sqlite
def test_a_worker_leaves_within_the_grace_period_whatever_its_jobs_do(team: Team) -> None:
    team.hands.is_deaf = True
    job = add(team.database, "cpu")
    worker = team.add(2, grace_seconds=1.0)
    team.wait_for_jobs(job)
    began = time.monotonic()
    worker.close()
    assert 0.8 < time.monotonic() - began < 2
    assert get(team.database, job).status == JobStatus.running


def test_a_worker_whose_database_is_away_leaves_within_the_grace_period(tmp_path: Path) -> None:
    nowhere = SecretStr("postgresql://127.0.0.1:1/nothing")
    own = make_settings(
        home=tmp_path, database_url=nowhere, idle_look_seconds=0.05, grace_seconds=2.0
    )
    database = Database(own.database)
    worker = Slots(own, database, 2, Hands(database))
    worker.start()
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 2.5
    database.dispose()
