"""`POST /datasets`: from a folder, an upload or a built-in's name to a queued job."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, BackgroundTasks, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.orm import Session

from api import examples, openapi
from api.bodies import content_type, limited, load_json
from api.dependencies import Services, ServicesDep
from api.forms import LargeFileForm
from api.submission import Posting, PostingDep, check_name, store, submit
from api.uploads import gathered, harmless_name
from shared import uploads
from shared.errors import InvalidInput, UnsupportedMediaType
from shared.tables import Job, Upload
from skipline import schemas
from skipline.catalog import BUILTIN_DATASETS, SpecRefused
from skipline.specs import IngestSpec, error_items

router = APIRouter(tags=["datasets"])

FORM, JSON = "multipart/form-data", "application/json"
FORM_FIELDS = ("name", "val_fraction", "seed")
ENVELOPE_BYTES = 2**20
"""Of a form, besides its file."""
_adapter = TypeAdapter(IngestSpec)


def parse_ingest(document: Any) -> IngestSpec:
    """Checks what a client sent. Raises `SpecRefused`."""
    try:
        spec = _adapter.validate_python(document)
    except ValidationError as error:
        raise SpecRefused(error_items(error)) from None
    if spec.source == "builtin" and spec.name not in BUILTIN_DATASETS:
        message = f"There is no such built-in; choose one of: {', '.join(BUILTIN_DATASETS)}"
        raise SpecRefused([{"loc": "name", "message": message}], code="unknown_dataset")
    check_name(spec)
    return spec


# Asynchronous, since a form's file is written while it comes; all that waits is done in threads.
@router.post(
    "/datasets",
    status_code=202,
    summary="Bring a dataset in",
    response_model=schemas.Job,
    responses=openapi.responses(
        examples.INGEST_JOB,
        202,
        problems=(400, 404, 409, 413, 415, 422, 423, 429, 507),
        location=True,
    ),
    openapi_extra=openapi.ingest_body(_adapter, examples.INGEST_REQUESTS, examples.INGEST_FORM),
)
async def add_dataset(
    request: Request,
    posting: PostingDep,
    services: ServicesDep,
    background: BackgroundTasks,
    response: Response,
) -> schemas.Job:
    """Stores a job of kind `ingest`. Takes a form with the file `archive` (zip, or tar plain or
    compressed, of class folders) and perhaps `name`, `val_fraction` and `seed`; or JSON that names
    a folder or an archive on the server's disk, a complete upload, or a built-in dataset. The
    job's `result.dataset_id` names the dataset."""
    kind = content_type(request)
    if kind == FORM:
        return await _add_form(request, posting, services, background, response)
    if kind != JSON:
        raise UnsupportedMediaType(f"Send Content-Type: {FORM}, or {JSON}")
    body = await limited(request, services.settings.max_json_bytes).body()
    document = load_json(body)
    spec = parse_ingest(document)

    def store_ingest(session: Session) -> Job:
        return store(session, spec, posting.submitter, services.settings)

    posting = replace(posting, document=document)
    return await run_in_threadpool(submit, posting, store_ingest, services, background, response)


async def _add_form(
    request: Request,
    posting: Posting,
    services: Services,
    background: BackgroundTasks,
    response: Response,
) -> schemas.Job:
    root, settings = services.storage.root, services.settings
    body = limited(request, settings.max_upload_bytes + ENVELOPE_BYTES)
    declared = request.headers.get("content-length", "")
    num_bytes = int(declared) if declared.isdecimal() else 0
    async with _received(services, posting.submitter, num_bytes) as upload_id:
        digest = hashlib.sha256()
        writer = await run_in_threadpool(uploads.Writer, root, upload_id, settings.max_upload_bytes)

        def write(data: bytes) -> None:
            writer.write(data)
            digest.update(data)

        form = LargeFileForm("archive", write)
        try:
            await form.read(request, gathered(body))
        finally:
            await run_in_threadpool(writer.close)
        spec = _form_spec(form, upload_id)
        posting = replace(
            posting, document={**form.fields, "sha256": digest.hexdigest(), "form": form.file_name}
        )

        def store_ingest(session: Session) -> Job:
            upload = session.get_one(Upload, upload_id)
            upload.num_bytes = writer.offset
            upload.file_name = harmless_name(form.file_name)
            session.flush()
            return store(session, spec, posting.submitter, settings)

        return await run_in_threadpool(
            submit, posting, store_ingest, services, background, response
        )


def _form_spec(form: LargeFileForm, upload_id: str) -> IngestSpec:
    """Raises `SpecRefused`, `InvalidInput`."""
    if form.file_name is None:
        message = "Send the archive as a file"
        raise InvalidInput(message, errors=[{"loc": "archive", "message": message}])
    if unknown := sorted(form.fields.keys() - set(FORM_FIELDS)):
        message = f"Unknown; the form may have archive, {', '.join(FORM_FIELDS)}"
        raise SpecRefused([{"loc": key, "message": message} for key in unknown])
    given = {key: value for key, value in form.fields.items() if value}
    return parse_ingest({"source": "upload", "upload_id": upload_id, **given})


@asynccontextmanager
async def _received(services: Services, submitter: str, num_bytes: int) -> AsyncIterator[str]:
    """The id of an empty upload, which is deleted at the end unless a job was made of it: also
    when the client goes away, and when the job was there already. `num_bytes`: of the body, if it
    says so."""

    def create() -> str:
        uploads.check_free_disk(services.settings, services.storage.root, num_bytes)
        with services.database.session_scope() as session:
            return uploads.create(
                session,
                services.settings,
                services.storage.root,
                submitter=submitter,
                file_name="",
                num_bytes=None,
            ).id

    def drop_unused() -> None:
        with services.database.session_scope() as session:
            upload = session.get(Upload, upload_id)
            if upload is not None and upload.job_id is not None:
                return
            uploads.forget(session, upload_id)
        uploads.remove_files(services.storage.root, upload_id)

    upload_id = await run_in_threadpool(create)
    try:
        yield upload_id
    finally:
        await run_in_threadpool(drop_unused)
