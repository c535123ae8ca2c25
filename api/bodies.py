"""Request bodies, read within limits.

FastAPI reads a declared body before it solves dependencies. Here bodies are dependencies
themselves, solved after the check of access: nobody without a key has a body read, and a body
that is too large, declared or chunked, is refused with a problem document like everything else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.message import Message
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from pydantic import ValidationError
from starlette import types
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from shared.errors import BodyTooLarge, MalformedBody, MalformedJson, UnsupportedMediaType
from shared.settings import Settings
from skipline.catalog import SpecRefused
from skipline.specs import error_items

T = TypeVar("T")

MAX_FORM_FIELDS = 16
SILENCE_SECONDS = 60.0
"""In which nothing comes of a body that is not complete."""


class SilenceLimit:
    """Takes a client for gone when it is silent for too long within a body. A machine that lost its
    network says no farewell: what it holds, as the one place to write to its upload, it would hold
    for ever."""

    def __init__(self, app: types.ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        is_complete = scope["type"] != "http"

        async def receive_in_time() -> types.Message:
            nonlocal is_complete
            if is_complete:  # From here on it may be silent for as long as it likes.
                return await receive()
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    message = await receive()
            except TimeoutError:
                return {"type": "http.disconnect"}
            is_complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)


def install(app: FastAPI) -> None:
    """Limits how long the clients of `app` may be silent."""
    app.add_middleware(SilenceLimit)


def limited(request: Request, max_bytes: int) -> Request:
    """The request, with a body whose reading raises `BodyTooLarge` beyond `max_bytes`."""
    too_large = BodyTooLarge(f"At most {max_bytes:,} bytes are taken here")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    num_received = 0

    async def receive() -> types.Message:
        nonlocal num_received
        message = await request.receive()
        num_received += len(message.get("body", b""))
        if num_received > max_bytes:
            raise too_large
        return message

    return Request(request.scope, receive)


def content_type(request: Request) -> str:
    """Of the body, without parameters; empty when there is none."""
    message = Message()
    message["content-type"] = request.headers.get("content-type", "")
    return message.get_content_type() if message["content-type"] else ""


def load_json(body: bytes) -> Any:
    """Raises `MalformedJson`, also for a document that nests too deeply to be read."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError
        raise MalformedJson("The body is not a JSON document that can be read") from None


async def _json_document(request: Request) -> Any:
    settings: Settings = request.app.state.settings
    if content_type(request) != "application/json":
        raise UnsupportedMediaType("Send JSON, with Content-Type: application/json")
    return load_json(await limited(request, settings.max_json_bytes).body())


JsonDocument = Annotated[Any, Depends(_json_document)]
"""The JSON body as it was sent: read once, however many dependencies of a request ask for it."""


def json_body(parse: Callable[[Any], T]) -> Callable[[Any], Awaitable[T]]:
    """A dependency: the JSON body as `parse` understands it. `parse` raises pydantic's
    `ValidationError`, which the client sees as a problem that names the keys."""

    async def read(document: JsonDocument) -> T:
        try:
            return parse(document)
        except ValidationError as error:
            raise SpecRefused(error_items(error)) from None

    return read


@asynccontextmanager
async def form_body(request: Request, max_files: int) -> AsyncIterator[FormData]:
    """The parts of a multipart body; their files are gone when the block ends."""
    settings: Settings = request.app.state.settings
    if content_type(request) != "multipart/form-data":
        raise UnsupportedMediaType("Send a form, with Content-Type: multipart/form-data")
    try:
        form = await limited(request, settings.max_body_bytes).form(
            max_files=max_files, max_fields=MAX_FORM_FIELDS, max_part_size=settings.max_json_bytes
        )
    except HTTPException as error:  # the parser's; its texts speak of the form alone
        raise MalformedBody(error.detail) from None
    try:
        yield form
    finally:
        await form.close()
