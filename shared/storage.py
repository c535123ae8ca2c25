"""Artifacts: folders that are complete or not there, below keys that are never used twice.

A folder is written under a temporary name, each file flushed to the disk and hashed into a
manifest that is written last; one rename makes it visible. A reader checks files against the
manifest. Which keys exist is the database's business: what no row names may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import CheckpointCorrupt, SetupError

MANIFEST = "manifest.json"
_STAGING = "staging"


class Storage:
    """A folder on a disk that API and workers share.

    Args:
        root: made when missing. Raises `SetupError` when it cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        try:
            (self.root / _STAGING).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(
                f"The folder {self.root} cannot be written ({error.strerror}): "
                "set SKIPLINE_HOME or SKIPLINE_ARTIFACTS_URL to one that can"
            ) from None

    def path(self, key: str) -> Path:
        """Where `key` lies. Raises `ValueError` for a key that leads out of the storage."""
        path = (self.root / key).resolve()
        if not path.is_relative_to(self.root.resolve()) or path == self.root.resolve():
            raise ValueError(f"{key!r} is no key")
        return path

    @contextmanager
    def writing(self, key: str, owner: str) -> Iterator[Path]:
        """Yields an empty folder to write files into; it appears below `key` when the block ends
        without an exception, and vanishes otherwise. `owner` (see `shared.locks`) tells `sweep`
        whose leftovers it finds after a crash."""
        target = self.path(key)
        staged = self.root / _STAGING / f"{owner}.{uuid.uuid4().hex}"
        staged.mkdir()
        try:
            yield staged
            manifest = {
                str(file.relative_to(staged)): _flush_and_hash(file)
                for file in sorted(staged.rglob("*"))
                if file.is_file()
            }
            (staged / MANIFEST).write_text(json.dumps(manifest, indent=2))
            _flush(staged / MANIFEST)
            _flush(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(staged, target)
            _flush(target.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def verify(self, key: str, *names: str) -> Path:
        """The folder of `key`, after these files (all, when none is named) were found to be as
        they were written.

        Raises:
            CheckpointCorrupt: a file is missing, or differs.
            OSError: the disk cannot be read, which says nothing about the files.
        """
        folder = self.path(key)
        try:
            manifest: dict[str, dict[str, str | int]] = json.loads((folder / MANIFEST).read_text())
            for name in names or manifest:
                if _digest(folder / name) != manifest[name]["sha256"]:
                    raise CheckpointCorrupt(f"The file {name} is not as it was written")
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise CheckpointCorrupt(
                f"A file is missing or unreadable ({type(error).__name__})"
            ) from None
        return folder

    def num_bytes(self, key: str) -> int:
        """The size of all files below `key`."""
        return sum(file.stat().st_size for file in self.path(key).rglob("*") if file.is_file())

    def delete(self, key: str) -> None:
        """Removes what lies below `key`, if anything does."""
        shutil.rmtree(self.path(key), ignore_errors=True)

    def keys(self, prefix: str) -> list[str]:
        """The keys of the complete folders below `prefix`."""
        manifests = self.path(prefix).rglob(MANIFEST)
        return sorted(str(path.parent.relative_to(self.root.resolve())) for path in manifests)

    def sweep(self, owner: str) -> None:
        """Removes what a dead owner left half-written."""
        for entry in (self.root / _STAGING).glob(f"{owner}.*"):
            shutil.rmtree(entry, ignore_errors=True)

    def check(self) -> None:
        """Raises `OSError` when nothing can be written."""
        probe = self.root / _STAGING / f".probe-{os.getpid()}"
        probe.write_bytes(b"ok")
        probe.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_and_hash(path: Path) -> dict[str, str | int]:
    _flush(path)
    return {"sha256": _digest(path), "num_bytes": path.stat().st_size}
