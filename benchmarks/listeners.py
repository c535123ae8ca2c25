"""Many listeners to live metrics, in one thread: how old a value is when it arrives.

Each is a connection of its own that asks for `GET /jobs/{id}/metrics` as a stream and reads what
comes. A value that is the time at which it was handed to the database tells its own age.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence

OPEN_AT_ONCE = 50
_VALUE = re.compile(rb'"value":([0-9.]+)')


class Listeners:
    """`num_streams` streams, shared out evenly among `job_ids`.

    Attributes:
        ages_seconds: of each value that has arrived, when it did.
        num_heard: streams on which something has arrived.
    """

    def __init__(self, port: int, job_ids: Sequence[str], num_streams: int) -> None:
        self._port = port
        self._job_ids = [job_ids[number % len(job_ids)] for number in range(num_streams)]
        self._opening = asyncio.Semaphore(OPEN_AT_ONCE)
        self.ages_seconds: list[float] = []
        self.num_heard = 0

    async def listen(self) -> None:
        """Opens all and reads until it is cancelled, or the server ends one."""
        async with asyncio.TaskGroup() as group:
            for job_id in self._job_ids:
                group.create_task(self._listen_to(job_id))

    async def _listen_to(self, job_id: str) -> None:
        async with self._opening:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(
                f"GET /jobs/{job_id}/metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                "Accept: text/event-stream\r\n\r\n".encode()
            )
            status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"a stream was refused: {status.decode().strip()}")
        rest, is_silent = b"", True
        try:
            while chunk := await reader.read(65_536):
                now = time.time()
                text = rest + chunk
                # The last line may not be whole yet: it is looked at with the next chunk.
                lines, _, rest = text.rpartition(b"\n")
                found = _VALUE.findall(lines)
                self.ages_seconds += [now - float(value) for value in found]
                if found and is_silent:
                    is_silent = False
                    self.num_heard += 1
            raise RuntimeError("the server ended a stream")
        finally:
            writer.close()
