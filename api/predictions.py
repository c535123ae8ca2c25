"""`POST /predict`: images in, the model's best guesses out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from api import examples, openapi
from api.dependencies import Services, ServicesDep, is_id
from api.prediction_requests import PredictionRequest, read_request
from api.serving.cache import ModelKey
from api.serving.inference import Answer
from shared import repository
from shared.database import Database
from shared.errors import CheckpointCorrupt, ModelNotFound
from skipline import schemas
from skipline.specs import TrainSpec, load_spec

router = APIRouter(tags=["predictions"])


@dataclass(frozen=True)
class StoredModel:
    """The checkpoint that a client means."""

    key: ModelKey
    document: schemas.PredictingModel


def find_model(database: Database, reference: str) -> StoredModel:
    """Raises `ModelNotFound` or `NoCheckpointYet`."""
    if not is_id(reference):
        raise ModelNotFound("There is no checkpoint, no job and no alias of this name")
    with database.read_scope() as session:
        checkpoint = repository.find_model(session, reference)
        spec = load_spec(repository.get_job(session, checkpoint.job_id).spec)
    assert isinstance(spec, TrainSpec)
    assert spec.image_size is not None, "stored specs are resolved"
    return StoredModel(
        key=ModelKey(checkpoint.id, checkpoint.key, spec.image_size),
        document=schemas.PredictingModel(
            checkpoint_id=checkpoint.id,
            job_id=checkpoint.job_id,
            arch=spec.model.arch,
            epoch=checkpoint.epoch,
            step=checkpoint.step,
        ),
    )


# Asynchronous, since it waits for two pools of threads in turn: a thread of the server's own pool
# that waited with it would be missed by the quick routes.
@router.post(
    "/predict",
    summary="Classify images",
    response_model=schemas.Predictions,
    responses=openapi.responses(examples.PREDICTIONS, problems=(400, 404, 409, 413, 415, 422, 429)),
    openapi_extra=openapi.predict_body(examples.PREDICT_FORM, examples.PREDICT_DOCUMENT),
)
async def predict(request: Request, services: ServicesDep) -> schemas.Predictions:
    """Takes a form with one or many `image` files, JSON with `images` in Base64, or one image as
    the body; with it the `model` (a checkpoint's id, a job's for its best checkpoint, or an alias:
    `production` by default) and `top_k`, how many classes to name. Also works while the job still
    trains."""
    async with read_request(request) as asked:
        with services.inference.place():
            return await _predict(asked, services)


async def _predict(asked: PredictionRequest, services: Services) -> schemas.Predictions:
    started = time.monotonic()
    reference = asked.options.model
    model = await run_in_threadpool(find_model, services.database, reference)
    images = await services.decoder.decode(asked.files, model.key.image_size)
    decoded = time.monotonic()
    try:
        answer = await asyncio.wrap_future(services.inference.submit(model.key, images))
    except CheckpointCorrupt:
        # A running job drops a checkpoint when a better one appears: perhaps just now.
        newer = await run_in_threadpool(find_model, services.database, reference)
        if newer == model:
            raise
        model = newer
        answer = await asyncio.wrap_future(services.inference.submit(model.key, images))
    return schemas.Predictions(
        model=model.document,
        predictions=[
            _prediction(name, row, answer.classes, asked.options.top_k)
            for name, row in zip(asked.names, answer.probabilities, strict=True)
        ],
        timing_ms=_timing(1000 * (decoded - started), answer),
    )


def _prediction(
    name: str, probabilities: npt.NDArray[np.float32], classes: Sequence[str], top_k: int
) -> schemas.ImagePrediction:
    """`probabilities` float32 [num_classes]; equal ones are named in the order of the classes."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    top = [
        schemas.LabelProbability(
            label=classes[index], index=int(index), probability=float(probabilities[index])
        )
        for index in order
    ]
    return schemas.ImagePrediction(image=name, top=top, confidence=top[0].probability)


def _timing(decode_ms: float, answer: Answer) -> dict[str, float]:
    times = {
        "decode": decode_ms,
        "queue": answer.queue_ms,
        "load": answer.load_ms,
        "forward": answer.forward_ms,
    }
    return {name: round(milliseconds, 3) for name, milliseconds in times.items()}
