"""Archives of images: zip, and tar plain or compressed with gzip, bzip2, xz or zstd.

An archive is read twice: first its list of members, which is checked whole, and with it the few
small members that say what others show; then the images, one by one and in memory. Nothing is ever
extracted, so no name in an archive reaches the file system.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import struct
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_IFDIR, S_IFMT, S_IFREG
from typing import IO, cast

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from shared.archive_kinds import HEAD_BYTES, KINDS, archive_kind
from shared.errors import TrainingError
from shared.settings import Settings
from worker.datasets.formats import find_layout
from worker.datasets.layout import (
    MAX_FILE_BYTES,
    Layout,
    Listing,
    Parts,
    Read,
    Source,
    SourceImage,
    is_junk,
    printable,
    source_of,
)

MAX_RATIO = 200
"""How many bytes may come out of one: photos hardly shrink, bombs grow a thousandfold."""
ALWAYS_ALLOWED_BYTES = 64 * 2**20
"""Small archives of simple drawings may well exceed the ratio."""
MAX_HEADER_BYTES = 2**20
"""One tar header with its extensions; real ones have a few KiB."""
TAR_BLOCK = 512
ZIP_LIST_BYTES = 256
"""More than an entry of a zip's list takes on average: 46 and its path."""
ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")
"""The beginning of a path from the root, or from a drive."""
MAX_ZSTD_WINDOW_LOG = 27
"""Of what was unpacked before, 128 MiB at most are kept to refer to: a header may ask for more."""
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    zstd.ZstdError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    IndexError,
    NotImplementedError,  # a compression that zipfile does not know
    RecursionError,  # a chain of tar headers
)


@dataclass(frozen=True, slots=True)
class _Member:
    """An entry of the list. `parts` is its path, checked; `num_bytes` as the archive claims."""

    parts: Parts
    is_folder: bool
    num_bytes: int


def open_archive(
    path: Path, settings: Settings, find: Callable[[Listing], Layout] = find_layout
) -> Source:
    """The images in an archive, in the archive's order. `find` tells its layout.

    Raises:
        TrainingError: `unsafe_archive` for members that are not plain files and folders below the
            archive's own root, each once; `bad_archive` for what is damaged, encrypted or no
            archive; `archive_too_large`; `bad_class_name`; what `find` raises.
    """
    archive = _open(path, settings)
    listing, large_files = _survey(archive.members(), settings)
    layout = find(listing)
    for file in large_files:
        if layout.wants(file) and not layout.has_large_files:
            shown = printable("/".join(file))
            raise _too_large(f"the file {shown} of more than {MAX_FILE_BYTES // 2**20} MiB")

    def read() -> Iterator[SourceImage]:
        for member, contents in archive.members():
            if _is_file(member) and layout.wants(member.parts):
                yield from layout.images(member.parts, contents)

    return source_of(layout.survey(listing), read)


def _open(path: Path, settings: Settings) -> _Zip | _Tar:
    with _damage_is_reported(), path.open("rb") as file:
        kind = archive_kind(file.read(HEAD_BYTES)) or "tar"
    limit = min(
        settings.max_dataset_bytes, max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * path.stat().st_size)
    )
    if kind == "zip":
        return _Zip(path, limit, settings.max_dataset_images)
    return _Tar(path, kind, limit)


def _survey(
    members: Iterable[tuple[_Member, Read]], settings: Settings
) -> tuple[Listing, list[Parts]]:
    """Checks the whole list; also returns the files that are too large for one image."""
    names = _Names()
    listing = Listing()
    large_files: list[Parts] = []
    for number, (member, contents) in enumerate(members, start=1):
        if number > settings.max_dataset_images:
            raise _too_large(f"more than {settings.max_dataset_images} entries")
        names.add(member)
        if _is_file(member):
            listing.add_file(member.parts, member.num_bytes, contents)
            if member.num_bytes > MAX_FILE_BYTES:
                large_files.append(member.parts)
    listing.folders.update(folder for folder in names.folders if not _is_junk(folder))
    return listing, large_files


