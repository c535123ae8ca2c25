"""A thread that draws pictures, one at a time. Knows nothing of what is drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shared.errors import TooBusy

T = TypeVar("T")

MAX_WAITING = 32
"""Pictures that wait to be drawn before the next one is told to come back later."""


class Drawing:
    """Draws in a thread of its own: it takes none of those that answer everything else, however
    many pictures are asked for at once."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "drawing")
        self._num_waiting = 0

    async def run(self, draw: Callable[[], T]) -> T:
        """What `draw` returns or raises.

        Raises:
            TooBusy: too many wait already.
        """
        if self._num_waiting >= MAX_WAITING:
            raise TooBusy(f"{MAX_WAITING} pictures wait already; try again in a moment")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, draw)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """Draws nothing more; waits for no picture."""
        self._thread.shutdown(wait=False, cancel_futures=True)
