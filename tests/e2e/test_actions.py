"""What one may ask of a job that runs, of one that waits and of one that is over, on both stacks:
real trainers obey, and what is taken up again ends with the bits of a run that was left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shared.storage import Storage
from skipline import Skipline
from skipline.client import SkiplineError
from skipline.schemas import Job, JobStatus
from tests.e2e.conftest import Service, final_weights, on_postgresql, on_sqlite, tiny_spec, wait_for

EPOCHS = 10
"""Of a run that is disturbed: 60 steps."""
SPEC = tiny_spec(
    epochs=EPOCHS,
    model={"arch": "resnet18", "dropout": 0.2},
    optimizer={"lr": 0.02, "momentum": 0.9},
)
DELIVERY_SECONDS = 2.0


@pytest.fixture
def client(shared_service: Service) -> Iterator[Skipline]:
    """At the end no job may be left that is not over."""
    with shared_service.client() as client:
        yield client
        for job in client.jobs():
            if not job.status.is_terminal:
                client.cancel(job.id)
                client.wait(job.id)


def begun(client: Skipline, job: Job, num_epochs: int = 2) -> Job:
    """The job once it has trained so many epochs, and so has checkpoints."""
    trained = "an epoch's end"
    wait_for(lambda: len(client.metrics(job.id).series.get("val_loss", [])) >= num_epochs, trained)
    return client.job(job.id)


def finished(client: Skipline, job: Job) -> Job:
    ended = client.wait(job.id)
    assert ended.status is JobStatus.succeeded, ended.error
    return ended


def event_seconds(client: Skipline, job: Job, first: str, then: str) -> float:
    """Between two events, by the database's clock."""
    times = {event.type: event.time for event in client.events(job.id)}
    return (times[then] - times[first]).total_seconds()


@contextmanager
def held(service: Service, job: Job) -> Iterator[int]:
    """Its trainer stands still: so a status that lasts for a moment lasts."""
    [trainer] = service.trainers(job)
    os.kill(trainer, signal.SIGSTOP)
    try:
        yield trainer
    finally:
        if trainer in service.processes("worker.runner"):
            os.kill(trainer, signal.SIGCONT)


@pytest.fixture(scope="module")
def undisturbed(shared_service: Service) -> tuple[bytes, list[float]]:
    """Weights and curve of a run that nobody disturbed."""
    with shared_service.client() as client:
        job = finished(client, client.submit(SPEC))
        curve = [point.value for point in client.metrics(job.id).series["train_loss"]]
        return final_weights(shared_service, client, job), curve


def test_a_paused_run_leaves_its_worker_and_ends_with_the_bits_of_one_that_was_not(
    shared_service: Service, client: Skipline, undisturbed: tuple[bytes, list[float]]
) -> None:
    job = begun(client, client.submit(SPEC))
    assert client.pause(job.id).status is JobStatus.pausing
    paused = wait_for(
        lambda: (now := client.job(job.id)).status is JobStatus.paused and now, "pause"
    )
    assert client.pause(job.id).status is JobStatus.paused
    assert paused.queue_position is None
    wait_for(lambda: not shared_service.trainers(job), "end of the trainer")
    assert client.workers()[0].job_ids == []
    step = max(checkpoint.step for checkpoint in client.checkpoints(job.id))
    assert 12 <= step < 6 * EPOCHS

    # The worker is free for others meanwhile.
    assert finished(client, client.submit(tiny_spec(epochs=1))).attempt == 1
    assert client.job(job.id).status is JobStatus.paused

    client.resume(job.id)
    assert finished(client, job).attempt == 2
    [resumed] = [event for event in client.events(job.id) if event.type == "resumed" and event.data]
    assert resumed.data["step"] == step
    assert [(a.outcome, a.number) for a in client.attempts(job.id)] == [
        ("paused", 1),
        ("succeeded", 2),
    ]
    curve = [point.value for point in client.metrics(job.id).series["train_loss"]]
    assert (final_weights(shared_service, client, job), curve) == undisturbed


@on_sqlite
def test_a_stopped_run_keeps_what_it_has_learnt(shared_service: Service, client: Skipline) -> None:
    job = begun(client, client.submit(tiny_spec(epochs=10_000)))
    [trainer] = shared_service.trainers(job)
    assert client.stop(job.id).status is JobStatus.stopping
    assert client.stop(job.id).status is JobStatus.stopping
    ended = finished(client, job)
    assert (ended.stop_reason, ended.attempt) == ("user", 1)
    assert ended.result is not None
    last_step = client.metrics(job.id).series["val_loss"][-1].step
    assert last_step == max(checkpoint.step for checkpoint in client.checkpoints(job.id))
    report = client.report(job.id)
    assert (report.num_samples, report.top1) == (16, ended.result["top1"])
    best = min(point.value for point in client.metrics(job.id).series["val_loss"])
    assert report.loss == pytest.approx(best, rel=1e-4)
    assert client.stop(job.id).status is JobStatus.succeeded  # It was.
    wait_for(lambda: trainer not in shared_service.processes("worker.runner"), "its end")


