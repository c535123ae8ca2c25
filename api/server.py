"""Runs the application under uvicorn so that it leaves quickly when asked to."""

from __future__ import annotations

import gc
import socket
import sys
import threading

import uvicorn
from fastapi import FastAPI

from api.app import Role, create_app
from shared.settings import Settings

SWITCH_SECONDS = 0.0005
"""For which a thread of Python's may go on while others want to. By default it is ten times as
long, and a probe waits for that once for each thread that decodes an image."""
SHUTDOWN_SECONDS = 5
"""From SIGTERM until connections that are still busy are cut."""


class Server(uvicorn.Server):
    """Ends the live streams first: uvicorn waits for open connections, and they never end."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            torch_is_there = self._app.state.services.inference.started
            threading.Thread(target=_spare, args=(torch_is_there,), daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.services.streams.stop()
        await super().shutdown(sockets)


def _spare(torch_is_there: threading.Event) -> None:
    """Has the collector of garbage pass over what stays. Of torch alone that is a million objects:
    a full collection took 200 ms, came every few seconds under load, and nobody was answered
    meanwhile."""
    torch_is_there.wait()
    gc.collect()
    gc.freeze()


def serve(settings: Settings, host: str, port: int, role: Role = "all") -> None:
    """Serves until SIGINT or SIGTERM. The address was checked to be free."""
    sys.setswitchinterval(SWITCH_SECONDS)
    Server(create_app(settings, role), host, port).run()
