"""Jobs, and what is done to them, for the tests of their life: each call a transaction."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

from shared import lifecycle, repository
from shared.database import Database
from shared.lifecycle import Action, Capacity, Claim, Fence
from shared.repository import Workload
from shared.tables import Job
from skipline.catalog import BUILTIN_DATASETS, resolve
from skipline.schemas import JobStatus
from skipline.specs import EvaluateSpec, TrainSpec, parse_request

CPU = Capacity(("any", "auto", "cpu"))
MAX_CRASHES = 3


def gpus(number: int, *others: str, free: int | None = None) -> Capacity:
    """A worker with GPUs, all of them free unless told otherwise."""
    devices = ("any", "auto", "cuda", *others)
    return Capacity(devices, number, number if free is None else free)


def add_job(database: Database, *, workload: Workload | None = None, **keys: Any) -> str:
    """A queued training of digits; `keys` are its spec's."""
    spec = parse_request({"dataset": "digits", **keys})
    assert isinstance(spec, TrainSpec)
    with database.session_scope() as session:
        resolved = resolve(spec, BUILTIN_DATASETS["digits"])
        return repository.add_job(session, resolved, workload=workload).id


def add_evaluation(database: Database, **keys: Any) -> str:
    """A queued evaluation on digits; `keys` are its spec's."""
    spec = EvaluateSpec(**({"dataset": "digits", "split": "test"} | keys))
    with database.session_scope() as session:
        return repository.add_job(session, spec).id


def take(database: Database, owner: str = "w1", capacity: Capacity = CPU) -> Claim | None:
    """What a worker does that has a free slot."""
    with database.session_scope() as session:
        return lifecycle.claim(session, owner, "host", 60, capacity)


def claim(database: Database, owner: str = "w1", capacity: Capacity = CPU) -> Fence | None:
    taken = take(database, owner, capacity)
    return None if taken is None else taken.fence


def claimed(database: Database, owner: str = "w1") -> Fence:
    fence = claim(database, owner)
    assert fence is not None
    return fence


def running(database: Database, **keys: Any) -> Fence:
    """The fence of a new job, which is the first in the queue."""
    job_id = add_job(database, **keys)
    fence = claimed(database)
    assert fence.job_id == job_id
    return fence


def get(database: Database, job_id: str) -> Job:
    with database.read_scope() as session:
        return repository.get_job(session, job_id)


def status(database: Database, job_id: str) -> JobStatus:
    return JobStatus(get(database, job_id).status)


def ask(database: Database, job_id: str, action: Action) -> None:
    with database.session_scope() as session:
        lifecycle.request(session, job_id, action)


def lose(database: Database, fence: Fence) -> bool:
    with database.session_scope() as session:
        return lifecycle.lose(session, fence.job_id, fence.attempt, "gone", max_crashes=MAX_CRASHES)


def release(database: Database, fence: Fence) -> None:
    with database.session_scope() as session:
        lifecycle.release(session, fence, "leaving")


def finish(database: Database, fence: Fence, target: JobStatus = JobStatus.succeeded) -> None:
    error = {"code": "nan_loss", "message": "The loss is NaN", "hint": "Lower the rate"}
    with database.session_scope() as session:
        if target is JobStatus.succeeded:
            lifecycle.finish(session, fence, target, result={"top1": 1.0})
        else:
            lifecycle.finish(
                session, fence, target, error=error if target is JobStatus.failed else None
            )


def register(
    database: Database, fence: Fence, step: int, *kinds: Any, key: str | None = None
) -> None:
    """A checkpoint at `step`, as an attempt registers one."""
    with database.session_scope() as session:
        repository.register_checkpoint(
            session,
            fence,
            kinds=kinds or ("last",),
            key=key or f"jobs/{fence.job_id}/{fence.attempt}/{step}",
            epoch=1,
            step=step,
            metrics={"val_loss": 1.0},
            num_bytes=1,
        )


def write(database: Database, fence: Fence, *points: tuple[str, int, float]) -> None:
    """Metric points: name, step, value."""
    with database.session_scope() as session:
        new = [repository.NewPoint(name, step, 1, value) for name, step, value in points]
        repository.write_progress(session, fence, {"step": 1}, new)


def delete(database: Database, job_id: str) -> list[str]:
    with database.session_scope() as session:
        return repository.delete_job(session, job_id)


def event_types(database: Database, job_id: str) -> list[str]:
    with database.read_scope() as session:
        return [event.type for event in repository.list_events(session, job_id)]


def in_threads(*calls: Callable[[], Any]) -> None:
    """Runs all at once and waits for their ends; the first exception passes through."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
