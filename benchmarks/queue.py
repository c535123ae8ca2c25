"""The service around trainings: how quickly jobs are taken in, claimed and finished, how quickly
metrics are written, read and handed on, with no training at all.

    python -m benchmarks.queue [--database sqlite|postgresql] [--parts accept drain ...]
                               [--jobs N] [--workers N] [--streams N] [--points N]
                               [--mlflow COMMAND] [--json FILE]

| part | what is measured |
|---|---|
| `claim` | from `POST /jobs` to the claim of an idle worker |
| `accept` | `POST /jobs` by several clients at once |
| `drain` | worker processes that empty a full queue through Celery, each job doing nothing |
| `streams` | how old a point is when it comes out of a stream, with Redis's hints and without |
| `read` | `GET /jobs/{id}/metrics?max_points=2000` of a very long history |
| `metrics` | a history written and read, beside a local MLflow tracking server's |

Everything runs on this machine, in processes of its own, over an empty database. Exit code 1 if a
goal is missed, 2 for wrong usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this file's folder, where it would hide the standard library's queue.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import json
import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import Any

import torch
from sqlalchemy import func, insert, select, text

from benchmarks.baselines import mlflow_tracking
from benchmarks.baselines.problem import WrongUsage, hardware
from benchmarks.cluster import Cluster, Connection, Kind, cluster, wait_for
from benchmarks.figures import Figure, quantiles, seconds_of, write_figures
from benchmarks.listeners import Listeners
from shared import lifecycle, repository
from shared.database import Database
from shared.dispatch import Bell
from shared.hints import Hints
from shared.lifecycle import Capacity, Fence
from shared.repository import NewPoint
from shared.tables import Attempt, Event, Job
from skipline.catalog import BUILTIN_DATASETS, resolve
from skipline.schemas import JobStatus
from skipline.specs import TrainSpec

SPEC = {"kind": "train", "dataset": "digits"}
SERIES = ("train_loss", "train_top1", "lr", "images_per_second")
LEASE_SECONDS = 3600.0
MAX_POINTS = 2000
POINTS_PER_PORTION = 10_000
POINTS_PER_WRITE = 100
"""Of the part `metrics`: what a trainer that logs 25 steps with 4 series hands in at once."""


# -------------------------------------------------------------------------------------- the queue


def measure_claim(arguments: argparse.Namespace, place: Cluster) -> list[Figure]:
    """Posts at random moments, so that the worker's own look every other second cannot be met."""
    rng = random.Random(arguments.seed)
    waited = []
    with place.api() as port, place.idle_workers(1), Connection(port) as client:
        for _ in range(arguments.posts):
            time.sleep(rng.uniform(0.05, 0.3))
            posted = time.time()
            job = client.ask("POST", "/jobs", SPEC)
            wait_for(lambda: client.ask("GET", f"/jobs/{job['id']}")["finished_at"], "the end")  # noqa: B023
            started = client.ask("GET", f"/jobs/{job['id']}")["started_at"]
            waited.append(datetime.fromisoformat(started).timestamp() - posted)
    return quantiles("from POST to claimed", waited, "s")


def measure_accept(arguments: argparse.Namespace, place: Cluster) -> list[Figure]:
    """Every client sends one request after the other."""
    num_each = arguments.accepted // arguments.clients or 1

    def post_many(port: int) -> None:
        with Connection(port) as client:
            for _ in range(num_each):
                client.ask("POST", "/jobs", SPEC)

    fill_queue(place.database, arguments.jobs, waits_for=None)
    with place.api() as port, ThreadPoolExecutor(arguments.clients) as pool:
        with Connection(port) as client:
            client.ask("GET", "/readyz")
        began = time.perf_counter()
        for done in [pool.submit(post_many, port) for _ in range(arguments.clients)]:
            done.result()
        seconds = time.perf_counter() - began
    name = f"jobs accepted, {arguments.clients} clients, {arguments.jobs} queued before"
    return [Figure(name, num_each * arguments.clients / seconds, "jobs/s")]


def fill_queue(database: Database, num_jobs: int, waits_for: str | None) -> None:
    """So many jobs as if they had been posted; not one by one, which is not what is measured."""
    spec = resolve(TrainSpec(dataset="digits"), BUILTIN_DATASETS["digits"])
    with database.session_scope() as session:
        first = repository.add_job(session, spec)
        first.waits_for = waits_for
        session.flush()
        columns = [column.name for column in Job.__table__.columns]
        values = {name: getattr(first, name) for name in columns}
        rows = [values | {"id": repository.new_id()} for _ in range(num_jobs - 1)]
        if rows:
            session.execute(insert(Job), rows)


