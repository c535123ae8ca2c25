"""Which kinds of archives datasets are read from, told by their first bytes and by their names."""

from __future__ import annotations

from pathlib import PurePath

HEAD_BYTES = 512
"""Of a file, enough to tell."""
_MAGIC = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
KINDS = "zip, tar, tar.gz, tar.bz2, tar.xz or tar.zst"
_SUFFIXES = frozenset(
    {".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst"}
)
_CHECKSUM = slice(148, 156)


def archive_kind(head: bytes) -> str | None:
    """`zip`, `tar`, or how a tar seems to be compressed; None for what is no archive. `head`: the
    file's first `HEAD_BYTES`, or all of it."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    return "tar" if _is_tar(head) else None


def _is_tar(head: bytes) -> bool:
    """Whether it begins with a tar header, whose bytes add up to the number that it names; or with
    the blocks of zeros that are an empty tar."""
    if len(head) < HEAD_BYTES:
        return False
    block = head[:HEAD_BYTES]
    try:
        named = int(block[_CHECKSUM].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    return not any(block) or named == sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")


def without_suffixes(name: str) -> str:
    """The file's name without what says that it is an archive."""
    path = PurePath(name)
    while path.suffix.lower() in _SUFFIXES:
        path = path.with_suffix("")
    return path.name
