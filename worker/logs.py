"""Brings what a trainer prints from its file into the database, where each API process reads it.
Best effort: what cannot be stored now is stored the next time, once."""

from __future__ import annotations

import codecs
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import structlog
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from shared import repository
from shared.database import Database
from shared.lifecycle import Fence

log = structlog.get_logger(__name__)

PART_BYTES = 65_536
_CONTINUATION = bytes(range(0x80, 0xC0))
"""What a character of UTF-8 does not begin with."""


@dataclass(frozen=True)
class _Part:
    """The next piece. `end`: where in the file it ends."""

    number: int
    text: str
    end: int

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


class LogShipper:
    """Ships the output of one attempt, and keeps its last `max_bytes` at most."""

    def __init__(self, database: Database, fence: Fence, path: Path, max_bytes: int) -> None:
        self._database = database
        self._fence = fence
        self._path = path
        self._max_bytes = max_bytes
        self._end = 0
        self._kept: deque[tuple[int, int]] = deque()
        """Numbers and bytes of the pieces that are in the database."""
        self._num_kept_bytes = 0
        self._part: _Part | None = None
        """The piece that was read and is not known to be stored. It stays as it is until then: a
        commit may have landed whose answer was lost."""

    def ship(self) -> None:
        """Stores the next piece, if something was printed."""
        self._ship(is_final=False)

    def ship_rest(self) -> None:
        """Stores all there is, for a trainer that has ended."""
        while self._ship(is_final=True):
            pass

    def _ship(self, *, is_final: bool) -> bool:
        """False when there is nothing more for now, or it cannot be stored."""
        try:
            self._part = self._part or self._read(is_final)
            return self._part is not None and self._store(self._part)
        except (OSError, SQLAlchemyError) as error:
            log.warning(
                "output could not be stored",
                job_id=self._fence.job_id,
                error=type(error).__name__,
            )
            return False

    def _read(self, is_final: bool) -> _Part | None:
        """The next piece: whole characters, what is no UTF-8 replaced, and no NUL, which PostgreSQL
        cannot store."""
        with self._path.open("rb") as file:
            self._pass_over(file)
            file.seek(self._end)
            chunk = file.read(PART_BYTES)
        is_last = is_final and len(chunk) < PART_BYTES
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(chunk, is_last).replace("\0", "")
        num_cut = len(decoder.getstate()[0])
        end = self._end + len(chunk) - num_cut
        if end == self._end:
            return None
        return _Part(self._kept[-1][0] + 1 if self._kept else 0, text, end)

    def _pass_over(self, file: BinaryIO) -> None:
        """Leaves out what would have to go again at once, up to the beginning of a character."""
        start = os.fstat(file.fileno()).st_size - self._max_bytes
        if start > self._end:
            file.seek(start)
            head = file.read(3)
            self._end = start + len(head) - len(head.lstrip(_CONTINUATION))

    def _store(self, part: _Part) -> bool:
        num_bytes = part.num_bytes
        num_dropped, dropped_bytes = self._outdated(num_bytes)
        try:
            with self._database.session_scope() as session:
                if num_dropped:
                    up_to = self._kept[num_dropped - 1][0]
                    repository.drop_log_parts(session, self._fence, up_to)
                is_kept = repository.add_log_part(session, self._fence, part.number, part.text)
        except IntegrityError:  # It is there: the commit that was not answered had landed.
            is_kept = True
        for _ in range(num_dropped):
            self._kept.popleft()
        self._kept.append((part.number, num_bytes))
        self._num_kept_bytes += num_bytes - dropped_bytes
        self._end, self._part = part.end, None
        return is_kept

    def _outdated(self, num_new_bytes: int) -> tuple[int, int]:
        """How many of the oldest pieces must go to make room, and their bytes."""
        num_dropped = dropped_bytes = 0
        for _, num_bytes in self._kept:
            if self._num_kept_bytes - dropped_bytes + num_new_bytes <= self._max_bytes:
                break
            num_dropped, dropped_bytes = num_dropped + 1, dropped_bytes + num_bytes
        return num_dropped, dropped_bytes
