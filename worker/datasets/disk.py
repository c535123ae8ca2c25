"""Free disk, asked before it is needed, and what to say when there is none left."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from shared.errors import TrainingError

What = Literal["the dataset", "a checkpoint", "the predictions"]
_HINTS: dict[What, str] = {
    "the dataset": "Free disk below SKIPLINE_HOME (the folder cache can be deleted at any time), "
    "then retry",
    "the predictions": "Free disk where checkpoints are kept, by deleting jobs that are not needed "
    "for one, then retry",
    "a checkpoint": "Free disk where checkpoints are kept, by deleting jobs that are not needed "
    "for one, then retry: the job goes on from its last checkpoint",
}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the quota or the limit of a file's size is reached."""


def check_free_disk(
    folder: Path, num_bytes: int, reserved_bytes: int, what: What = "the dataset"
) -> None:
    """Refuses to begin what cannot end. `reserved_bytes` are left for the database, which matters
    more.

    Raises:
        TrainingError: `disk_full`, with the bytes that are needed and that are free.
    """
    free, needed = shutil.disk_usage(folder).free, num_bytes + reserved_bytes
    if needed > free:
        raise disk_full(f"{needed} bytes are needed and {free} are free", what)


@contextmanager
def full_disk_is_reported(what: What = "the dataset") -> Iterator[None]:
    """Turns the system's error of a full disk or quota, or of a file that may not grow, met while
    `what` is written, into `disk_full`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise disk_full(f"it filled up while {what} was written", what) from error
        raise


def disk_full(detail: str, what: What = "the dataset") -> TrainingError:
    return TrainingError(
        "disk_full", f"There is not enough free disk for {what}: {detail}", _HINTS[what]
    )
