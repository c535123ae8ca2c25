"""Watches over one attempt: keeps its lease, passes requests on to the trainer, brings what that
prints into the database, and settles the job when the trainer ended without doing so itself. Knows
nothing of torch."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from datetime import datetime

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared import lifecycle, repository
from shared.database import Database
from shared.hints import Hints
from shared.lifecycle import Fence, Superseded
from shared.repository import Orders
from shared.settings import Settings
from skipline.schemas import JobStatus
from worker.logs import LogShipper
from worker.trainer_process import Order, TrainerProcess

log = structlog.get_logger(__name__)

SAFETY_SECONDS = 5.0
"""The trainer is ended so long before its lease can have run out; a sixth of a shorter lease."""

LEAVING_SECONDS = 5.0
"""A trainer that has written its last word gets so long to exit by itself."""

ORDERS: dict[JobStatus, Order] = {
    JobStatus.stopping: "stop",
    JobStatus.pausing: "release",
    JobStatus.cancelling: "cancel",
}
"""What a trainer is told when its job is in such a state."""

STRENGTH: tuple[Order | None, ...] = (None, "stop", "release", "cancel")
"""A stronger order takes the place of a weaker one."""


class Supervisor:
    """Runs one attempt to its end.

    Args:
        gpus: the numbers of the worker's GPUs that the attempt has to itself.
        claimed_at: `time.monotonic()` from before the claim was sent: the lease is at least as
            old as that.
        draining: set when the worker is asked to leave.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        hints: Hints,
        trainer: TrainerProcess,
        fence: Fence,
        gpus: Sequence[int],
        claimed_at: float,
        draining: threading.Event,
    ) -> None:
        self._settings = settings
        self._database = database
        self._hints = hints
        self._trainer = trainer
        self._fence = fence
        self._gpus = gpus
        self._renewed_at = claimed_at
        self._draining = draining
        self._order: Order | None = None
        self._ordered_at = 0.0
        self._warned = False
        self._progress_at: datetime | None = None
        self._progress_seen_at = claimed_at
        self._watchdog = threading.Timer(0, lambda: None)
        self._log = log.bind(job_id=fence.job_id, attempt=fence.attempt)

    def run(self) -> None:
        """Returns when the trainer is gone and the job settled, or left to the reaper.

        Raises:
            OSError: no trainer could be started; the job was given back.
        """
        try:
            self._trainer.begin(self._fence, self._gpus)
        except OSError:
            self._give_back()
            self._trainer.close()
            raise
        self._log.info("attempt started", pid=self._trainer.pid)
        self._hints.publish(self._fence.job_id)
        shipper = LogShipper(
            self._database, self._fence, self._trainer.log_path, self._settings.max_log_bytes
        )
        self._arm_watchdog()
        try:
            while (code := self._trainer.wait(self._settings.control_seconds)) is None:
                if not self._look(shipper):
                    self._trainer.signal(signal.SIGKILL)
                    return
            shipper.ship_rest()
            self._settle(code)
        finally:
            self._watchdog.cancel()
            self._trainer.close()
            shipper.ship_rest()
            self._hints.publish(self._fence.job_id)

    def _give_back(self) -> None:
        """As far as that is possible: otherwise a reaper does it, once the lock is free."""
        reason = "The worker could not start a trainer"
        try:
            with self._database.session_scope() as session:
                lifecycle.release(session, self._fence, reason)
        except (SQLAlchemyError, Superseded) as error:
            self._log.warning("the job could not be given back", error=type(error).__name__)
        self._hints.publish(self._fence.job_id)

    def _arm_watchdog(self) -> None:
        """Ends the trainer before its lease can have run out, also while this thread waits for a
        database that does not answer."""
        self._watchdog.cancel()
        safety = min(SAFETY_SECONDS, self._settings.lease_seconds / 6)
        remaining = self._lease_end() - safety - time.monotonic()
        self._watchdog = threading.Timer(max(0.0, remaining), self._fence_off)
        self._watchdog.daemon = True
        self._watchdog.start()

    def _fence_off(self) -> None:
        self._log.error("the lease could not be renewed: the trainer is ended")
        self._trainer.signal(signal.SIGKILL)

    def _look(self, shipper: LogShipper) -> bool:
        """One round of watching; False when the trainer must end at once."""
        if self._draining.is_set():
            self._give_order("release")
        try:
            orders = self._read_and_renew()
        except SQLAlchemyError as error:
            self._log.warning("the database is away", error=type(error).__name__)
            return True
        if orders is None:  # The trainer just ended the attempt itself, or was replaced.
            if self._trainer.wait(LEAVING_SECONDS) is None:
                self._log.warning("the job was given to another worker: the trainer is ended")
            return False
        if orders.status in ORDERS:
            self._give_order(ORDERS[orders.status])
        shipper.ship()
        try:
            return self._watch_progress(orders)
        except (SQLAlchemyError, Superseded):  # The next round sees which.
            return True

    def _lease_end(self) -> float:
        return self._renewed_at + self._settings.lease_seconds

    def _read_and_renew(self) -> Orders | None:
        sent_at = time.monotonic()
        if sent_at - self._renewed_at >= self._settings.renew_seconds:
            with self._database.session_scope() as session:
                if not lifecycle.renew(session, self._fence, self._settings.lease_seconds):
                    return None
            self._renewed_at = sent_at
            self._arm_watchdog()
        with self._database.read_scope() as session:
            return repository.read_orders(session, self._fence)

    def _give_order(self, order: Order) -> None:
        """Asks; then TERM, then KILL, all within the grace period of the strongest order so far.
        Who stops may take the time that a report takes."""
        now = time.monotonic()
        if STRENGTH.index(order) > STRENGTH.index(self._order):
            self._order, self._ordered_at = order, now
            self._trainer.order(order)
        if self._order == "stop":
            return
        waited = now - self._ordered_at
        if waited > 0.8 * self._settings.grace_seconds:
            self._trainer.signal(signal.SIGKILL)
        elif waited > 0.7 * self._settings.grace_seconds:
            self._trainer.signal(signal.SIGTERM)

    def _watch_progress(self, orders: Orders) -> bool:
        """A trainer that lives and does not get on: a warning first, then an end. Measured by
        this process's clock, which stands still while a laptop sleeps."""
        now = time.monotonic()
        if orders.progress_at != self._progress_at:
            self._progress_at, self._progress_seen_at = orders.progress_at, now
        idle_seconds = now - self._progress_seen_at
        if idle_seconds > self._settings.stall_failure_seconds:
            error = {
                "code": "stalled",
                "message": f"No progress for {idle_seconds:.0f} s",
                "hint": "Look at the worker's disk and GPU; SKIPLINE_STALL_FAILURE_SECONDS is the "
                "limit",
            }
            with self._database.session_scope() as session:
                lifecycle.finish(session, self._fence, JobStatus.failed, error=error)
            return False
        if idle_seconds > self._settings.stall_warning_seconds and not self._warned:
            self._warned = True
            message = f"No progress for {idle_seconds:.0f} s"
            with self._database.session_scope() as session:
                repository.add_event(session, self._fence, "warning", "stalled", message, {})
        return True

    def _settle(self, code: int) -> None:
        """The trainer has ended: if it did not say how, say it for it."""
        patience_ends = self._lease_end()
        if self._order in ("release", "cancel"):
            patience_ends = min(patience_ends, self._ordered_at + self._settings.grace_seconds)
        while True:
            try:
                with self._database.session_scope() as session:
                    orders = repository.read_orders(session, self._fence)
                    if orders is None:  # It did, or was replaced.
                        self._log.info("attempt ended", exit_code=code)
                        return
                    if orders.status is JobStatus.cancelling:
                        lifecycle.finish(session, self._fence, JobStatus.cancelled)
                    elif self._draining.is_set():
                        reason = "The worker left before a checkpoint was written"
                        lifecycle.release(session, self._fence, reason)
                    else:
                        self._count_crash(session, code)
                return
            except Superseded:
                return
            except SQLAlchemyError as error:
                self._log.warning("the database is away", error=type(error).__name__)
            if time.monotonic() > patience_ends:
                break
            time.sleep(self._settings.control_seconds)
        # Nobody renews the lease any more and the lock is free: a reaper takes it from here.

    def _count_crash(self, session: Session, code: int) -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        output = self._trainer.last_output()
        self._log.error("the trainer crashed", how=how, output=output)
        hint = "Look at the output; signal 9 often means that memory ran out: try a smaller batch"
        lifecycle.lose(
            session,
            self._fence.job_id,
            self._fence.attempt,
            f"The trainer {how}",
            max_crashes=self._settings.max_crashes,
            error={
                "code": "trainer_crashed",
                "message": f"The trainer {how}. {last_lines(output)}".strip(),
                "hint": hint,
            },
        )


def last_lines(output: str, num_lines: int = 5) -> str:
    """The end of a process's output, for an error message."""
    return "\n".join(output.splitlines()[-num_lines:])
