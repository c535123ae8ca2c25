"""Free disk, asked before it is needed, and what to say when there is none left."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import TrainingError

RESERVED_BYTES = 256 * 2**20
"""Left free for the database and checkpoints, which matter more than a dataset."""


def check_free_disk(folder: Path, num_bytes: int) -> None:
    """Refuses to begin what cannot end.

    Raises:
        TrainingError: `disk_full`, with the bytes that are needed and that are free.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes + RESERVED_BYTES > free:
        raise disk_full(f"{num_bytes + RESERVED_BYTES} bytes are needed and {free} are free")


@contextmanager
def full_disk_is_reported(what: str = "the dataset") -> Iterator[None]:
    """Turns the system's error of a full disk or quota, met while `what` is written, into
    `disk_full`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(f"it filled up while {what} was written", what) from error
        raise


def disk_full(detail: str, what: str = "the dataset") -> TrainingError:
    return TrainingError(
        "disk_full",
        f"There is not enough free disk for {what}: {detail}",
        "Free disk below SKIPLINE_HOME (the folder cache can be deleted at any time), then retry",
    )