def analyze(database: Database, table: str) -> None:
    """Has the database look at a table that was filled all at once, as it would by itself within a
    minute."""
    if not database.is_sqlite:
        with database.session_scope() as session:
            session.execute(text(f"ANALYZE {table}"))


def measure_drain(arguments: argparse.Namespace, place: Cluster) -> list[Figure]:
    """All jobs wait for one, which this process ends when every worker is there: nobody begins
    while others still start."""
    before = hold_a_job(place.database)
    fill_queue(place.database, arguments.jobs, waits_for=before.job_id)
    analyze(place.database, "jobs")
    bell = Bell(place.settings)
    with place.idle_workers(arguments.workers):
        with place.database.session_scope() as session:
            lifecycle.finish(session, before, JobStatus.succeeded, result={})
        for _ in range(arguments.workers):
            bell.ring()
        wait_for(lambda: is_idle(place.database), "the end of the queue", 600, 0.2)
    began, ended = check_each_ran_once(place.database, before, arguments.jobs)
    is_cluster = arguments.database == "postgresql"
    name = f"{arguments.jobs} jobs, {arguments.workers} workers, claim to finish"
    rate = arguments.jobs / max((ended - began).total_seconds(), 1e-3)
    return [Figure(name, rate, "jobs/s", at_least=arguments.least_rate if is_cluster else None)]


def hold_a_job(database: Database) -> Fence:
    """A job of this process's own, which nobody else takes."""
    spec = resolve(TrainSpec(dataset="digits", priority=10), BUILTIN_DATASETS["digits"])
    with database.session_scope() as session:
        job_id = repository.add_job(session, spec).id
        capacity = Capacity(("any", "auto", "cpu"))
        claim = lifecycle.claim(session, "benchmark", "benchmark", LEASE_SECONDS, capacity)
    assert claim is not None
    assert claim.fence.job_id == job_id, "the queue was empty"
    return claim.fence


def is_idle(database: Database) -> bool:
    """Whether nothing waits and nothing runs."""
    busy = (JobStatus.queued, *lifecycle.OWNED)
    with database.read_scope() as session:
        return session.scalar(select(Job.id).where(Job.status.in_(busy)).limit(1)) is None


def check_each_ran_once(
    database: Database, before: Fence, num_jobs: int
) -> tuple[datetime, datetime]:
    """When the first attempt began and the last ended, once it is sure that each job had one
    attempt, which succeeded, and was told to have succeeded once."""
    is_ours = Attempt.job_id != before.job_id
    ends = Event.type == JobStatus.succeeded
    with database.read_scope() as session:
        wrong = session.execute(
            select(Job.id).where((Job.attempt != 1) | (Job.status != JobStatus.succeeded))
        ).all()
        outcomes = dict(
            session.execute(
                select(Attempt.outcome, func.count()).where(is_ours).group_by(Attempt.outcome)
            ).all()
        )
        told = session.execute(
            select(Event.job_id).where(ends).group_by(Event.job_id).having(func.count() == 1)
        ).all()
        began, ended = session.execute(
            select(func.min(Attempt.started_at), func.max(Attempt.ended_at)).where(is_ours)
        ).one()
    if wrong or outcomes != {"succeeded": num_jobs} or len(told) != num_jobs + 1:
        raise SystemExit(f"not every job ran once: {len(wrong)} wrong, attempts {outcomes}")
    return began, ended


# ---------------------------------------------------------------------------------------- metrics


def points_of(step: int, value: float) -> list[NewPoint]:
    return [NewPoint(name, step, 1, value) for name in SERIES]


def measure_streams(arguments: argparse.Namespace, place: Cluster) -> list[Figure]:
    """With Redis, where there is one, then without."""
    figures = []
    for name, one in (("with hints", place), ("without", place.without_redis())):
        if name == "with hints" and place.settings.broker_url is None:
            print("No redis-server is installed: streams are measured without hints only")
            continue
        fences = [hold_a_job(place.database) for _ in range(arguments.writers)]
        with one.api() as port:
            ages = asyncio.run(follow(arguments, one, fences, port))
        what = f"age of a point in {arguments.streams} streams {name}"
        figures += quantiles(what, ages, "s", at_most=arguments.most_lag_seconds)
    return figures


