"""The worker's main process: Celery, its slots, and a reaper. Never imports torch."""

from __future__ import annotations

import structlog
from celery.signals import worker_shutting_down

from shared import schema
from shared.database import Database
from shared.dispatch import make_celery
from shared.reaper import Reaper
from shared.settings import Settings
from shared.storage import Storage
from worker import tasks
from worker.slots import Slots
from worker.trainer_process import sweep_logs

log = structlog.get_logger(__name__)


def run(settings: Settings, num_slots: int) -> None:
    """Works until SIGTERM or SIGINT, then gives its jobs back and returns.

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
    slots = Slots(settings, database, num_slots)
    tasks.register(app, slots)
    reaper = Reaper(settings, database, storage)
    reaper.start()
    slots.look_forever()

    def drain(**_: object) -> None:
        slots.drain()

    worker_shutting_down.connect(drain)
    try:
        # Threads, because the work of a slot is to wait for a process; no gossip, no events:
        # whatever workers must agree on is in the database.
        app.Worker(
            pool="threads",
            concurrency=num_slots,
            loglevel="WARNING",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
        ).start()
    finally:
        slots.close()
        reaper.stop()
        database.dispose()
