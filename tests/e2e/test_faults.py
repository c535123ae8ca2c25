"""Killed processes lose no job: real signals to real processes, on both stacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from skipline import Skipline
from skipline.schemas import Job, JobStatus, MetricEvent, RewindEvent
from tests.e2e.conftest import (
    Service,
    bring_in,
    draw_stripes,
    faulty,
    final_weights,
    running_service,
    tiny_spec,
    wait_for,
)
from tests.soak.servers import Postgres, Redis

LONG = 10
"""Epochs of a run that faults are done to: 60 steps."""


def begin(client: Skipline, stripes: Path | None = None, **keys: Any) -> Job:
    """A long training in its fourth epoch, the checkpoint of the second one at least behind it;
    of a dataset that is there, or has to be brought in."""
    if stripes is not None:
        bring_in(client, stripes)
    job = client.submit(tiny_spec(**({"epochs": LONG} | keys)))
    wait_for(lambda: len(client.metrics(job.id).series.get("val_loss", [])) >= 3, "three epochs")
    return job


def assert_whole(client: Skipline, job: Job, *, attempt: int) -> None:
    """The job has succeeded in this attempt, and its curve has each step once."""
    ended = client.wait(job.id)
    assert ended.status is JobStatus.succeeded, ended.error
    assert ended.attempt == attempt
    series = client.metrics(job.id).series
    assert [p.step for p in series["train_loss"]] == list(range(2, 6 * LONG + 1, 2))
    assert [p.step for p in series["val_loss"]] == list(range(6, 6 * LONG + 1, 6))


def test_a_trainer_that_crashes_is_replaced_at_its_last_checkpoint(shared_service: Service) -> None:
    service = shared_service
    with service.client() as client:
        job = begin(client)
        events = client.stream_metrics(job.id)
        seen = [next(events)]
        [trainer] = service.trainers(job)
        os.kill(trainer, signal.SIGSEGV)
        seen += events  # The stream goes on through the crash.
        assert_whole(client, job, attempt=2)
        crashed, second = client.attempts(job.id)
        assert (crashed.outcome, second.outcome) == ("lost", "succeeded")
        assert "signal 11" in (crashed.reason or "")
        assert "Segmentation fault" in client.logs(job.id, attempt=1)
        assert "Segmentation fault" not in client.logs(job.id)

        curve: dict[tuple[str, int], MetricEvent] = {}
        for event in seen:
            if isinstance(event, RewindEvent):
                assert event.attempt == 2
                assert event.step >= 12
                curve = {key: point for key, point in curve.items() if point.step <= event.step}
            elif isinstance(event, MetricEvent):
                assert (event.name, event.step) not in curve
                curve[event.name, event.step] = event
        stored = client.metrics(job.id).series
        assert {key: point.value for key, point in curve.items()} == {
            (name, point.step): point.value for name, points in stored.items() for point in points
        }


def test_a_killed_worker_is_replaced_and_leaves_no_trainer(service: Service, stripes: Path) -> None:
    with service.client() as client:
        job = begin(client, stripes)
        [trainer] = service.trainers(job)
        [worker] = service.processes("skipline", "worker", "--slots")
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: trainer not in service.processes("worker.runner"), "end of the trainer")
        assert_whole(client, job, attempt=2)


def test_after_everything_was_killed_the_next_start_goes_on_at_once(
    service: Service, stripes: Path
) -> None:
    with service.client() as client:
        job = begin(client, stripes)
        for pid in service.processes():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not service.processes(), "end of all processes")
        service.start()
        # Far sooner than the 60 s of a lease: the lock files tell that the owners are gone.
        wait_for(lambda: client.job(job.id).attempt == 2, "second attempt", seconds=20)
        assert_whole(client, job, attempt=2)


def test_when_up_is_killed_all_others_leave(service: Service, stripes: Path) -> None:
    with service.client() as client:
        job = begin(client, stripes)
        assert service.process is not None
        service.process.kill()
        wait_for(lambda: not service.processes(), "end of all processes", 40)
        service.start()
        assert_whole(client, job, attempt=2)


def test_an_interrupted_training_ends_with_the_bits_of_one_that_was_not(
    service: Service, stripes: Path
) -> None:
    with service.client() as client:
        job = begin(
            client,
            stripes,
            model={"arch": "resnet18", "dropout": 0.2},
            optimizer={"lr": 0.02, "momentum": 0.9},
        )
        service.stop()  # As Ctrl-C: in the middle of an epoch, most probably.
        service.start()
        assert_whole(client, job, attempt=2)
        twin = client.wait(client.submit(client.job(job.id).spec).id)
        assert twin.attempt == 1
        weights = [final_weights(service, client, own) for own in (job, twin)]
        assert weights[0] == weights[1]
        curves = [client.metrics(own.id).series["train_loss"] for own in (job, twin)]
        values = [[point.value for point in curve] for curve in curves]
        assert values[0] == values[1]


def test_a_worker_that_slept_past_its_lease_is_replaced_and_writes_no_more(
    service: Service, stripes: Path
) -> None:
    service.stop()
    service.environment |= {"SKIPLINE_LEASE_SECONDS": "8", "SKIPLINE_RENEW_SECONDS": "1"}
    service.start()
    with service.client() as client:
        job = begin(client, stripes)
        [worker] = service.processes("skipline", "worker", "--slots")
        [trainer] = service.trainers(job)
        for pid in (worker, trainer):
            os.kill(pid, signal.SIGSTOP)
        other = subprocess.Popen(
            [sys.executable, "-m", "skipline", "worker"],
            env=service.environment,
            cwd=service.home.parent,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: client.job(job.id).attempt == 2, "second attempt", seconds=90)
            for pid in (trainer, worker):
                os.kill(pid, signal.SIGCONT)
            assert_whole(client, job, attempt=2)
            wait_for(lambda: trainer not in service.processes("worker.runner"), "end of the zombie")
        finally:
            for pid in (trainer, worker):
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    continue
            other.terminate()
            other.wait(60)


def test_a_job_runs_without_any_broker(tmp_path: Path, own_redis: Redis) -> None:
    variables = {"SKIPLINE_BROKER_URL": own_redis.url}
    with running_service(tmp_path, variables) as service, service.client() as client:
        own_redis.kill()
        bring_in(client, draw_stripes(tmp_path))
        assert client.wait(client.submit(tiny_spec(epochs=1)).id).status is JobStatus.succeeded


# ------------------------------------------------------------------ on one stack, where it matters


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A server of the test's own, which can be killed."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)  # Where root runs the tests, another user runs the server.
        server = Postgres(Path(folder))
        server.start()
        yield server
        server.kill()


def test_a_database_that_is_away_is_waited_for_or_fences_the_trainer_off(
    tmp_path: Path, postgres: Postgres
) -> None:
    variables = {
        "SKIPLINE_DATABASE_URL": postgres.url,
        "SKIPLINE_LEASE_SECONDS": "8",
        "SKIPLINE_RENEW_SECONDS": "1",
        "SKIPLINE_REAP_SECONDS": "1",
    }
    with running_service(tmp_path, variables) as service, service.client() as client:
        job = begin(client, draw_stripes(tmp_path), epochs=10_000)
        [trainer] = service.trainers(job)
        postgres.kill()
        time.sleep(2)  # Less than a lease: it trains on.
        assert service.trainers(job) == [trainer]
        postgres.start()
        num_points = len(client.metrics(job.id).series["train_loss"])
        more = "points that were kept back"
        wait_for(lambda: len(client.metrics(job.id).series["train_loss"]) > num_points + 2, more)
        assert (client.job(job.id).attempt, service.trainers(job)) == (1, [trainer])

        postgres.kill()
        # Nobody can know whether somebody else has the job by now: it ends by itself.
        wait_for(lambda: not service.trainers(job), "end of the trainer", 12)
        postgres.start()
        wait_for(lambda: client.job(job.id).attempt == 2, "second attempt")
        client.stop(job.id)
        ended = client.wait(job.id)
        assert (ended.status, ended.attempt) == (JobStatus.succeeded, 2), ended.error
        first, second = client.attempts(job.id)
        assert (first.outcome, second.outcome) == ("lost", "succeeded")
        assert first.ended_at is not None
        assert first.ended_at <= second.started_at  # Never two owners.
        steps = [point.step for point in client.metrics(job.id).series["train_loss"]]
        assert steps == list(range(2, 2 * len(steps) + 1, 2))


def test_a_workers_wrong_clock_has_no_effect(tmp_path: Path, postgres_schema_url: str) -> None:
    """An hour ahead, its leases would look as if they were to last; an hour behind, as run out."""
    variables = faulty(
        SKIPLINE_DATABASE_URL=postgres_schema_url,
        SKIPLINE_LEASE_SECONDS="8",
        SKIPLINE_RENEW_SECONDS="1",
        SKIPLINE_TEST_WORKER_CLOCK_SECONDS="-3600",
    )
    with running_service(tmp_path, variables) as service, service.client() as client:
        job = begin(client, draw_stripes(tmp_path))
        assert_whole(client, job, attempt=1)
        lost = client.submit(tiny_spec(epochs=10_000))
        wait_for(lambda: client.checkpoints(lost.id), "checkpoint")
        began = time.monotonic()
        [worker] = service.processes("skipline", "worker", "--slots")
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: client.job(lost.id).attempt == 2, "second attempt", 40)
        assert time.monotonic() - began < 40
        [*_, begins] = [
            line for line in service.log_path.read_text().splitlines() if "attempt started" in line
        ]
        logged = datetime.fromisoformat(json.loads(begins)["timestamp"])
        assert (datetime.now(UTC) - logged).total_seconds() > 3000  # So it was wrong indeed.
        # All times are the database's, and so is what the client's clock says.
        now = datetime.now(UTC)
        shown = [client.job(job.id).finished_at, client.attempts(lost.id)[1].started_at]
        shown += [client.metrics(job.id).series["val_loss"][-1].time, client.workers()[0].seen_at]
        assert all(when and abs((now - when).total_seconds()) < 600 for when in shown)
        client.cancel(lost.id)
        assert client.wait(lost.id).status is JobStatus.cancelled


def test_an_api_killed_between_commit_and_bell_loses_no_job(tmp_path: Path) -> None:
    flag = tmp_path / "kill"
    with (
        running_service(tmp_path, faulty(SKIPLINE_TEST_KILL_IN_BELL=str(flag))) as service,
        service.client() as client,
    ):
        bring_in(client, draw_stripes(tmp_path))
        [api] = service.processes("skipline", "api")
        flag.touch()
        # The client may have its answer, or none, and then asks again with the same key.
        job = client.submit(tiny_spec(epochs=1), idempotency_key="once")
        wait_for(lambda: api not in service.processes("skipline", "api"), "end of the API")
        assert not flag.exists()
        wait_for(service.is_ready, "new API")
        assert [own.id for own in client.jobs(kind="train")] == [job.id]
        ended = client.wait(job.id)
        assert (ended.status, ended.attempt) == (JobStatus.succeeded, 1)
