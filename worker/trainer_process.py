"""A trainer process as its supervisor sees it.

It may be started before it has a job: importing torch takes seconds, which a warm one has behind it
when its job comes. It runs one job and ends. The job and orders go down its standard input, a line
each; the end of that pipe tells it that its supervisor is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from shared import lifeline
from shared.lifecycle import Fence
from shared.locks import OwnerLock, forget
from shared.settings import Settings

Order = Literal["cancel", "release", "stop"]
COMMAND = (sys.executable, "-m", "worker.runner")
_TAIL_BYTES = 4000


class TrainerProcess:
    """A child in a session of its own that holds a lock as long as it lives. The lock is there from
    the beginning, the child once it is asked for.

    `owner`: the id under which a job is claimed for it. `log_path`: the file of what it prints.
    """

    def __init__(self, settings: Settings, num_threads: int) -> None:
        self._locks = settings.home_path / "locks"
        self._logs = settings.home_path / "logs"
        self._num_threads = num_threads
        self._lock = OwnerLock(self._locks)
        self.owner = self._lock.owner
        self._has_job = False
        self.log_path = self._logs / f"{self.owner}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the child. Raises `OSError` when there can be no more processes or files."""
        self._logs.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = lifeline.start(
                COMMAND,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock.descriptor,),
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(self._num_threads),
                    "PYTHONFAULTHANDLER": "1",
                },
            )

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def _child(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it was started"
        return self._process

    def begin(self, fence: Fence, gpus: Sequence[int]) -> None:
        """Hands the job over, with the numbers of the worker's GPUs that it has to itself; its
        output is kept under the job's id from here on. Raises `OSError` as `start`."""
        self._has_job = True
        name = self._logs / f"{fence.job_id}.{fence.attempt}.log"
        if self._process is None:
            self.log_path = name
            self.start()
        else:
            with contextlib.suppress(FileNotFoundError):
                self.log_path = self.log_path.rename(name)
        self._send(json.dumps({**asdict(fence), "gpus": list(gpus)}))

    def order(self, order: Order) -> None:
        """Asks the trainer to end at its next step."""
        self._send(order)

    def _send(self, line: str) -> None:
        stdin = self._child.stdin
        assert stdin is not None
        # A child that is gone is noticed by `wait`.
        with contextlib.suppress(BrokenPipeError):
            stdin.write(line.encode() + b"\n")
            stdin.flush()

    def wait(self, seconds: float) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the child and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def last_output(self) -> str:
        """The end of what it printed."""
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
            return log.read().decode(errors="replace").strip()
        return ""

    def close(self, *, may_own: bool = False) -> None:
        """Ends whatever is left of it and lets go of the lock. The lock's file goes at once if it
        never had a job, unless it `may_own` one all the same; else a reaper removes it."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._lock.release()
        if not self._has_job:
            self.log_path.unlink(missing_ok=True)
            if not may_own:
                forget(self._locks, self.owner)


def sweep_logs(home: Path, keep: int = 1000) -> None:
    """Removes the oldest jobs' output files beyond the newest `keep`."""
    logs = sorted((home / "logs").glob("*.*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[:-keep]:
        path.unlink(missing_ok=True)