class _Names:
    """The paths of an archive, refused where two of them would meet on some file system."""

    def __init__(self) -> None:
        self.folders: set[Parts] = set()
        self._spellings: dict[str, Parts] = {}
        self._files: set[str] = set()

    def add(self, member: _Member) -> None:
        folder = member.parts if member.is_folder else member.parts[:-1]
        if folder not in self.folders:
            for depth in range(1, len(folder) + 1):
                self._add_folder(folder[:depth])
        if not member.is_folder:
            key = _fold(member.parts)
            if key in self._files or key in self._spellings:
                raise _unsafe(member.parts, "is there twice, or once more in another spelling")
            self._files.add(key)

    def _add_folder(self, folder: Parts) -> None:
        key = _fold(folder)
        if self._spellings.setdefault(key, folder) != folder or key in self._files:
            raise _unsafe(folder, "is there once more in another spelling, or as a file")
        self.folders.add(folder)


class _Zip:
    """A zip file. `limit`: bytes that all members together may claim."""

    def __init__(self, path: Path, limit: int, max_entries: int) -> None:
        self.path = path
        self.limit = limit
        self.max_entries = max_entries

    def members(self) -> Iterator[tuple[_Member, Read]]:
        with _damage_is_reported(), self._open() as archive:
            total = 0
            for info in archive.infolist():
                total += info.file_size
                if total > self.limit:
                    raise _too_large("too many bytes for its size")
                parts = _check_path(info.orig_filename)
                kind = S_IFMT(info.external_attr >> 16)
                if kind not in (0, S_IFDIR if info.is_dir() else S_IFREG):
                    raise _unsafe(parts, "is neither a plain file nor a folder")
                if info.flag_bits & 1:
                    raise _bad("It is encrypted")
                if parts:
                    with ExitStack() as opened:
                        member = _Member(parts, info.is_dir(), info.file_size)
                        yield member, _read_zip(archive, info, opened)

    def _open(self) -> zipfile.ZipFile:
        """Opens it after a look at how many entries are listed: `ZipFile` reads them all."""
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - 2**17))
            tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0:
            raise _bad("Its end is missing")
        (list_bytes,) = struct.unpack_from("<I", tail, at + 12)
        if at >= 76 and tail[at - 20 : at - 16] == b"PK\x06\x07":  # zip64 overrides it
            (list_bytes,) = struct.unpack_from("<Q", tail, at - 76 + 40)
        if list_bytes > self.max_entries * ZIP_LIST_BYTES:
            raise _too_large(f"more than {self.max_entries} entries")
        return zipfile.ZipFile(self.path)


def _read_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo, opened: ExitStack) -> Read:
    """Reads a member, which is opened when it is first asked for; at its end the CRC is checked."""
    file: IO[bytes] | None = None

    def read(size: int) -> bytes:
        nonlocal file
        with _damage_is_reported():
            if file is None:
                file = opened.enter_context(archive.open(info))
            data = file.read(size if size >= 0 else info.file_size + 1)  # bounded, if it lies
        if len(data) != (size if size >= 0 else info.file_size):
            raise _bad("A member has another size than it claims")
        return data

    return read


