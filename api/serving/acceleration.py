"""Models made ready for onnxruntime, which answers the same and sooner than torch: a file each,
made while torch answers already.

A model that is asked for again and again is converted by a process of its own, which gives way to
predictions; the file is kept for the next start, and for other processes on this machine. Files are
named after the content of their bundle, so that none is ever out of date.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import structlog

from shared.bundle_files import BUNDLE_FILE
from skipline.schemas import ModelOrigin, PredictingModel

log = structlog.get_logger(__name__)

FORMAT = "1"
"""Part of the files' names: another one where the graph is made in another way."""
MAX_SECONDS = 600.0
_NOBODY = PredictingModel(checkpoint_id="", job_id="", arch="", epoch=0, step=0)
"""Without a temperature: answers are calibrated by whoever asked."""


def is_possible() -> bool:
    """Whether the packages of the extra `onnx` are here."""
    names = ("onnxruntime", "onnxscript")
    return all(importlib.util.find_spec(name) is not None for name in names)


class Accelerator:
    """Used by the inference thread; converts in another.

    Args:
        folder: of the files.
        max_bytes: of all files; those used longest ago go.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._asked: set[str] = set()
        self._queue: queue.SimpleQueue[tuple[str, Path] | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="converter", daemon=True)
        self._thread.start()

    def name(self, bundle_folder: Path) -> str:
        """Of the file for this bundle, whose document has the hash of its weights."""
        digest = hashlib.sha256((bundle_folder / BUNDLE_FILE).read_bytes()).hexdigest()
        return f"{digest}.{FORMAT}.onnx"

    def find(self, name: str) -> Path | None:
        """The file, if it is there: it was used just now."""
        path = self._folder / name
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def ask(self, name: str, bundle_folder: Path) -> None:
        """Sees to it that the file will be there; once for each."""
        if name not in self._asked:
            self._asked.add(name)
            self._queue.put((name, bundle_folder))

    def stop(self) -> None:
        """Ends the conversion that is under way."""
        self._stopped = True
        self._queue.put(None)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None and not self._stopped:
            name, bundle_folder = item
            try:
                self._convert(name, bundle_folder)
                self._make_room(name)
            except (OSError, subprocess.SubprocessError) as error:
                if not self._stopped:  # Torch goes on answering for it.
                    log.warning("a model was not converted", reason=str(error)[-1000:])

    def _convert(self, name: str, bundle_folder: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{name}.{os.getpid()}.part"
        program = [sys.executable, "-m", "shared.vision.portable"]
        command = [*program, str(bundle_folder), "onnx", str(part)]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=nothing, stderr=pipe)
            with self._process as process:
                origin = ModelOrigin(model=_NOBODY).model_dump_json().encode()
                try:
                    _, printed = process.communicate(origin, timeout=MAX_SECONDS)
                finally:
                    process.kill()
            if process.returncode != 0:
                raise subprocess.SubprocessError(printed.decode(errors="replace"))
            os.replace(part, self._folder / name)
            log.info("model converted", name=name)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, newest: str) -> None:
        files = []
        for path in self._folder.glob("*.onnx"):
            with contextlib.suppress(FileNotFoundError):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        kept = 0
        for _, num_bytes, path in sorted(files, reverse=True):
            kept += num_bytes
            if kept > self._max_bytes and path.name != newest:
                path.unlink(missing_ok=True)
