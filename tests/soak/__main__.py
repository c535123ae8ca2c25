"""Short jobs on a cluster whose processes are killed at random: none may be lost, none run twice to
the end, and nothing be left over.

    python -m tests.soak [--seconds 600] [--jobs 200] [--workers 2] [--seed 0] [--keep]

Starts a PostgreSQL, a Redis, an API and workers of its own, on loopback and in a temporary folder;
each has a home folder of its own, as on hosts of their own. For `--seconds` clients post jobs and
things are killed; then what is left of the work may take as long as `--settle-seconds`. Prints what
was done and what came of it. Exit code 1 if anything is wrong, 2 for wrong usage. Linux only.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from shared import schema
from shared.database import Database
from shared.settings import Settings
from tests.soak import servers, stories, verdict
from tests.soak.faults import Faults
from tests.soak.servers import Missing, Postgres, Redis, Skipline, free_port, wait_for

LEASE_SECONDS = 8
SLEEP_SECONDS = 11.0
GRACE_SECONDS = 15
NUM_CLIENTS = 24
LEAVES_WITH = (0, -signal.SIGTERM)
"""Uvicorn ends by the signal that it was asked with, once it has left in order."""
POSTING_SHARE = 0.8
"""Of `--seconds`, in which stories begin."""
VARIABLES = {
    "SKIPLINE_LEASE_SECONDS": str(LEASE_SECONDS),
    "SKIPLINE_RENEW_SECONDS": "1",
    "SKIPLINE_CONTROL_SECONDS": "0.5",
    "SKIPLINE_IDLE_LOOK_SECONDS": "1",
    "SKIPLINE_REAP_SECONDS": "1",
    "SKIPLINE_GRACE_SECONDS": str(GRACE_SECONDS),
    "SKIPLINE_MAX_CRASHES": "100",  # Killed at random, not crashed for a reason of their own.
    "SKIPLINE_CPU_THREADS": "1",
    "SKIPLINE_WARM_TRAINERS": "1",
    "SKIPLINE_DEVICE": "cpu",
}


@dataclass
class Cluster:
    """Everything that runs, and where it keeps what."""

    folder: Path
    postgres: Postgres
    redis: Redis
    api: Skipline
    workers: list[Skipline]
    api_url: str
    settings: Settings


@contextmanager
def cluster(folder: Path, num_workers: int) -> Iterator[Cluster]:
    """All processes, running; whatever of them is left at the end is killed."""
    postgres, redis = Postgres(folder), Redis(folder)
    variables = {
        **VARIABLES,
        "SKIPLINE_DATABASE_URL": postgres.url,
        "SKIPLINE_BROKER_URL": redis.url,
        "SKIPLINE_ARTIFACTS_URL": f"file://{folder / 'artifacts'}",
        "SKIPLINE_DATASET_ROOTS": str(folder / "images"),
    }
    port = free_port()
    api = Skipline(folder, "api", ["api", "--port", str(port)], variables)
    workers = [
        Skipline(folder, f"worker-{number}", ["worker", "--slots", "1"], variables)
        for number in range(num_workers)
    ]
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        home=folder / "judge",
        database_url=SecretStr(postgres.url),
        artifacts_url=variables["SKIPLINE_ARTIFACTS_URL"],
    )
    try:
        postgres.start()
        redis.start()
        database = Database(settings.database)
        schema.migrate(database)
        database.dispose()
        for process in (api, *workers):
            process.start()
        url = f"http://127.0.0.1:{port}"
        yield Cluster(folder, postgres, redis, api, workers, url, settings)
    finally:
        for process in (api, *workers):
            process.kill()
        wait_for(lambda: not servers.processes(str(folder)), "end of all processes", 30)
        redis.kill()
        postgres.kill()


def soak(arguments: argparse.Namespace, place: Cluster) -> list[str]:
    """Everything that is wrong, in words."""
    rng = random.Random(arguments.seed)
    ledger = stories.Ledger()
    began = time.monotonic()
    deadline = stories.Deadline(began + arguments.seconds + arguments.settle_seconds)
    bring_images_in(place, stories.Client(place.api_url, deadline, ledger))
    faults = Faults(
        place.api,
        place.workers,
        place.redis,
        place.postgres,
        SLEEP_SECONDS,
        GRACE_SECONDS,
        random.Random(rng.random()),
    )
    stopping = threading.Event()
    lock = threading.Lock()
    chosen = list(stories.draw(rng, arguments.jobs))
    pause = POSTING_SHARE * arguments.seconds / len(chosen)

    def disturb() -> None:
        try:
            faults.run(stopping, (0.5 * arguments.pause_seconds, 1.5 * arguments.pause_seconds))
        except Exception as error:
            with lock:
                ledger.wrongs.append(f"{type(error).__name__}: {error}")

    disturbing = threading.Thread(target=disturb, name="faults")
    disturbing.start()
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        try:
            for story in chosen:
                client = stories.Client(place.api_url, deadline, ledger)
                own_rng = random.Random(rng.random())
                teller = stories.Teller(client, own_rng, place.folder / "images")
                clients.submit(stories.tell, story, teller, lock)
                time.sleep(pause)
            time.sleep(max(0.0, began + arguments.seconds - time.monotonic()))
        except BaseException:  # Ctrl-C: nobody waits for the stories.
            deadline.at = 0.0
            raise
        finally:
            stopping.set()
            disturbing.join()
    ledger.wrongs += leave(place)
    print(f"seed {arguments.seed}, {time.monotonic() - began:.0f} s")
    database = Database(place.settings.database)
    print(verdict.table(database, ledger, faults.counts))
    wrongs = verdict.judge(place.settings, database, ledger)
    database.dispose()
    return wrongs


def bring_images_in(place: Cluster, client: stories.Client) -> None:
    """The datasets that all trainings use; nothing is killed yet."""
    stories.make_images(place.folder / "images")
    for number in range(stories.NUM_DATASETS):
        job_id = client.post(stories.ingest_request(place.folder / "images", number), "/datasets")
        client.ledger.promises[job_id] = stories.Promise(job_id, "first ingest", "succeeded")
        client.end(job_id)
    client.close()


def leave(place: Cluster) -> Iterator[str]:
    """Asks all to leave. Nothing else may have ended, and nothing may be left."""
    for process in (*place.workers, place.api):
        if process.has_ended():
            yield f"{process.home.name} had ended by itself"
        elif (code := process.stop(GRACE_SECONDS + 10)) not in LEAVES_WITH:
            yield f"{process.home.name} ended with {code} when it was asked to leave"
    try:
        wait_for(lambda: not servers.processes(str(place.folder)), "end of all processes", 20)
    except TimeoutError:
        yield f"processes were left: {servers.processes(str(place.folder))}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tests.soak", description=__doc__.splitlines()[0])
    made.add_argument("--seconds", type=float, default=600.0)
    made.add_argument("--settle-seconds", type=float, default=300.0)
    made.add_argument("--pause-seconds", type=float, default=6.0, help="between two faults")
    made.add_argument("--jobs", type=int, default=200)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--keep", action="store_true", help="keep the folder, to look into it")
    return made


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if sys.platform != "linux" or min(arguments.jobs, arguments.workers) < 1:
        parser().error("on Linux, with at least one job and one worker")
    folder = Path(tempfile.mkdtemp(prefix="skipline-soak-"))
    folder.chmod(0o711)  # PostgreSQL may run as somebody else, and finds its own folder below.
    try:
        with cluster(folder, arguments.workers) as place:
            wrongs = soak(arguments, place)
    except Missing as error:
        parser().error(str(error))
    finally:
        if arguments.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for wrong in wrongs:
        print(f"WRONG: {wrong}")
    print("nothing is wrong" if not wrongs else f"{len(wrongs)} things are wrong")
    return 1 if wrongs else 0


if __name__ == "__main__":
    sys.exit(main())
