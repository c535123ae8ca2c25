"""Killed processes lose no job: real signals to real processes, on both stacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from shared.storage import Storage
from shared.vision.bundle import WEIGHTS_FILE
from skipline import Skipline
from skipline.schemas import Job, JobStatus, MetricEvent, RewindEvent
from tests.e2e.conftest import Service, bring_in, free_port, tiny_spec, wait_for

LONG = 10
"""Epochs of a run that faults are done to: 60 steps."""


def begin(client: Skipline, stripes: Path, **keys: Any) -> Job:
    """A long training in its fourth epoch, the checkpoint of the second one at least behind it."""
    bring_in(client, stripes)
    job = client.submit(tiny_spec(epochs=LONG, **keys))
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


def test_a_killed_trainer_is_replaced_at_its_last_checkpoint(
    service: Service, stripes: Path
) -> None:
    with service.client() as client:
        job = begin(client, stripes)
        events = client.stream_metrics(job.id)
        seen = [next(events)]
        [trainer] = service.trainers(job)
        os.kill(trainer, signal.SIGKILL)
        seen += events  # The stream goes on through the crash.
        assert_whole(client, job, attempt=2)

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
        storage = Storage(service.home / "artifacts")
        weights = []
        for own in (job, twin):
            step = client.job(own.id).result["step"]  # type: ignore[index]
            [key] = [k for k in storage.keys(f"jobs/{own.id}") if k.endswith(f"/{step}")]
            weights.append((storage.path(key) / WEIGHTS_FILE).read_bytes())
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
            wait_for(lambda: client.job(job.id).attempt == 2, "second attempt", seconds=40)
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


def test_a_job_runs_without_any_broker(service: Service, stripes: Path, tmp_path: Path) -> None:
    service.stop()
    port = free_port()
    broker = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    try:
        service.environment["SKIPLINE_BROKER_URL"] = f"redis://127.0.0.1:{port}/0"
        service.start()
        broker.kill()
        broker.wait()
        with service.client() as client:
            bring_in(client, stripes)
            assert client.wait(client.submit(tiny_spec()).id).status is JobStatus.succeeded
    finally:
        broker.kill()
        broker.wait()
