"""Something that is done again and again beside everything else."""

from __future__ import annotations

import threading
from collections.abc import Callable

JOIN_SECONDS = 10.0


class Timer:
    """A thread that does `work` every so many seconds, from when it is started until it is stopped.
    What `work` raises ends the thread: it should raise nothing."""

    def __init__(self, name: str, seconds: float, work: Callable[[], object]) -> None:
        self._seconds = seconds
        self._work = work
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for work that is under way, though not for ever."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._work()