def test_a_run_killed_while_it_stops_only_writes_its_report(
    shared_service: Service, client: Skipline
) -> None:
    job = begun(client, client.submit(tiny_spec(epochs=10_000)))
    with held(shared_service, job) as trainer:
        client.stop(job.id)
        last = max(checkpoint.step for checkpoint in client.checkpoints(job.id))
        os.kill(trainer, signal.SIGKILL)
    ended = finished(client, job)
    assert (ended.stop_reason, ended.attempt) == ("user", 2)
    assert client.report(job.id).num_samples == 16
    assert [attempt.outcome for attempt in client.attempts(job.id)] == ["lost", "succeeded"]
    # Not a step more than the checkpoint that it came back to.
    assert max(point.step for point in client.metrics(job.id).series["train_loss"]) <= last
    assert max(checkpoint.step for checkpoint in client.checkpoints(job.id)) == last


@on_postgresql
def test_a_job_is_cancelled_in_whatever_state(shared_service: Service, client: Skipline) -> None:
    running = begun(client, client.submit(tiny_spec(epochs=10_000)), 1)
    queued = client.submit(tiny_spec())
    waiting = client.submit(tiny_spec(after=queued.id))
    assert client.cancel(queued.id).status is JobStatus.cancelled
    failed = client.job(waiting.id)
    assert failed.error is not None
    assert (failed.status, failed.error.code) == (JobStatus.failed, "predecessor_failed")

    with held(shared_service, running):
        assert client.pause(running.id).status is JobStatus.pausing
        assert client.cancel(running.id).status is JobStatus.cancelling
        assert client.cancel(running.id).status is JobStatus.cancelling
    assert client.wait(running.id).status is JobStatus.cancelled
    assert client.cancel(running.id).status is JobStatus.cancelled

    stopping = begun(client, client.submit(tiny_spec(epochs=10_000)), 1)
    with held(shared_service, stopping):
        assert client.stop(stopping.id).status is JobStatus.stopping
        assert client.cancel(stopping.id).status is JobStatus.cancelling
    assert client.wait(stopping.id).status is JobStatus.cancelled

    paused = begun(client, client.submit(tiny_spec(epochs=10_000)), 1)
    client.pause(paused.id)
    wait_for(lambda: client.job(paused.id).status is JobStatus.paused, "pause")
    assert client.cancel(paused.id).status is JobStatus.cancelled
    for action in (client.pause, client.resume, client.stop):
        with pytest.raises(SkiplineError) as refused:
            action(paused.id)
        assert (refused.value.status, refused.value.code) == (409, "illegal_transition")


@on_sqlite
def test_a_cancelled_run_is_retried_from_its_last_checkpoint_and_deleted(
    shared_service: Service, client: Skipline, undisturbed: tuple[bytes, list[float]]
) -> None:
    job = begun(client, client.submit(SPEC))
    for action in (client.delete, client.retry):
        with pytest.raises(SkiplineError) as refused:
            action(job.id)
        assert (refused.value.status, refused.value.code) == (409, "illegal_transition")
    client.cancel(job.id)
    assert client.wait(job.id).status is JobStatus.cancelled
    assert event_seconds(client, job, "cancel_requested", "cancelled") < DELIVERY_SECONDS
    step = max(checkpoint.step for checkpoint in client.checkpoints(job.id))

    retried = client.retry(job.id)
    assert retried.parent_id == job.id
    finished(client, retried)
    assert client.job(job.id).status is JobStatus.cancelled
    [inherited] = [event for event in client.events(retried.id) if event.type == "inherited"]
    assert inherited.data == {"parent_id": job.id, "step": step}
    series = client.metrics(retried.id).series
    assert [point.step for point in series["train_loss"]] == list(range(2, 6 * EPOCHS + 1, 2))
    curve = [point.value for point in series["train_loss"]]
    assert (final_weights(shared_service, client, retried), curve) == undisturbed

    storage = Storage(shared_service.home / "artifacts")
    for own in (job, retried):
        client.delete(own.id)
        with pytest.raises(SkiplineError) as refused:
            client.job(own.id)
        assert refused.value.code == "job_not_found"
        wait_for(lambda own=own: not storage.keys(f"jobs/{own.id}"), "end of its files")


@on_postgresql
def test_a_training_and_what_waits_for_it_run_one_after_the_other(
    shared_service: Service, client: Skipline
) -> None:
    job = client.submit(tiny_spec(epochs=1))
    evaluation = client.evaluate(job.id, "stripes", after=job.id, priority=10)
    assert evaluation.queue_position is None
    with pytest.raises(SkiplineError) as refused:
        client.delete(job.id)
    assert refused.value.status == 409
    measured = finished(client, evaluation)
    trained = client.job(job.id)
    assert trained.finished_at is not None
    assert measured.started_at is not None
    assert measured.started_at >= trained.finished_at
    assert client.report(evaluation.id).confusion == client.report(job.id).confusion
    # And with one that fails: the first step of such a rate ends in NaN.
    doomed = client.submit(tiny_spec(optimizer={"lr": 1000, "momentum": 0.99}, epochs=50))
    child = client.evaluate(doomed.id, "stripes", after=doomed.id)
    ended = client.wait(child.id)
    assert ended.error is not None
    assert (ended.status, ended.error.code) == (JobStatus.failed, "predecessor_failed")
    assert doomed.id in ended.error.message
    reason = client.job(doomed.id).error
    assert reason is not None
    assert (reason.code, client.job(doomed.id).attempt) == ("nan_loss", 1)
    [attempt] = client.attempts(doomed.id)
    assert (attempt.outcome, attempt.reason) == ("failed", reason.message)
    assert client.logs(doomed.id) == client.logs(doomed.id, attempt=1)
