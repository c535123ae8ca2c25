"""`GET /models/{model}/export`: a model in a single file, to be used elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from api import openapi
from api.dependencies import Services, ServicesDep
from api.references import check_model_reference
from api.waiting import while_waited_for
from shared import repository
from shared.answers import predicting_model
from shared.bundle_files import MODEL_FILES
from shared.errors import ExportTimeout
from skipline.catalog import EXPORT_SUFFIXES
from skipline.schemas import ExportFormat, ModelOrigin

router = APIRouter(tags=["models"])

MODEL_FILE = "application/octet-stream"
MAX_SECONDS = 300.0
CHUNK_BYTES = 2**20


@router.get(
    "/models/{alias}/export",
    summary="Export a model",
    response_class=StreamingResponse,
    responses=openapi.binary(MODEL_FILE, problems=(404, 409, 422, 429, 504)),
)
async def export_model(
    alias: str,
    request: Request,
    services: ServicesDep,
    format: Annotated[
        ExportFormat, Query(description="safetensors can be taken in by another Skipline")
    ] = "safetensors",
) -> StreamingResponse:
    """In a file that says in its metadata, under `skipline`, what it holds: classes,
    preprocessing, calibration, the whole spec. `alias` may be the id of a job or a checkpoint too.

    `safetensors` has the weights and the report. The other formats have everything from squares of
    pixels, `images` uint8 [B, S, S, 3], to calibrated `probabilities` float32 [B, C]."""
    check_model_reference(alias)
    folder, origin, name = await run_in_threadpool(_stored, services, alias)
    late = ExportTimeout(f"The file was not there within {MAX_SECONDS:g} s; try another format")
    work = services.exporter.export(folder, origin, format)
    file = await while_waited_for(request, work, MAX_SECONDS, late)
    length = file.seek(0, 2)
    file.seek(0)
    headers = {
        "Content-Length": str(length),
        "Content-Disposition": f'attachment; filename="{name}{EXPORT_SUFFIXES[format]}"',
    }
    return StreamingResponse(_chunks(file), media_type=MODEL_FILE, headers=headers)


def _stored(services: Services, reference: str) -> tuple[Path, str, str]:
    """The bundle's folder, found to be as it was written, the origin as JSON, and a name.

    Raises:
        ModelNotFound, NoCheckpointYet, CheckpointCorrupt: there is nothing to be exported.
    """
    with services.database.read_scope() as session:
        checkpoint = repository.find_model(session, reference)
        model, _ = predicting_model(session, checkpoint)
        report = repository.own_report(session, checkpoint)
    folder = services.storage.verify(checkpoint.key, *MODEL_FILES)
    origin = ModelOrigin(model=model, report=report)
    return folder, origin.model_dump_json(), f"{model.arch}-{checkpoint.id}"


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while data := file.read(CHUNK_BYTES):
            yield data
