"""Whether what the service depends on answers. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import structlog

log = structlog.get_logger(__name__)

CHECK_SECONDS = 3.0

Check = Callable[[], None]
"""Raises what is wrong."""


class NotYet(Exception):
    """What is being checked will do, but does not do yet; its text is told to clients."""


class Checks:
    """The checks of what the service depends on. Each has one thread of its own: one that hangs
    takes no other along, and however often it is asked for, it hangs once."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = {
            name: (check, ThreadPoolExecutor(1, f"check-{name}")) for name, check in checks.items()
        }

    async def run(self) -> dict[str, str]:
        """What each check found: `ok`, or what is wrong."""
        found = await asyncio.gather(*(self._run(name) for name in self._checks))
        return dict(zip(self._checks, found, strict=True))

    async def _run(self, name: str) -> str:
        check, thread = self._checks[name]
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await asyncio.get_running_loop().run_in_executor(thread, check)
        except TimeoutError:
            return f"no answer within {CHECK_SECONDS:g} s"
        except NotYet as error:
            return str(error)
        except Exception as error:  # Its text may hold addresses and paths: those are the log's.
            log.warning("not ready", check=name, error=str(error))
            return f"fails ({type(error).__name__})"
        return "ok"

    def close(self) -> None:
        """Waits for no check that hangs."""
        for _, thread in self._checks.values():
            thread.shutdown(wait=False, cancel_futures=True)
