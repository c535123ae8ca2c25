"""`POST /predict`: images in, the model's best guesses out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from api import examples, openapi
from api.dependencies import Services, ServicesDep
from api.direct import DirectRoute
from api.prediction_requests import PredictionOptions, PredictionRequest, read_request
from api.serving.explanations import encoded, overlay
from api.serving.images import Square
from api.serving.inference import Answer
from api.stored_models import StoredModel
from api.waiting import while_waited_for
from shared.answers import answers
from shared.errors import CheckpointCorrupt, PredictionTimeout
from skipline import schemas

router = APIRouter(tags=["predictions"])


# Asynchronous, since it waits for two pools of threads in turn: a thread of the server's own pool
# that waited with it would be missed by the quick routes.
async def predict(request: Request) -> schemas.Predictions:
    """Takes a form with one or many `image` files, JSON with `images` in Base64, or one image as
    the body; with it the `model` (a checkpoint's id, a job's for its best checkpoint, or an alias:
    `production` by default) and `top_k`, how many classes to name. Also works while the job still
    trains. `explain` adds a picture of where each answer comes from, `features` what the network
    sees in each image: the means of its last feature map."""
    services: Services = request.app.state.services
    await services.inference.room()  # before the body is read: a refusal should cost little
    async with read_request(request) as asked:
        with services.inference.place():
            patience = services.settings.predict_timeout_seconds
            late = PredictionTimeout(
                f"There was no answer within {patience:g} s: try again when less is asked for, or "
                "raise SKIPLINE_PREDICT_TIMEOUT_SECONDS"
            )
            return await while_waited_for(request, _predict(asked, services), patience, late)


router.add_api_route(
    "/predict",
    predict,
    methods=["POST"],
    summary="Classify images",
    response_model=schemas.Predictions,
    responses=openapi.responses(
        examples.PREDICTIONS, problems=(400, 404, 409, 413, 415, 422, 429, 504)
    ),
    openapi_extra=openapi.predict_body(examples.PREDICT_FORM, examples.PREDICT_DOCUMENT),
    route_class_override=DirectRoute,
)


@router.get(
    "/models/loaded",
    summary="List the models in memory",
    responses=openapi.responses(examples.LOADED_MODELS),
)
async def list_loaded_models(services: ServicesDep) -> schemas.LoadedModels:
    """Those that answer without being read from the storage first, in the process that takes this
    request: where several serve, each has its own."""
    return services.inference.loaded()


async def _predict(asked: PredictionRequest, services: Services) -> schemas.Predictions:
    started = time.monotonic()
    find = partial(services.models.find, asked.options.model)
    model, images = await services.decoder.decode(asked.files, find, _image_size)
    decoded = time.monotonic()
    try:
        answer = await _answer(services, model, images, asked.options)
    except CheckpointCorrupt:
        # A running job drops a checkpoint when a better one appears: perhaps just now.
        newer = await run_in_threadpool(find)
        if newer == model:
            raise
        model = newer
        answer = await _answer(services, model, images, asked.options)
    predictions = answers(
        model.document, asked.names, answer.probabilities, answer.classes, asked.options.top_k
    )
    decode_ms = 1000 * (decoded - started)
    services.metering.count_prediction(len(images), decode_ms, answer)
    if answer.look is not None:
        work = partial(_with_look, predictions, images, answer, asked.options)
        predictions = await services.drawing.run(work)
    return schemas.Predictions(
        model=model.document,
        predictions=predictions,
        timing_ms=_timing(decode_ms, answer),
    )


def _image_size(model: StoredModel) -> int:
    return model.key.image_size


async def _answer(
    services: Services, model: StoredModel, images: Square, options: PredictionOptions
) -> Answer:
    looks = options.explain or options.features
    return await asyncio.wrap_future(services.inference.submit(model.key, images, looks=looks))


def _with_look(
    predictions: Sequence[schemas.ImagePrediction],
    images: Square,
    answer: Answer,
    options: PredictionOptions,
) -> list[schemas.ImagePrediction]:
    """The predictions with what was asked for besides."""
    look = answer.look
    assert look is not None, "it was asked for"
    found = []
    for place, prediction in enumerate(predictions):
        more: dict[str, Any] = {}
        if options.explain:
            more["explanation"] = encoded(overlay(images[place], look.heat[place]))
        if options.features:
            more["features"] = look.features[place].tolist()
        found.append(prediction.model_copy(update=more))
    return found


def _timing(decode_ms: float, answer: Answer) -> dict[str, float]:
    times = {
        "decode": decode_ms,
        "queue": answer.queue_ms,
        "load": answer.load_ms,
        "forward": answer.forward_ms,
    }
    return {name: round(milliseconds, 3) for name, milliseconds in times.items()}
