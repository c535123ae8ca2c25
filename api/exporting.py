"""Writes models to single files in a process of its own, one at a time: converting a network takes
seconds of every core and all of the memory that it takes, which predictions do not wait for."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import structlog

from shared.errors import ExportNotPossible, TooBusy
from skipline.catalog import EXPORT_SUFFIXES
from skipline.schemas import ExportFormat

log = structlog.get_logger(__name__)

MAX_LOGGED = 4000
"""Characters of what a process that failed has printed at last."""


class Exporter:
    """Used by the event loop's thread alone."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def export(self, folder: Path, origin: str, format: ExportFormat) -> BinaryIO:
        """The model in a file, which is gone once it is closed.

        Args:
            folder: of the bundle.
            origin: a `skipline.schemas.ModelOrigin` as JSON.

        Raises:
            TooBusy: another model is being written.
            ExportNotPossible: a package is missing, or the network cannot be converted.
        """
        if format == "onnx" and importlib.util.find_spec("onnxscript") is None:
            raise ExportNotPossible(
                "The server lacks what writes ONNX. Install it there: "
                "pip install 'skipline[server,onnx]'; the other formats need nothing more"
            )
        if self._lock.locked():
            raise TooBusy("Another model is being written; try again in a moment")
        async with self._lock:
            with tempfile.TemporaryDirectory(prefix="skipline-export-") as scratch:
                path = Path(scratch) / f"model{EXPORT_SUFFIXES[format]}"
                await self._write(folder, origin, format, path)
                return path.open("rb")

    async def _write(self, folder: Path, origin: str, format: ExportFormat, path: Path) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shared.vision.portable", folder, format, path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, errors = await process.communicate(origin.encode())
        except ConnectionError:  # It ended before it had read what it was to do.
            errors = b""
            await process.wait()
        except BaseException:  # Nobody waits for it any more.
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if process.returncode != 0 or not path.exists():
            printed = errors.decode(errors="replace")[-MAX_LOGGED:]
            log.error("a model could not be exported", status=process.returncode, printed=printed)
            raise ExportNotPossible(
                f"The model could not be written as {format}; the server's log says why. Try "
                "another format"
            )
