"""Work that is done for a client as long as it is there to have it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from shared.errors import AppError

T = TypeVar("T")


async def while_waited_for(
    request: Request, work: Coroutine[Any, Any, T], max_seconds: float, late: AppError
) -> T:
    """What `work` comes to. It is cancelled when nobody waits for it any more. The request's body
    must have been read.

    Raises:
        ClientDisconnect: the client has left.
        AppError: `late`, after `max_seconds`.
    """
    task = asyncio.create_task(work)
    departure = asyncio.create_task(_departure(request))
    try:
        done, _ = await asyncio.wait(
            {task, departure}, timeout=max_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        if departure in done:
            raise ClientDisconnect
        raise late
    finally:
        task.cancel()
        departure.cancel()


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
