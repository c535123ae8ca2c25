"""The original files of built-in datasets: found in the cache, or downloaded into it.

Knows names, addresses and hashes; nothing of what is in the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from shared.errors import TrainingError
from worker.datasets.disk import full_disk_is_reported
from worker.datasets.locks import Interrupted, exclusive, never

TIMEOUT_SECONDS = 30.0
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Original:
    """A file as it was published. `path`: its place in the folder of downloads, which is where
    torchvision puts it too; `md5`: what its publisher or torchvision says it has."""

    path: str
    url: str
    md5: str


def fetch(
    title: str, original: Original, root: Path, should_stop: Callable[[], bool] = never
) -> Path:
    """The file below `root`, downloaded unless it is there with the right hash.

    One process downloads while others that want the file wait. It appears whole or not at all;
    a file of another hash in its place is replaced, and left where it is when that fails.

    Raises:
        TrainingError: `download_failed`, `disk_full`.
        Interrupted: `should_stop()` became true.
    """
    target = root / original.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target.with_name(f".{target.name}.lock"), should_stop):
        if not has_md5(target, original.md5, should_stop):
            _download(title, original, target, should_stop)
    return target


def has_md5(file: Path, md5: str, should_stop: Callable[[], bool] = never) -> bool:
    """True of a file with this hash, in hexadecimal.

    Raises:
        Interrupted: `should_stop()` became true.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                _check(should_stop)
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == md5


def _download(
    title: str, original: Original, target: Path, should_stop: Callable[[], bool]
) -> None:
    partial = target.with_name(f".{target.name}.partial")
    request = Request(original.url, headers={"User-Agent": "skipline"})  # noqa: S310  # ours
    try:
        with urlopen(request, timeout=TIMEOUT_SECONDS) as answer, partial.open("wb") as file:  # noqa: S310
            while chunk := answer.read(CHUNK_BYTES):
                _check(should_stop)
                with full_disk_is_reported():
                    file.write(chunk)
        if not has_md5(partial, original.md5, should_stop):
            raise _failed(title, original, "what was downloaded has another hash than it should")
        partial.replace(target)
    except (OSError, HTTPException):
        detail = "it could not be downloaded"
        if target.exists():
            detail += ", and the file in its place has another hash than it should"
        raise _failed(title, original, detail) from None
    finally:
        partial.unlink(missing_ok=True)


def _check(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Interrupted


def _failed(title: str, original: Original, detail: str) -> TrainingError:
    return TrainingError(
        "download_failed",
        f"{title} is not on this worker: {detail}",
        f"Put the file {original.path} from {original.url} (MD5 {original.md5}) into the folder "
        "cache/downloads below SKIPLINE_HOME, then retry the job",
    )
