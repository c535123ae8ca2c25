"""A trainer process as its supervisor sees it.

It is started before it has a job: importing torch takes seconds, which a warm one has behind it
when its job comes. It runs one job and ends. Orders go down its standard input, a line each; the
end of that pipe tells it that its supervisor is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

from shared import lifeline
from shared.lifecycle import Fence
from shared.locks import OwnerLock, forget
from shared.settings import Settings

Order = Literal["cancel", "release"]
_TAIL_BYTES = 4000


class TrainerProcess:
    """A child in a session of its own that holds a lock as long as it lives.

    `owner`: the id under which its supervisor claims the job.
    """

    def __init__(self, settings: Settings, num_threads: int) -> None:
        self._locks = settings.home_path / "locks"
        self._logs = settings.home_path / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._lock = OwnerLock(self._locks)
        self.owner = self._lock.owner
        self._has_job = False
        self._log_path = self._logs / f"{self.owner}.log"
        with self._log_path.open("wb") as log:
            self._process = lifeline.start(
                [sys.executable, "-m", "worker.runner"],
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock.descriptor,),
                env={**os.environ, "OMP_NUM_THREADS": str(num_threads), "PYTHONFAULTHANDLER": "1"},
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, fence: Fence) -> None:
        """Hands the job over; its output is kept under the job's id from here on."""
        self._has_job = True
        new = self._logs / f"{fence.job_id}.{fence.attempt}.log"
        with contextlib.suppress(FileNotFoundError):
            self._log_path = self._log_path.rename(new)
        self._send(
            json.dumps({"job_id": fence.job_id, "attempt": fence.attempt, "owner": fence.owner})
        )

    def order(self, order: Order) -> None:
        """Asks the trainer to end at its next step."""
        self._send(order)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        # A child that is gone is noticed by `wait`.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def wait(self, seconds: float) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the child and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def last_output(self) -> str:
        """The end of what it printed."""
        with contextlib.suppress(OSError), self._log_path.open("rb") as log:
            log.seek(max(0, self._log_path.stat().st_size - _TAIL_BYTES))
            return log.read().decode(errors="replace").strip()
        return ""

    def close(self, *, keep_lock_file: bool = False) -> None:
        """Ends whatever is left of it and lets go of the lock. The lock's file goes at once if
        it never had a job, unless told otherwise; else a reaper removes it."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._lock.release()
        if not self._has_job:
            self._log_path.unlink(missing_ok=True)
            if not keep_lock_file:
                forget(self._locks, self.owner)


def sweep_logs(home: Path, keep: int = 1000) -> None:
    """Removes the oldest jobs' output files beyond the newest `keep`."""
    logs = sorted((home / "logs").glob("*.*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[:-keep]:
        path.unlink(missing_ok=True)
