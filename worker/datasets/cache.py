"""This machine's cache of packed datasets: who uses what, and what goes when it grows too large.

A packed dataset is used by whoever holds a lock on its folder, which the system frees with the
process; the folder's time of change is when it was last taken into use. Loads no array library: a
worker's main process tidies up with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import structlog

from shared.settings import Settings
from worker.datasets.locks import Interrupted, exclusive

log = structlog.get_logger(__name__)

_LOCK_SUFFIX = ".lock"
_held: dict[Path, int] = {}
"""Descriptors of the folders that this process uses."""


def packed_path(settings: Settings) -> Path:
    """The folder of all packed datasets, each at `<hash>/<size>` below it."""
    return settings.cache_path / "packed"


def lock_path(folder: Path) -> Path:
    """The file that is locked by whoever makes or removes a packed dataset."""
    return folder.with_name(f".{folder.name}{_LOCK_SUFFIX}")


def partial_path(folder: Path) -> Path:
    """Where it lies while it is made or removed."""
    return folder.with_name(f".{folder.name}.partial")


def hold(folder: Path) -> bool:
    """Takes a packed dataset into use for as long as this process lives; False if there is none."""
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_at(descriptor, folder):
            break
        os.close(descriptor)  # It was removed, or replaced, in this moment.
    os.utime(descriptor)
    if (former := _held.pop(folder, None)) is not None:
        os.close(former)
    _held[folder] = descriptor
    return True


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def bound(root: Path, max_bytes: int) -> None:
    """Removes packed datasets below `root` until they have `max_bytes` together, the one first that
    was used longest ago. Those stay that a process uses or makes."""
    folders = list(_folders(root))
    sizes = {folder: _num_bytes(folder) + _num_bytes(partial_path(folder)) for folder in folders}
    excess = sum(sizes.values()) - max_bytes
    for folder in sorted(folders, key=_last_use):
        if excess <= 0:
            return
        if _remove(folder):
            excess -= sizes[folder]
            log.info("packed dataset cleared away", num_bytes=sizes[folder])


def forget(root: Path, known_hashes: Collection[str]) -> None:
    """Removes packed datasets below `root` that are of none of these: what they were made of was
    deleted. Those stay that a process uses or makes."""
    for folder in list(_folders(root)):
        if folder.parent.name not in known_hashes and _remove(folder):
            log.info("packed dataset of a deleted one cleared away")


def _folders(root: Path) -> Iterator[Path]:
    """Every packed dataset, and where one was begun and not finished."""
    for lock in root.glob(f"*/.*{_LOCK_SUFFIX}"):
        yield lock.with_name(lock.name.removeprefix(".").removesuffix(_LOCK_SUFFIX))


def _last_use(folder: Path) -> float:
    """0 where nothing was finished."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _num_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _remove(folder: Path) -> bool:
    """False when a process uses or makes it."""
    try:
        with exclusive(lock_path(folder), should_stop=lambda: True), _unused(folder):
            shutil.rmtree(partial_path(folder), ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                folder.rename(partial_path(folder))
            shutil.rmtree(partial_path(folder), ignore_errors=True)
    except (Interrupted, BlockingIOError):
        return False
    return True


@contextlib.contextmanager
def _unused(folder: Path) -> Iterator[None]:
    """Keeps others from taking it into use. Raises `BlockingIOError` when one has."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
