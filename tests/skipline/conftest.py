"""A real HTTP server on a free port, for the client and the commands."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from tests.skipline.replay import Server, handler_of


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server; `SKIPLINE_API_URL` names it."""
    found = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    found.url = f"http://127.0.0.1:{http.server_address[1]}"
    monkeypatch.setenv("SKIPLINE_API_URL", found.url)
    monkeypatch.delenv("SKIPLINE_API_KEY", raising=False)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    http.shutdown()
    thread.join()
    http.server_close()
