"""A worker's slots: how many jobs it runs at once, and which GPUs each has to itself.

One thread takes jobs from the database for all slots: when the bell rings, when a slot becomes
free, and every other second unasked, so that no message is ever needed. It also shows the database
that this worker is there. Each job then has a thread of its own. How it is carried out is the
executor's business: nothing here knows of processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import structlog
from sqlalchemy.exc import SQLAlchemyError

from shared import lifecycle, locks, repository
from shared.database import Database
from shared.lifecycle import Capacity, Fence
from shared.repository import WorkerFacts
from shared.settings import Settings, num_cores, num_gpus
from worker.devices import claimable_devices, list_devices

log = structlog.get_logger(__name__)

SHOW_SECONDS = 15.0
"""How often the worker shows itself: a time or two may fail before it counts as gone."""
LEAVE_SHARE = 0.9
"""Of the grace period, how much the jobs get to be given back; the rest is the worker's own."""


class Executor(Protocol):
    """Carries attempts out. `run` is called in a thread for each job, all else from one thread."""

    def prepare(self) -> str:
        """The id of a new owner, under which a job may be claimed."""

    def put_back(self, owner: str, *, may_own: bool = False) -> None:
        """The prepared owner got no job; or nobody knows, since the answer was lost (`may_own`)."""

    def run(self, fence: Fence, gpus: Sequence[int], claimed_at: float) -> None:
        """Carries out what was claimed for a prepared owner, to its end, and settles the job.

        Args:
            gpus: the numbers of the worker's GPUs that the attempt has to itself.
            claimed_at: `time.monotonic()` from before the claim was sent.
        """

    def warm_up(self) -> None:
        """Gets ready for jobs to come; called now and then, also while all slots are taken."""

    def drain(self) -> None:
        """Asks all that runs to give its job back."""

    def close(self) -> None:
        """Lets go of what is still there."""


@dataclass(frozen=True)
class _Assignment:
    """What was claimed, and what of the worker it takes."""

    fence: Fence
    gpus: list[int]
    claimed_at: float


