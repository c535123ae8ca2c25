"""A lock file that one process at a time can hold; the system frees it when its holder dies."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOOK_SECONDS = 0.1


class Interrupted(Exception):
    """`should_stop` said so. What was begun is not visible to anybody."""


def never() -> bool:
    """The `should_stop` of who is never interrupted."""
    return False


@contextmanager
def exclusive(path: Path, should_stop: Callable[[], bool] = never) -> Iterator[None]:
    """Holds the lock file `path`, made if need be; waits for it as long as it takes.

    Raises:
        Interrupted: `should_stop()` became true while waiting.
    """
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if should_stop():
                    raise Interrupted from None
                time.sleep(LOOK_SECONDS)
        yield
