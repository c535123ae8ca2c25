"""Every error as a problem document (RFC 9457), and nothing in it that is the server's own.

What a client caused says what is wrong; anything unforeseen is logged under the request's id and
says no more than that.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.errors import AppError
from skipline.catalog import SpecRefused
from skipline.schemas import ErrorItem, ProblemDocument
from skipline.specs import error_items

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2
ANSWER_HEADERS = "answer_headers"
"""In a request's state: headers of its answer, be that a problem or not."""
MAX_ERRORS = 50
MAX_TEXT = 400
"""Errors of one document, and characters of each text: an answer is no mirror of its request."""


def problem(
    status: int,
    code: str,
    title: str,
    detail: str,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer that a problem is."""
    extra = dict(headers or {})
    if status == HTTPStatus.UNAUTHORIZED:
        extra["WWW-Authenticate"] = "Bearer"
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        extra["Retry-After"] = str(RETRY_AFTER_SECONDS)
    document = ProblemDocument(
        title=title,
        status=status,
        detail=_tame(detail),
        code=code,
        errors=[
            ErrorItem(loc=_tame(item["loc"]), message=_tame(item["message"]))
            for item in errors[:MAX_ERRORS]
        ],
    )
    return Response(document.model_dump_json(), status, extra, MEDIA_TYPE)


def _tame(text: str) -> str:
    """Short, and valid Unicode, which a JSON document's keys need not be."""
    return text[:MAX_TEXT].encode(errors="replace").decode()


def _on_app_error(request: Request, error: AppError) -> Response:
    return problem(error.status, error.code, error.title, error.detail, error.errors)


def _on_spec_refused(request: Request, error: SpecRefused) -> Response:
    return problem(422, error.code, "The request holds invalid values", str(error), error.items)


def _on_invalid_request(request: Request, error: RequestValidationError) -> Response:
    items = error_items(error.errors())
    detail = "; ".join(f"{item['loc']}: {item['message']}" for item in items[:MAX_ERRORS])
    return problem(422, "invalid_input", "The request holds invalid values", detail, items)


_DETAILS = {
    404: "There is nothing at this address",
    405: "This address does not know the method",
}


def _on_http_error(request: Request, error: HTTPException) -> Response:
    phrase = HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_")
    detail = _DETAILS.get(error.status_code, phrase)
    return problem(error.status_code, code, phrase, detail, headers=error.headers)


def _on_database_away(request: Request, error: SQLAlchemyError) -> Response:
    log.warning("database away", error=str(getattr(error, "orig", error)))
    return problem(
        503, "database_unavailable", "The service is not ready", "The database does not answer"
    )


def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Nobody is there to read it, unless they were taken to have gone."""
    detail = "For too long nothing came: send the request again, or go on with the upload"
    headers = {"Connection": "close"}  # The rest would be taken for another request.
    title = "The request has not come to its end"
    return problem(408, "request_timeout", title, detail, headers=headers)


class Envelope:
    """The outermost layer: gives each request an id, and turns what nobody foresaw into a
    problem document without a word of the exception.

    Starlette's own layer for this would raise the exception again, and have it logged twice.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers.update(scope.get("state", {}).get(ANSWER_HEADERS, {}))
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                log.exception("request failed", path=scope["path"], error=type(error).__name__)
                if started:
                    raise  # The server cuts the connection: half an answer must not look whole.
                detail = f"The server's log says more, under the request id {request_id}"
                response = problem(500, "internal_error", "Something went wrong", detail)
                await response(scope, receive, send_with_id)


def install(app: FastAPI) -> None:
    """Answers every error of `app` with a problem document."""
    handlers: dict[type[Exception], Any] = {
        AppError: _on_app_error,
        SpecRefused: _on_spec_refused,
        RequestValidationError: _on_invalid_request,
        HTTPException: _on_http_error,
        ClientDisconnect: _on_disconnect,
        OperationalError: _on_database_away,
        InterfaceError: _on_database_away,
        PoolTimeout: _on_database_away,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(Envelope)
