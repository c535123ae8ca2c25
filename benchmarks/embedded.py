"""A `skipline up` of its own in a temporary folder, for benchmarks of the service."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipline import Skipline, SkiplineError

START_SECONDS = 120


@contextmanager
def embedded_service(**variables: str) -> Iterator[Skipline]:
    """A client of a fresh service that is ready; it is stopped when the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="skipline-bench-") as folder:
        log = Path(folder) / "up.log"
        environment = {**os.environ, "SKIPLINE_HOME": f"{folder}/home", **variables}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "skipline", "up", "--port", str(port)],
                env=environment,
                cwd=folder,
                stdout=output,
                stderr=output,
            )
        try:
            with Skipline(f"http://127.0.0.1:{port}") as client:
                _wait_until_ready(client, process, log)
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait_until_ready(client: Skipline, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if client.ready().status == "ready":
                return
        except SkiplineError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"the service did not start:\n{log.read_text()[-2000:]}")