async def follow(
    arguments: argparse.Namespace, place: Cluster, fences: Sequence[Fence], port: int
) -> list[float]:
    """Opens all streams, waits until each has heard of its job, and counts from then on."""
    stopping = threading.Event()
    writer = asyncio.create_task(
        asyncio.to_thread(write_points, place, fences, arguments.write_seconds, stopping)
    )
    listeners = Listeners(port, [fence.job_id for fence in fences], arguments.streams)
    listening = asyncio.create_task(listeners.listen())
    try:
        async with asyncio.timeout(120):
            while listeners.num_heard < arguments.streams and not listening.done():
                await asyncio.sleep(0.1)
        listeners.ages_seconds.clear()
        await asyncio.wait({listening}, timeout=arguments.stream_seconds)
    finally:
        stopping.set()
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
        await writer
    return listeners.ages_seconds


def write_points(
    place: Cluster, fences: Sequence[Fence], write_seconds: float, stopping: threading.Event
) -> None:
    """As many trainers write: each a point of every series, every `write_seconds`. A point's value
    is the time at which it was handed to the database: its age counts from before the commit."""
    hints = Hints(place.settings)
    step = 0
    while not stopping.is_set():
        step += 1
        for fence in fences:
            if stopping.wait(write_seconds / len(fences)):
                break
            with place.database.session_scope() as session:
                repository.write_progress(session, fence, None, points_of(step, time.time()))
            hints.publish(fence.job_id)
    hints.close()


def measure_read(arguments: argparse.Namespace, place: Cluster) -> list[Figure]:
    """Over one connection, one request after the other; the first ones find nothing cached, and
    an API that is still loading torch beside them."""
    fence = hold_a_job(place.database)
    for first in range(0, arguments.points, POINTS_PER_PORTION):
        numbers = range(first, min(first + POINTS_PER_PORTION, arguments.points))
        with place.database.session_scope() as session:
            points = [noisy_point(number) for number in numbers]
            repository.write_progress(session, fence, None, points)
    analyze(place.database, "metric_points")
    path = f"/jobs/{fence.job_id}/metrics?max_points={MAX_POINTS}"
    milliseconds = []
    with place.api() as port, Connection(port) as client:
        client.ask("GET", "/readyz")
        for _ in range(arguments.reads):
            began = time.perf_counter()
            content = client.ask_raw("GET", path)
            milliseconds.append(1000 * (time.perf_counter() - began))
    check_history(json.loads(content), arguments.points)
    what = f"{arguments.points} points, max_points={MAX_POINTS}"
    first = Figure(f"{what}, first", milliseconds[0], "ms")
    return [first, *quantiles(what, milliseconds, "ms", at_most=arguments.most_read_ms)]


