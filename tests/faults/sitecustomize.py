"""Faults that no signal can cause, done to real processes from within: with this folder on
PYTHONPATH, each process of a service runs this before anything else. Variables say what is done.

- SKIPLINE_TEST_WORKER_CLOCK_SECONDS: a worker's and its trainers' clock is so many seconds off.
- SKIPLINE_TEST_KILL_IN_BELL: an API dies when it is about to ring, once for each file of that name.
- SKIPLINE_TEST_SMALL_FILES: trainers cannot write large files while there is a file of that name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SMALL_FILE_BYTES = 20 * 2**20
"""Smaller than the weights of the smallest network, larger than all that a test's database is."""


def shift_clock(seconds: float) -> None:
    import datetime
    import time

    real_time, real_time_ns = time.time, time.time_ns

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return cls.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)

    time.time = lambda: real_time() + seconds
    time.time_ns = lambda: real_time_ns() + int(seconds * 1e9)
    datetime.datetime = Shifted  # type: ignore[misc]


def die_in_bell(flag: Path) -> None:
    import signal

    from shared.dispatch import Bell

    ring = Bell.ring

    def ring_or_die(self: Bell) -> None:
        try:
            flag.unlink()
        except FileNotFoundError:
            ring(self)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    Bell.ring = ring_or_die  # type: ignore[method-assign]


def limit_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, SMALL_FILE_BYTES))


IS_TRAINER = "worker.runner" in sys.orig_argv
if (IS_TRAINER or "worker" in sys.orig_argv) and "SKIPLINE_TEST_WORKER_CLOCK_SECONDS" in os.environ:
    shift_clock(float(os.environ["SKIPLINE_TEST_WORKER_CLOCK_SECONDS"]))
if "api" in sys.orig_argv and "SKIPLINE_TEST_KILL_IN_BELL" in os.environ:
    die_in_bell(Path(os.environ["SKIPLINE_TEST_KILL_IN_BELL"]))
if IS_TRAINER and Path(os.environ.get("SKIPLINE_TEST_SMALL_FILES", "") or "/nowhere").exists():
    limit_files()
