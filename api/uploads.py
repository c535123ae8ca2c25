"""Uploads in parts: tus 1.0 (https://tus.io/protocols/resumable-upload), with its extensions
creation, expiration and termination.

A client announces a file, sends parts of it, asks after an interruption how much has come, and goes
on from there. `POST /datasets` makes a dataset of a complete one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator
from datetime import datetime
from email.utils import format_datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api import examples, openapi
from api.dependencies import PageDep, Services, ServicesDep, SubmitterDep
from api.problems import ANSWER_HEADERS
from api.references import is_id
from shared import uploads
from shared.errors import (
    BodyTooLarge,
    InvalidInput,
    OffsetMismatch,
    UnsupportedMediaType,
    UnsupportedTusVersion,
    UploadNotFound,
)
from skipline import schemas

VERSION = "1.0.0"
EXTENSIONS = "creation,expiration,termination"
PART_TYPE = "application/offset+octet-stream"
MAX_NUMBER = 2**63 - 1
WRITE_BYTES = 2**20
"""What is gathered before it is written: a trip to a thread for each packet would cost more."""
MAX_FILE_NAME = 200
DEFAULT_NAME = "dataset"


async def _speak_tus(request: Request) -> None:
    """Every answer names the version; a request for another one is refused. Requests without any
    are understood, so that curl needs no header more."""
    setattr(request.state, ANSWER_HEADERS, {"Tus-Resumable": VERSION})
    if request.headers.get("tus-resumable", VERSION) != VERSION:
        raise UnsupportedTusVersion(f"Send Tus-Resumable: {VERSION}")


router = APIRouter(tags=["uploads"], dependencies=[Depends(_speak_tus)])


async def _upload_id(upload_id: str) -> str:
    if not is_id(upload_id) or not upload_id.replace("-", "").isalnum():
        raise UploadNotFound("There is no upload of this id")
    return upload_id


UploadId = Annotated[str, Depends(_upload_id)]
"""The `upload_id` of the path; it can be no path of its own."""


@router.options(
    "/uploads", status_code=204, summary="Ask what is spoken", responses=openapi.no_content(())
)
async def get_options(services: ServicesDep, response: Response) -> None:
    """The version of tus, its extensions, and how large a file may be."""
    response.headers["Tus-Version"] = VERSION
    response.headers["Tus-Extension"] = EXTENSIONS
    response.headers["Tus-Max-Size"] = str(services.settings.max_upload_bytes)


@router.post(
    "/uploads",
    status_code=201,
    summary="Announce a file",
    responses=openapi.responses(
        examples.UPLOAD, 201, problems=(412, 413, 422, 429, 507), location=True
    ),
    openapi_extra=openapi.headers(
        required={"Upload-Length": "Bytes of the whole file"},
        optional={"Upload-Metadata": "`filename` and its value in Base64"},
    ),
)
def create_upload(
    request: Request, services: ServicesDep, submitter: SubmitterDep, response: Response
) -> schemas.Upload:
    """Its bytes are sent to the `Location` of the answer."""
    num_bytes = _number(request, "Upload-Length")
    file_name = _file_name(request.headers.get("upload-metadata", ""))
    with services.database.session_scope() as session:
        upload = uploads.create(
            session,
            services.settings,
            services.storage.root,
            submitter=submitter,
            file_name=file_name,
            num_bytes=num_bytes,
        )
        document = uploads.document(upload, services.settings, services.storage.root)
    response.headers["Location"] = f"/uploads/{document.id}"
    response.headers["Upload-Expires"] = _http_time(document.expires_at)
    return document


@router.get(
    "/uploads",
    summary="List the uploads",
    responses=openapi.responses(examples.UPLOADS, problems=(412, 422)),
)
def list_uploads(
    page: PageDep, services: ServicesDep, submitter: SubmitterDep
) -> schemas.Page[schemas.Upload]:
    """Those that were begun with the same key, newest first."""
    with services.database.read_scope() as session:
        rows, next_ = uploads.list_uploads(session, submitter, limit=page.limit, after=page.after)
        items = []
        for row in rows:
            try:
                items.append(uploads.document(row, services.settings, services.storage.root))
            except UploadNotFound:
                continue  # Its file has just been removed.
    return schemas.Page[schemas.Upload](items=items, next=next_)


@router.get(
    "/uploads/{upload_id}",
    summary="Show an upload",
    responses=openapi.responses(examples.UPLOAD, problems=(404, 412)),
)
def get_upload(
    upload_id: UploadId, services: ServicesDep, submitter: SubmitterDep
) -> schemas.Upload:
    """How much of it has come."""
    return _document(services, upload_id, submitter)


def _document(services: Services, upload_id: str, submitter: str) -> schemas.Upload:
    with services.database.read_scope() as session:
        upload = uploads.get(session, upload_id, submitter)
        return uploads.document(upload, services.settings, services.storage.root)


@router.head(
    "/uploads/{upload_id}",
    summary="Ask how much of a file has come",
    response_class=Response,
    responses={200: {"description": "OK"}, **openapi.refusals((404, 412))},
)
def head_upload(
    upload_id: UploadId, services: ServicesDep, submitter: SubmitterDep, response: Response
) -> None:
    """`Upload-Offset` says where to go on."""
    document = _document(services, upload_id, submitter)
    response.headers["Upload-Offset"] = str(document.offset)
    response.headers["Upload-Length"] = str(document.num_bytes)
    response.headers["Upload-Expires"] = _http_time(document.expires_at)
    response.headers["Cache-Control"] = "no-store"


@router.patch(
    "/uploads/{upload_id}",
    status_code=204,
    summary="Send a part of a file",
    responses=openapi.no_content((404, 409, 412, 413, 415, 422, 423, 507)),
    openapi_extra={
        **openapi.headers(required={"Upload-Offset": "Where the part begins"}),
        "requestBody": {
            "required": True,
            "content": {
                PART_TYPE: {
                    "schema": {"type": "string", "format": "binary"},
                    "example": "(bytes of the file)",
                }
            },
        },
    },
)
async def patch_upload(
    upload_id: UploadId,
    request: Request,
    services: ServicesDep,
    submitter: SubmitterDep,
    response: Response,
) -> None:
    """Appends the body. Of a part that is broken off, what has come stays."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != PART_TYPE:
        raise UnsupportedMediaType(f"Send Content-Type: {PART_TYPE}")
    offset = _number(request, "Upload-Offset")
    document = await run_in_threadpool(_document, services, upload_id, submitter)
    root = services.storage.root
    writer = await run_in_threadpool(uploads.Writer, root, upload_id, document.num_bytes)
    try:
        if writer.offset != offset:
            raise OffsetMismatch(f"{writer.offset} bytes have come: go on there")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and offset + int(declared) > document.num_bytes:
            raise BodyTooLarge(f"The upload was announced to have {document.num_bytes:,} bytes")
        async for data in gathered(request):
            await run_in_threadpool(writer.write, data)
    finally:
        # Also when the client went away: HEAD tells it how much there is.
        await run_in_threadpool(writer.close)
        touched_at = await run_in_threadpool(_touch, services, upload_id)
    response.headers["Upload-Offset"] = str(writer.offset)
    response.headers["Upload-Expires"] = _http_time(
        uploads.expires_at(touched_at, services.settings)
    )


