"""What is done to the processes of a soak, at random moments in an order drawn beforehand."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.soak.servers import Server, Skipline

WEIGHTS = {
    "a trainer killed": 7,
    "a worker killed": 4,
    "a host killed": 3,
    "a worker asked to leave": 3,
    "a host asleep past its lease": 2,
    "Redis killed": 4,
    "PostgreSQL killed": 3,
    "the API killed": 2,
}
"""How often each, of all. A host is a worker with its trainers."""


@dataclass
class Faults:
    """Does one thing after the other; `counts` says how often what was done.

    `sleep_seconds`: for which a host is stopped, more than a lease.
    """

    api: Skipline
    workers: Sequence[Skipline]
    redis: Server
    postgres: Server
    sleep_seconds: float
    grace_seconds: float
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, stopping: threading.Event, pause_seconds: tuple[float, float]) -> None:
        """Until `stopping` is set; what was stopped runs again when this returns."""
        actions = self._actions()
        for name in self._order():
            if stopping.wait(self.rng.uniform(*pause_seconds)):
                return
            if actions[name]():
                self.counts[name] += 1

    def _order(self) -> Iterator[str]:
        """Each once, so that a short soak has seen all; then by weight."""
        names = list(WEIGHTS)
        self.rng.shuffle(names)
        yield from names
        while True:
            yield self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]

    def _actions(self) -> Mapping[str, Callable[[], bool]]:
        return {
            "a trainer killed": self._kill_trainer,
            "a worker killed": lambda: self._restart(self._any_worker()),
            "a host killed": self._kill_host,
            "a worker asked to leave": self._drain,
            "a host asleep past its lease": self._put_to_sleep,
            "Redis killed": lambda: self._restart(self.redis),
            "PostgreSQL killed": lambda: self._restart(self.postgres),
            "the API killed": lambda: self._restart(self.api),
        }

    def _any_worker(self) -> Skipline:
        """One that has a job, where there is one."""
        busy = [worker for worker in self.workers if worker.trainers(with_job=True)]
        return self.rng.choice(busy or list(self.workers))

    def _restart(self, server: Server) -> bool:
        server.kill()
        self._pause()
        server.start()
        return True

    def _pause(self) -> None:
        threading.Event().wait(self.rng.uniform(0.2, 4.0))

    def _kill_trainer(self) -> bool:
        """False when there was none, in which case nothing was done."""
        found = self._any_worker().trainers(with_job=True)
        return bool(found) and _send(self.rng.choice(found), signal.SIGKILL)

    def _kill_host(self) -> bool:
        worker = self._any_worker()
        for pid in worker.trainers():
            _send(pid, signal.SIGKILL)
        return self._restart(worker)

    def _drain(self) -> bool:
        worker = self._any_worker()
        code = worker.stop(self.grace_seconds + 10)
        if code != 0:
            raise AssertionError(f"a worker that was asked to leave ended with {code}")
        worker.start()
        return True

    def _put_to_sleep(self) -> bool:
        worker = self._any_worker()
        asleep = [worker.pid, *worker.trainers()]
        try:
            for pid in asleep:
                _send(pid, signal.SIGSTOP)
            threading.Event().wait(self.sleep_seconds)
        finally:
            for pid in reversed(asleep):
                _send(pid, signal.SIGCONT)
        return True


def _send(pid: int, number: signal.Signals) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
