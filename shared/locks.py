"""Who is alive on this host: a file for each owner of a job, locked as long as it lives.

The supervisor makes and locks the file before it claims, and its trainer inherits the descriptor:
the lock is free when both are gone, however they ended and whatever their process ids became.
A lock says nothing about other hosts; there, leases do.
"""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from pathlib import Path


def host_name() -> str:
    """The name under which locks of this machine are known."""
    return socket.gethostname()


class OwnerLock:
    """A locked file named after a new, random owner id. `descriptor` can be inherited."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.owner = uuid.uuid4().hex
        self._path = folder / f"{self.owner}.lock"
        # Locked under a temporary name first: nobody ever sees it free while its owner lives.
        new = folder / f"{self.owner}.new"
        self.descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        os.rename(new, self._path)

    def release(self) -> None:
        """Lets go of this process's descriptor; the file stays locked while a child holds it."""
        os.close(self.descriptor)


def is_dead(folder: Path, owner: str) -> bool:
    """True when the owner's file is there and nobody holds it. False when somebody does, and
    when there is no such file: that owner belongs to another host, or was swept away."""
    try:
        descriptor = os.open(folder / f"{owner}.lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def dead_owners(folder: Path) -> list[str]:
    """The owners whose files lie here unlocked."""
    if not folder.is_dir():
        return []
    owners = [path.stem for path in folder.glob("*.lock")]
    return [owner for owner in owners if is_dead(folder, owner)]


def forget(folder: Path, owner: str) -> None:
    """Removes the file of a dead owner, once nothing depends on it any more."""
    (folder / f"{owner}.lock").unlink(missing_ok=True)