class Slots:
    """`num_slots` jobs at once, and the worker's GPUs shared out among them."""

    def __init__(
        self, settings: Settings, database: Database, num_slots: int, executor: Executor
    ) -> None:
        self._settings = settings
        self._database = database
        self._executor = executor
        self._num_slots = num_slots
        self._num_gpus = num_gpus(settings)
        self._devices = claimable_devices(settings)
        self._host = locks.host_name()
        self._worker_id = repository.new_id()
        self._facts: WorkerFacts | None = None
        self._look_seconds = min(settings.idle_look_seconds, SHOW_SECONDS)
        self._thread = threading.Thread(target=self._loop, name="slots", daemon=True)
        self._leave_at = 0.0
        # What follows is guarded by the condition, which is notified of each change.
        self._news = threading.Condition()
        self._num_free = num_slots
        self._free_gpus = list(range(self._num_gpus))
        self._show_at = 0.0
        self._is_rung = False
        self._is_draining = False
        self._is_closed = False

    # What others call

    def start(self) -> None:
        """Begins to take jobs."""
        self._thread.start()

    def ring(self) -> None:
        """There may be work: looks at once. While no slot is free it waits for one, so that a busy
        worker leaves further messages to others."""
        with self._news:
            self._news.wait_for(lambda: self._num_free or self._is_draining)
            self._is_rung = True
            self._news.notify_all()

    def drain(self) -> None:
        """Takes no more jobs; running ones write a checkpoint and are given back."""
        with self._news:
            if self._is_draining:
                return
            self._is_draining = True
            self._leave_at = time.monotonic() + LEAVE_SHARE * self._settings.grace_seconds
            self._show_at = 0.0
            self._news.notify_all()
        self._executor.drain()

    def close(self) -> None:
        """Waits until the running jobs are given back, within the grace period since `drain`, and
        leaves."""
        self.drain()
        with self._news:
            self._news.wait_for(lambda: self._num_free == self._num_slots, self._seconds_left())
            self._is_closed = True
            self._news.notify_all()
        if self._thread.is_alive():
            self._thread.join(self._seconds_left())
        self._executor.close()

    def _seconds_left(self) -> float:
        return max(0.5, self._leave_at - time.monotonic())

    # The thread that takes jobs

    def _loop(self) -> None:
        while not self._is_closed:
            try:
                self._look()
            except Exception as error:  # The database is away: the next look tries again.
                log.warning("no job could be taken", error=type(error).__name__)
            with self._news:
                self._news.wait_for(self._is_called, self._look_seconds)
        self._hide()

    def _is_called(self) -> bool:
        is_wanted = self._is_rung and self._can_take()
        return is_wanted or time.monotonic() >= self._show_at or self._is_closed

    def _can_take(self) -> bool:
        return self._num_free > 0 and not self._is_draining

    def _look(self) -> None:
        """Fills the free slots, as far as there is work."""
        self._show()
        self._executor.warm_up()
        with self._news:
            if not self._can_take():
                return
            is_rung, self._is_rung = self._is_rung, False
        # Unasked, only a read: that many idle workers do this costs the database nothing.
        if is_rung or self._is_work():
            while self._take():
                pass

    def _is_work(self) -> bool:
        with self._database.read_scope() as session:
            return repository.is_work_for(session, self._capacity())

    def _capacity(self) -> Capacity:
        with self._news:
            return Capacity(self._devices, self._num_gpus, len(self._free_gpus))

    def _take(self) -> bool:
        """Claims a job and begins it; False when there is none, or no slot is free."""
        with self._news:
            if not self._can_take():
                return False
        owner = self._executor.prepare()
        try:
            assignment = self._claim(owner)
        except BaseException:  # The claim may have landed all the same.
            self._executor.put_back(owner, may_own=True)
            raise
        if assignment is None:
            self._executor.put_back(owner)
            return False
        self._begin(assignment)
        return True

    def _claim(self, owner: str) -> _Assignment | None:
        capacity = self._capacity()
        claimed_at = time.monotonic()
        lease_seconds = self._settings.lease_seconds
        with self._database.session_scope() as session:
            claim = lifecycle.claim(
                session, owner, self._host, lease_seconds, capacity, self._worker_id
            )
            if claim is None:
                return None
            # Only this thread takes GPUs: those that were free still are.
            gpus = sorted(self._free_gpus)[: claim.num_gpus]
            if gpus:
                lifecycle.note_gpus(session, claim.fence, gpus)
        return _Assignment(claim.fence, gpus, claimed_at)

    def _begin(self, assignment: _Assignment) -> None:
        with self._news:
            self._num_free -= 1
            self._free_gpus = [gpu for gpu in self._free_gpus if gpu not in assignment.gpus]
        thread = threading.Thread(
            target=self._carry_out, args=(assignment,), name="slot", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # There can be no more threads: a reaper gives the job back.
            self._free(assignment, look=False)
            self._executor.put_back(assignment.fence.owner, may_own=True)
            raise

    def _carry_out(self, assignment: _Assignment) -> None:
        is_done = False
        try:
            self._executor.run(assignment.fence, assignment.gpus, assignment.claimed_at)
            is_done = True
        except Exception as error:
            log.error(
                "an attempt could not be carried out",
                job_id=assignment.fence.job_id,
                error=f"{type(error).__name__}: {error}",
            )
        finally:  # After a failure the next look is soon enough.
            self._free(assignment, look=is_done)

    def _free(self, assignment: _Assignment, *, look: bool) -> None:
        with self._news:
            self._num_free += 1
            self._free_gpus += assignment.gpus
            self._is_rung |= look
            self._news.notify_all()

    # How the database knows of this worker

    def _show(self) -> None:
        """Tells that this worker is there and what it has, when it is time."""
        now = time.monotonic()
        with self._news:
            if now < self._show_at:
                return
            self._show_at = now + SHOW_SECONDS
            is_draining = self._is_draining
        if self._facts is None:
            self._facts = WorkerFacts(
                self._host,
                self._num_gpus,
                num_cores(),
                self._num_slots,
                list_devices(self._settings),
            )
        facts = replace(self._facts, is_draining=is_draining)
        try:
            with self._database.session_scope() as session:
                repository.see_worker(session, self._worker_id, facts)
        except SQLAlchemyError as error:
            log.warning("the worker could not be shown", error=type(error).__name__)
            with self._news:  # A drain that has begun meanwhile is shown first.
                self._show_at = min(self._show_at, now + self._look_seconds)

    def _hide(self) -> None:
        try:
            with self._database.session_scope() as session:
                repository.forget_worker(session, self._worker_id)
        except SQLAlchemyError as error:  # It counts as gone within a minute all the same.
            log.warning("the worker could not be hidden", error=type(error).__name__)
