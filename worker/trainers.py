"""Carries attempts out in trainer processes, each under a supervisor, and keeps some warm."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import structlog

from shared.database import Database
from shared.hints import Hints
from shared.lifecycle import Fence
from shared.settings import Settings, num_cores
from worker.supervisor import Supervisor
from worker.trainer_process import TrainerProcess

log = structlog.get_logger(__name__)

SETTLE_SECONDS = 10.0
"""After a claim no warm trainer is started for so long: importing torch takes a core for seconds,
which the job that has just begun can use better."""


class Trainers:
    """The executor of a real worker: see `worker.slots.Executor`. The cores are divided among the
    slots."""

    def __init__(self, settings: Settings, database: Database, num_slots: int) -> None:
        self._settings = settings
        self._database = database
        self._hints = Hints(settings)
        self._num_threads = settings.cpu_threads or max(1, num_cores() // num_slots)
        self._num_wanted = min(settings.warm_trainers, num_slots)
        self._warm: list[TrainerProcess] = []
        self._prepared: dict[str, TrainerProcess] = {}
        self._claimed_at = -SETTLE_SECONDS
        self._draining = threading.Event()

    def prepare(self) -> str:
        trainer = self._take()
        self._prepared[trainer.owner] = trainer
        return trainer.owner

    def _take(self) -> TrainerProcess:
        while self._warm:
            trainer = self._warm.pop(0)
            if trainer.is_alive:
                return trainer
            trainer.close()
        return TrainerProcess(self._settings, self._num_threads)

    def put_back(self, owner: str, *, may_own: bool = False) -> None:
        trainer = self._prepared.pop(owner)
        if may_own or not trainer.is_alive:
            trainer.close(may_own=may_own)
        else:
            self._warm.append(trainer)

    def run(self, fence: Fence, gpus: Sequence[int], claimed_at: float) -> None:
        self._claimed_at = claimed_at
        Supervisor(
            self._settings,
            self._database,
            self._hints,
            self._prepared.pop(fence.owner),
            fence,
            gpus,
            claimed_at,
            self._draining,
        ).run()

    def warm_up(self) -> None:
        if time.monotonic() - self._claimed_at < SETTLE_SECONDS:
            return
        while len(self._warm) < self._num_wanted and not self._draining.is_set():
            trainer = TrainerProcess(self._settings, self._num_threads)
            try:
                trainer.start()
            except OSError as error:  # Jobs start without one, if later.
                trainer.close()
                log.warning("no trainer could be warmed", error=str(error))
                return
            self._warm.append(trainer)

    def drain(self) -> None:
        self._draining.set()

    def close(self) -> None:
        while self._warm:
            self._warm.pop().close()
        self._hints.close()
