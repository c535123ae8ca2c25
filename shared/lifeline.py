"""A child that ends with its parent, however the parent ended.

The parent holds the writing end of a pipe and never writes to it by accident; when it is gone the
kernel closes the pipe and the child reads the end of the file. Unlike a parent-death signal this
works on every Unix and does not depend on which thread started the child.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any

ENVIRONMENT = "SKIPLINE_LIFELINE"
"""Set for a child whose standard input is a lifeline."""


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a child, in a session of its own, whose standard input is a lifeline."""
    environment = {**(options.pop("env", None) or os.environ), ENVIRONMENT: "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True, env=environment, **options
    )


def watch(descriptor: int, on_line: Callable[[str], None], on_end: Callable[[], None]) -> None:
    """Calls `on_line` with each line the parent sends and `on_end` when it is gone, from a
    thread of its own. Reads past Python's buffers, whose locks a daemon thread must not hold when
    the interpreter shuts down."""

    def read() -> None:
        pending = b""
        while chunk := os.read(descriptor, 4096):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                on_line(line.decode().strip())
        on_end()

    threading.Thread(target=read, name="lifeline", daemon=True).start()