def _touch(services: Services, upload_id: str) -> datetime:
    with services.database.session_scope() as session:
        return uploads.touch(session, upload_id)


async def gathered(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces of about a mebibyte. Where the client goes away, what came before is
    yielded yet, and then `ClientDisconnect` raised."""
    pieces: list[bytes] = []
    num_bytes = 0
    try:
        async for piece in request.stream():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes >= WRITE_BYTES:
                yield b"".join(pieces)
                pieces, num_bytes = [], 0
    except ClientDisconnect:
        if pieces:
            yield b"".join(pieces)
        raise
    if pieces:
        yield b"".join(pieces)


@router.delete(
    "/uploads/{upload_id}",
    status_code=204,
    summary="Delete an upload",
    responses=openapi.no_content((404, 409, 412)),
)
def delete_upload(upload_id: UploadId, services: ServicesDep, submitter: SubmitterDep) -> None:
    """409 `in_use` while a job will read it, or does."""
    with services.database.session_scope() as session:
        uploads.delete(session, upload_id, submitter)
    uploads.remove_files(services.storage.root, upload_id)


def _number(request: Request, header: str) -> int:
    value = request.headers.get(header, "")
    if not (value.isascii() and value.isdecimal()) or len(value) > 19 or int(value) > MAX_NUMBER:
        message = f"The header {header} has to be a number of bytes"
        raise InvalidInput(message, errors=[{"loc": header, "message": message}])
    return int(value)


def _file_name(metadata: str) -> str:
    """From tus's `Upload-Metadata`: pairs of a key and a value in Base64, separated by commas."""
    for pair in metadata.split(","):
        key, _, value = pair.strip().partition(" ")
        if key == "filename":
            try:
                return harmless_name(base64.b64decode(value, validate=True).decode())
            except (binascii.Error, ValueError):
                break
    return DEFAULT_NAME


def harmless_name(name: str | None) -> str:
    """A file's name as a client gave it, as a label: without folders and control characters."""
    last = (name or "").replace("\\", "/").rpartition("/")[2]
    printable = "".join(character for character in last if character.isprintable())
    return printable.encode("utf-8", "replace").decode()[:MAX_FILE_NAME].strip() or DEFAULT_NAME


def _http_time(moment: datetime) -> str:
    return format_datetime(moment, usegmt=True)