class _Tar:
    """A tar file. `limit`: bytes that may come out of it, whatever they are."""

    def __init__(self, path: Path, compression: str, limit: int) -> None:
        self.path = path
        self.compression = compression
        self.limit = limit

    def members(self) -> Iterator[tuple[_Member, Read]]:
        for info, stream in self._entries():
            parts = _check_path(info.name)
            is_plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and info.sparse is None
            if not (is_plain or info.isdir()):
                raise _unsafe(parts, "is neither a plain file nor a folder")
            if info.size < 0:  # which a header can say, and which reads as: everything
                raise _bad("A member has a negative size")
            if parts:
                yield _Member(parts, info.isdir(), info.size), _read_tar(stream, info)

    def _entries(self) -> Iterator[tuple[tarfile.TarInfo, _TarStream]]:
        with _damage_is_reported(), closing(self._decompress()) as file:
            stream = _TarStream(file, self.limit)
            tar = tarfile.TarFile(fileobj=cast("IO[bytes]", stream))
            while (info := tar.next()) is not None:
                yield info, stream
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                stream.seek(tar.offset)
            stream.seek(tar.offset)
            if stream.read(TAR_BLOCK) != bytes(TAR_BLOCK):  # where tarfile ends without a word
                raise _bad("It is cut short or damaged")
            while stream.read(MAX_HEADER_BYTES):
                pass  # to the end, where the compression's checksum is

    def _decompress(self) -> IO[bytes]:
        if self.compression == "gzip":
            return cast("IO[bytes]", gzip.open(self.path))
        if self.compression == "bzip2":
            return bz2.open(self.path)
        if self.compression == "xz":
            return lzma.open(self.path)
        if self.compression == "zstd":
            options = {int(zstd.DecompressionParameter.window_log_max): MAX_ZSTD_WINDOW_LOG}
            return cast("IO[bytes]", zstd.open(self.path, options=options))
        return self.path.open("rb")


def _read_tar(stream: _TarStream, info: tarfile.TarInfo) -> Read:
    """Reads a member, until the next one is looked at."""
    position, end = info.offset_data, info.offset_data + info.size

    def read(size: int) -> bytes:
        nonlocal position
        length = size if size >= 0 else end - position
        if length > end - position:
            raise _bad("A member is shorter than it should be")
        with _damage_is_reported():
            data = stream.read_data(position, length)
        position += length
        return data

    return read


class _TarStream:
    """The decompressed bytes, read forward only, never more than `limit` of them.

    `tarfile` reads headers through it, and a header may claim any length, so that a single
    `read` is bounded too.
    """

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self._limit = limit

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int) -> None:
        if position > self._limit:
            raise _too_large("too many bytes for its size")
        self._file.seek(position)

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise _bad("A header is larger than any real one")
        if self.tell() + size > self._limit + MAX_HEADER_BYTES:
            raise _too_large("too many bytes for its size")
        return self._file.read(size)

    def read_data(self, position: int, size: int) -> bytes:
        """A member's bytes; `size` has been checked with the list."""
        self.seek(position)
        data = self._file.read(size)
        if len(data) != size:
            raise _bad("It is cut short")
        return data


def _is_file(member: _Member) -> bool:
    return not member.is_folder and not _is_junk(member.parts)


def _is_junk(parts: Parts) -> bool:
    return any(is_junk(part) for part in parts)


def _check_path(name: str) -> Parts:
    """The parts of a member's path; none for the archive's own root."""
    parts = tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
    if ".." in parts or "\0" in name or ABSOLUTE.match(name):
        raise _unsafe(parts, "leads out of the archive")
    return parts


def _fold(parts: Parts) -> str:
    """What a file system that ignores case and normalises Unicode would take the path for."""
    path = "/".join(parts)
    return path.lower() if path.isascii() else unicodedata.normalize("NFC", path).casefold()


@contextmanager
def _damage_is_reported() -> Iterator[None]:
    """What the libraries raise on damaged archives becomes `bad_archive`."""
    try:
        yield
    except DAMAGE as error:
        detail = "It is cut short" if isinstance(error, EOFError) else "It is damaged, or none"
        raise _bad(detail) from error


def _unsafe(parts: Parts, reason: str) -> TrainingError:
    shown = printable("/".join(parts))[:200].replace("\0", "?")
    return TrainingError(
        "unsafe_archive",
        f"The archive's member {shown} {reason}",
        "Pack the class folders anew, as plain files and folders without links",
    )


def _bad(detail: str) -> TrainingError:
    return TrainingError(
        "bad_archive",
        f"The archive cannot be read. {detail}",
        f"Use {KINDS}, unencrypted, and check that the copy is complete",
    )


def _too_large(what: str) -> TrainingError:
    return TrainingError(
        "archive_too_large",
        f"The archive holds {what}",
        "Use a part of it, give the unpacked folder instead, or raise SKIPLINE_MAX_DATASET_IMAGES "
        "or SKIPLINE_MAX_DATASET_BYTES",
    )
