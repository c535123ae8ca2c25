"""Sends files and folders in parts (tus 1.0), and goes on where it was broken off, in this process
or in a later one.

A folder is sent as the tar archive that it would be, made while it is read: every byte's place
follows from the list of files, so that nothing is written to the disk and any part can be sent
again. What is under way is noted in a file of the user's cache folder.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

PART_BYTES = 8 * 2**20
"""Sent with one request: what is lost at most when the connection breaks before the disk has it."""
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
MAX_REMEMBERED = 200
PORTION_VARIABLE = "SKIPLINE_UPLOAD_PART_BYTES"

Progress = Callable[[int, int], None]
"""Told the bytes sent so far, and in all."""


class SourceChanged(Exception):
    """A file is not any more what it was when the upload began."""


class Source(Protocol):
    """Bytes to send. `fingerprint`: another one as soon as they may be others."""

    name: str
    num_bytes: int
    fingerprint: str

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes from there on, or fewer at the end. Raises `SourceChanged`, `OSError`."""


def open_source(path: Path) -> Source:
    """The file or folder at `path`. Raises `OSError` if it is neither."""
    path = path.resolve()
    return FolderSource(path) if path.is_dir() else FileSource(path)


class FileSource:
    """A file as it is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self.name = path.name
        self.num_bytes = self._stamp[0]
        self.fingerprint = _digest([str(path), *map(str, self._stamp)])

    def read(self, offset: int, size: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if _stamp(self._path) != self._stamp:
            raise SourceChanged(f"{self._path} has changed since the upload began")
        return data


@dataclass(frozen=True)
class _Member:
    path: Path
    stamp: tuple[int, int]
    info: tarfile.TarInfo


class FolderSource:
    """A folder, as an uncompressed tar of its files in the order of their paths. Hidden files,
    links and what operating systems leave in folders are left out."""

    def __init__(self, root: Path) -> None:
        self.name = f"{root.name}.tar"
        self._members: list[_Member] = []
        self._starts: list[int] = []
        end = 0
        words = [str(root)]
        for path in _files(root):
            stamp = _stamp(path)
            info = tarfile.TarInfo(path.relative_to(root).as_posix())
            info.size, info.mode = stamp[0], 0o644
            self._members.append(_Member(path, stamp, info))
            self._starts.append(end)
            end += len(_header(info)) + -(-info.size // BLOCK) * BLOCK
            words += [info.name, *map(str, stamp)]
        self._end = end
        self.num_bytes = end + len(END)
        self.fingerprint = _digest(words)

    def read(self, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        beyond = min(offset + size, self.num_bytes)
        place = bisect.bisect_right(self._starts, offset) - 1
        while offset < beyond:
            if offset >= self._end:
                parts.append(END[offset - self._end : beyond - self._end])
                break
            data = self._member(place)[offset - self._starts[place] :][: beyond - offset]
            parts.append(data)
            offset += len(data)
            place += 1
        return b"".join(parts)

    def _member(self, place: int) -> bytes:
        """Header, contents and padding."""
        member = self._members[place]
        data = member.path.read_bytes()
        if _stamp(member.path) != member.stamp or len(data) != member.stamp[0]:
            raise SourceChanged(f"{member.path} has changed since the upload began")
        return _header(member.info) + data + bytes(-len(data) % BLOCK)


def _files(folder: Path) -> Iterator[Path]:
    """The files below `folder`, in the order of their paths."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith(".") or entry.name.casefold() in JUNK:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _stamp(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _digest(words: list[str]) -> str:
    text = "\0".join(words).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()


def part_bytes() -> int:
    """How much is sent with one request."""
    given = os.environ.get(PORTION_VARIABLE, "")
    return max(1, int(given)) if given.isdecimal() else PART_BYTES


# ------------------------------------------------------------------------------ what is under way


class Memory:
    """Remembers which upload a source is being sent to, by server and fingerprint, also when this
    process is killed. What cannot be written is forgotten: the upload begins anew then."""

    def __init__(self, path: Path | None = None) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self._path = path or Path(cache).expanduser() / "skipline" / "uploads.json"

    def recall(self, url: str, fingerprint: str) -> str | None:
        """The upload's id."""
        return self._read().get(_key(url, fingerprint))

    def note(self, url: str, fingerprint: str, upload_id: str | None) -> None:
        """Remembers the id, or forgets it."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path.with_suffix(".lock")):
                known = self._read()
                known.pop(_key(url, fingerprint), None)
                if upload_id is not None:
                    known[_key(url, fingerprint)] = upload_id
                newest = dict(list(known.items())[-MAX_REMEMBERED:])
                partial = self._path.with_suffix(f".{os.getpid()}.partial")
                partial.write_text(json.dumps(newest, indent=1), encoding="utf-8")
                partial.replace(self._path)
        except OSError:
            pass

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _key(url: str, fingerprint: str) -> str:
    return f"{url} {fingerprint}"


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    import fcntl

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
