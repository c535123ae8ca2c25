"""The worker's main process: Celery, its slots, and what keeps house. Never imports torch."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from functools import partial

import structlog
from celery.signals import worker_shutting_down

from shared import datasets, schema
from shared.database import Database
from shared.dispatch import make_celery
from shared.housekeeping import Housekeeper
from shared.reaper import Reaper
from shared.settings import Settings
from shared.storage import Storage
from worker import tasks
from worker.datasets import cache
from worker.slots import Executor, Slots
from worker.trainer_process import sweep_logs
from worker.trainers import Trainers

log = structlog.get_logger(__name__)


def run(
    settings: Settings,
    num_slots: int,
    executor: Callable[[Settings, Database, int], Executor] = Trainers,
) -> None:
    """Works until SIGTERM or SIGINT, then gives its jobs back and returns, all within the grace
    period.

    Args:
        executor: makes what carries attempts out, from the settings, the database and `num_slots`.

    Raises:
        SetupError: the database, the storage or the home folder cannot be used.
    """
    database = Database(settings.database)
    schema.check(database)
    storage = Storage(settings.artifacts_path)
    if database.is_sqlite and settings.broker_url is not None:
        log.warning("SQLite serves one machine: all workers must run on this one")
    sweep_logs(settings.home_path)
    app = make_celery(settings)
    slots = Slots(settings, database, num_slots, executor(settings, database, num_slots))
    tasks.register(app, slots)
    reaper = Reaper(settings, database, storage)
    packed = cache.packed_path(settings)

    def forget_deleted() -> None:
        with database.read_scope() as session:
            cache.forget(packed, datasets.known_hashes(session))

    bound_cache = partial(cache.bound, packed, settings.max_cache_bytes)
    housekeeper = Housekeeper(settings, database, storage, [forget_deleted, bound_cache])

    def leave() -> None:
        slots.drain()
        for keeper in (reaper, housekeeper):
            keeper.stop()

    # A thread, because a signal may come while the main one holds a lock that this waits for.
    leaving = threading.Thread(target=leave, name="leave", daemon=True)

    def begin_to_leave(**_: object) -> None:
        _hear_no_more_signals()
        if leaving.ident is None:
            leaving.start()

    worker_shutting_down.connect(begin_to_leave)
    # Until Celery listens for signals itself.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    try:
        reaper.start()
        housekeeper.start()
        slots.start()
        # One thread, which only passes the bell on; no gossip, no events: whatever workers must
        # agree on is in the database.
        app.Worker(
            pool="threads",
            concurrency=1,
            loglevel="WARNING",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
        ).start()
    finally:
        begin_to_leave()
        slots.close()
        database.dispose()


def _hear_no_more_signals() -> None:
    """Leaving has begun and has an end: asked once more, Celery would break it off. A handler,
    because trainers would inherit that a signal is ignored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