def noisy_point(number: int) -> NewPoint:
    """Of four series that take turns."""
    step = number // len(SERIES) + 1
    value = 1 / step + number * 7919 % 1000 / 1000
    return NewPoint(SERIES[number % len(SERIES)], step, 1 + step // 25_000, value)


def check_history(document: dict[str, Any], num_points: int) -> None:
    """The answer is about the whole history, and no longer than was asked for."""
    lengths = {name: len(series) for name, series in document["series"].items()}
    last = max(series[-1]["step"] for series in document["series"].values())
    if len(lengths) != len(SERIES) or max(lengths.values()) > MAX_POINTS:
        raise SystemExit(f"the answer has series of {lengths} points")
    if last != (num_points + 3) // 4:
        raise SystemExit(f"the answer ends at step {last}: a part of the history only")


def measure_metrics(arguments: argparse.Namespace, place: Cluster) -> list[Figure]:
    """The same points in the same portions, ours and MLflow's, one after the other."""
    num_steps = arguments.history // len(SERIES) or 1
    all_points = [point for step in range(num_steps) for point in points_of(step, 1.0 + step)]
    portions = [
        all_points[first : first + POINTS_PER_WRITE]
        for first in range(0, len(all_points), POINTS_PER_WRITE)
    ]
    ours = use_ours(place, portions)
    figures = [
        Figure(f"{len(all_points)} points written, Skipline", ours[0], "points/s"),
        Figure(f"{len(all_points)} points read, Skipline", ours[1], "points/s"),
    ]
    command = arguments.mlflow or shutil.which("mlflow")
    if command is None:
        print(mlflow_tracking.INSTALL)
        return figures
    with mlflow_tracking.tracking(command, arguments.database, place.folder) as run:
        theirs = use_mlflow(run, portions)
    for number, what in enumerate(("written", "read")):
        figures += [
            Figure(f"{len(all_points)} points {what}, MLflow", theirs[number], "points/s"),
            Figure(f"points {what}: ratio", ours[number] / theirs[number], "", at_least=1.0),
        ]
    return figures


def use_ours(place: Cluster, portions: Sequence[Sequence[NewPoint]]) -> tuple[float, float]:
    """Points per second, written as a trainer writes them and read over HTTP."""
    fence = hold_a_job(place.database)
    num_points = sum(map(len, portions))

    def write() -> None:
        for portion in portions:
            with place.database.session_scope() as session:
                repository.write_progress(session, fence, None, portion)

    with place.api() as port, Connection(port) as client:
        client.ask("GET", "/readyz")

        def read() -> int:
            num_read, after = 0, "0"
            while True:
                page = client.ask("GET", f"/jobs/{fence.job_id}/metrics?after={after}")
                found = sum(map(len, page["series"].values()))
                num_read, after = num_read + found, page["next"]
                if num_read >= num_points or not found:
                    return num_read

        return num_points / seconds_of(write), rate_of(read, num_points)


def use_mlflow(
    run: mlflow_tracking.Tracking, portions: Sequence[Sequence[NewPoint]]
) -> tuple[float, float]:
    """Points per second, written and read over MLflow's REST interface."""
    num_points = sum(map(len, portions))

    def write() -> None:
        for portion in portions:
            run.log_batch(portion, int(1000 * time.time()))

    written = num_points / seconds_of(write)
    return written, rate_of(lambda: sum(len(run.history(name)) for name in SERIES), num_points)


def rate_of(read: Callable[[], int], num_points: int, num_times: int = 3) -> float:
    """Points per second of the median read, every one of which has to be whole."""
    taken = []
    for _ in range(num_times):
        began = time.perf_counter()
        if (found := read()) != num_points:
            raise SystemExit(f"{found} of {num_points} points were read")
        taken.append(time.perf_counter() - began)
    return num_points / statistics.median(taken)


# ------------------------------------------------------------------------------------------- main

PARTS: dict[str, Callable[[argparse.Namespace, Cluster], list[Figure]]] = {
    "claim": measure_claim,
    "accept": measure_accept,
    "drain": measure_drain,
    "streams": measure_streams,
    "read": measure_read,
    "metrics": measure_metrics,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.queue", description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--database", choices=["sqlite", "postgresql"], default="sqlite")
    add("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    add("--posts", type=positive, default=50, help="of the part claim")
    add("--accepted", type=positive, default=2000, help="jobs posted in the part accept")
    add("--clients", type=positive, default=8, help="that post at once")
    add("--jobs", type=positive, default=10_000, help="in the queue of the parts accept and drain")
    add("--workers", type=positive, default=20, help="processes of the part drain")
    add("--least-rate", type=float, default=200.0, help="goal of the part drain, jobs per second")
    add("--streams", type=positive, default=500)
    add("--stream-seconds", type=float, default=20.0, help="for which streams are followed")
    add("--writers", type=positive, default=20, help="jobs that the streams are of")
    add("--write-seconds", type=float, default=1.0, help="between two writes of such a job")
    add("--most-lag-seconds", type=float, default=1.0, help="goal of the part streams")
    add("--points", type=positive, default=1_000_000, help="of the part read")
    add("--reads", type=positive, default=31, help="of the part read")
    add("--most-read-ms", type=float, default=200.0, help="goal of the part read")
    add("--history", type=positive, default=20_000, help="points of the part metrics")
    add("--mlflow", metavar="COMMAND", help="the mlflow of an environment of its own")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write all figures to this file")
    return made


def positive(words: str) -> int:
    number = int(words)
    if number < 1:
        raise ValueError(words)
    return number


def run_parts(arguments: argparse.Namespace) -> Iterator[tuple[str, list[Figure]]]:
    """Each part over an empty database of its own."""
    kind: Kind = arguments.database
    for part in arguments.parts:
        with cluster(kind) as place:
            yield part, PARTS[part](arguments, place)


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    if arguments.mlflow and shutil.which(arguments.mlflow) is None:
        parser().error(f"--mlflow {arguments.mlflow}: there is no such command")
    machine = hardware(torch.device("cpu"))
    print(f"{machine}, {arguments.database}", flush=True)
    measured: dict[str, list[Figure]] = {}
    try:
        for part, figures in run_parts(arguments):
            measured[part] = figures
            for figure in figures:
                print(figure, flush=True)
    except WrongUsage as error:
        parser().error(str(error))
    if arguments.json:
        facts = {"hardware": machine, "database": arguments.database}
        write_figures(arguments.json, facts, measured)
    return 0 if all(f.is_met for figures in measured.values() for f in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
