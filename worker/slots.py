"""A worker's slots: how many jobs it runs at once, each under a supervisor of its own.

`work` is what the bell calls: it claims from the database until nothing is left. A thread also
calls it every other second, so that no message is ever needed, and shows the database that this
worker is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy.exc import SQLAlchemyError

from shared import lifecycle, locks, repository
from shared.database import Database
from shared.settings import Settings, cuda_is_present, num_cores, num_gpus
from worker.supervisor import Supervisor
from worker.trainer_process import TrainerProcess

log = structlog.get_logger(__name__)


SETTLE_SECONDS = 10.0
"""After a claim no warm trainer is started for so long: importing torch takes a core for seconds,
which the job that has just begun can use better."""
SHOW_SECONDS = 15.0
"""How often the worker shows itself: a time or two may fail before it counts as gone."""


class Slots:
    """`num_slots` jobs at once, the cores divided among them."""

    def __init__(self, settings: Settings, database: Database, num_slots: int) -> None:
        self._settings = settings
        self._database = database
        self._free = threading.BoundedSemaphore(num_slots)
        self._num_slots = num_slots
        self._num_threads = settings.cpu_threads or max(1, num_cores() // num_slots)
        self._devices = claimable_devices(settings)
        self._num_gpus = num_gpus(settings)
        self._host = locks.host_name()
        self._worker_id = repository.new_id()
        self._shown_at = -SHOW_SECONDS
        self._warm: list[TrainerProcess] = []
        self._claimed_at = -SETTLE_SECONDS
        self._warm_lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self.draining = threading.Event()

    def work(self) -> None:
        """Runs jobs until nothing is queued, this worker drains, or all slots are taken."""
        while not self.draining.is_set() and self._free.acquire(blocking=False):
            try:
                if not self._run_next():
                    return
            except Exception as error:  # The database is away: the next look tries again.
                log.warning("no job could be claimed", error=type(error).__name__)
                return
            finally:
                self._free.release()

    def _run_next(self) -> bool:
        """Claims a job and runs it to its end; False when there is none."""
        with self._database.read_scope() as session:
            if repository.num_queued(session, self._devices, self._num_gpus) == 0:
                return False
        trainer = self._take_trainer()
        claimed_at = time.monotonic()
        try:
            with self._database.session_scope() as session:
                fence = lifecycle.claim(
                    session,
                    trainer.owner,
                    self._host,
                    self._settings.lease_seconds,
                    self._devices,
                    self._num_gpus,
                )
        except BaseException:
            # Should the claim have landed, the lock file, now free, tells a reaper.
            trainer.close(keep_lock_file=True)
            raise
        if fence is None:
            self._put_back(trainer)
            return False
        self._claimed_at = claimed_at
        Supervisor(self._settings, self._database, trainer, fence, claimed_at, self.draining).run()
        return True

    def _take_trainer(self) -> TrainerProcess:
        with self._warm_lock:
            while self._warm:
                trainer = self._warm.pop(0)
                if trainer.is_alive:
                    return trainer
                trainer.close()
        return TrainerProcess(self._settings, self._num_threads)

    def _put_back(self, trainer: TrainerProcess) -> None:
        with self._warm_lock:
            if len(self._warm) < self._settings.warm_trainers and not self.draining.is_set():
                self._warm.append(trainer)
                return
        trainer.close()

    def _warm_up(self) -> None:
        """Keeps trainers ready for jobs to come, at most one for each slot."""
        if time.monotonic() - self._claimed_at < SETTLE_SECONDS:
            return
        with self._warm_lock:
            wanted = min(self._settings.warm_trainers, self._num_slots)
            while len(self._warm) < wanted and not self.draining.is_set():
                try:
                    self._warm.append(TrainerProcess(self._settings, self._num_threads))
                except OSError as error:  # Jobs start without one, if later.
                    log.warning("no trainer could be warmed", error=str(error))
                    return

    def look_forever(self) -> None:
        """Starts the thread that looks at the queue whenever a slot is idle, keeps trainers warm,
        and shows that this worker is there."""
        self._spawn(self._look_loop, "idle-look")

    def _look_loop(self) -> None:
        self._show()
        self._warm_up()
        while not self.draining.wait(min(self._settings.idle_look_seconds, SHOW_SECONDS)):
            try:
                self._show()
                self._warm_up()
                with self._database.read_scope() as session:
                    num_queued = repository.num_queued(session, self._devices, self._num_gpus)
                for _ in range(min(num_queued, self._num_slots)):
                    self._spawn(self.work, "slot")
            except Exception as error:
                log.warning("the queue could not be read", error=type(error).__name__)

    def _show(self) -> None:
        """Tells the database that this worker is there and what it has, when it is time."""
        now = time.monotonic()
        if now - self._shown_at < SHOW_SECONDS:
            return
        try:
            with self._database.session_scope() as session:
                repository.see_worker(
                    session, self._worker_id, self._host, self._num_gpus, num_cores()
                )
        except SQLAlchemyError as error:  # The next look tries again.
            log.warning("the worker could not be shown", error=type(error).__name__)
        else:
            self._shown_at = now

    def _hide(self) -> None:
        try:
            with self._database.session_scope() as session:
                repository.forget_worker(session, self._worker_id)
        except SQLAlchemyError as error:  # It counts as gone within a minute all the same.
            log.warning("the worker could not be hidden", error=type(error).__name__)

    def _spawn(self, target: Callable[[], None], name: str) -> None:
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.add(thread)
        thread.start()

    def drain(self) -> None:
        """Takes no more jobs; running ones write a checkpoint and are given back."""
        self.draining.set()

    def close(self) -> None:
        """Waits for the running jobs to be given back, ends the warm trainers and leaves."""
        self.drain()
        deadline = time.monotonic() + self._settings.grace_seconds
        for thread in list(self._threads):
            thread.join(timeout=max(0.1, deadline - time.monotonic()))
        with self._warm_lock:
            while self._warm:
                self._warm.pop().close()
        self._hide()


def claimable_devices(settings: Settings) -> tuple[str, ...]:
    """The values of `resources.device` that this worker takes on. Looks without torch, which the
    worker's main process does not import."""
    if settings.device == "cpu" or not cuda_is_present():
        return ("auto", "cpu")
    return ("auto", "cpu", "cuda") if settings.device == "auto" else ("auto", "cuda")
