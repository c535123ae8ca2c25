"""The HTTP application: what it is made of, and what lives as long as it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Literal

from fastapi import Depends, FastAPI

from api import (
    architectures,
    bodies,
    comparisons,
    dataset_images,
    datasets,
    docs,
    exports,
    health,
    history,
    ingests,
    jobs,
    metering,
    models,
    plots,
    predictions,
    problems,
    recipes,
    uploads,
    workers,
)
from api.checks import Check, Checks
from api.dependencies import Services, require_key
from api.drawing import Drawing
from api.exporting import Exporter
from api.limits import QueueLimits
from api.metering import Metering
from api.serving import acceleration
from api.serving.acceleration import Accelerator
from api.serving.cache import ModelCache
from api.serving.images import Decoder
from api.serving.inference import MAX_BATCH_IMAGES, MAX_BATCH_IMAGES_CPU, Inference
from api.stored_datasets import StoredDatasets
from api.stored_models import StoredModels
from api.streams import StreamHub
from api.warmup import WarmUp
from shared.database import Database
from shared.dispatch import Bell
from shared.hints import Hints
from shared.reaper import Reaper
from shared.settings import Settings, get_settings
from shared.storage import Storage

Role = Literal["all", "predict"]
"""What a process serves: everything, or predictions alone, which can then be scaled apart."""
_MODULES = {
    "all": (
        jobs,
        history,
        plots,
        workers,
        datasets,
        dataset_images,
        ingests,
        uploads,
        architectures,
        recipes,
        predictions,
        models,
        exports,
        comparisons,
        health,
        docs,
    ),
    "predict": (predictions, health, docs),
}


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    database = Database(settings.database)
    storage = Storage(settings.artifacts_path)
    bell = Bell(settings)
    # A GPU is left to the trainings, unless the operator says so.
    device = "cuda" if settings.device == "cuda" else "cpu"
    accelerator = None
    if settings.predict_backend != "torch" and device == "cpu" and acceleration.is_possible():
        accelerator = Accelerator(settings.cache_path / "onnx", settings.model_cache_bytes)
    cache = ModelCache(storage, settings.model_cache_bytes, device, accelerator)
    models = StoredModels(database)
    inference = Inference(
        cache,
        settings.max_predict_waiting,
        settings.predict_max_wait_ms / 1000,
        MAX_BATCH_IMAGES_CPU if device == "cpu" else MAX_BATCH_IMAGES,
    )
    streams = StreamHub(database, settings.max_streams)
    checks: dict[str, Check] = {"database": database.check, "storage": storage.check}
    if app.state.role == "predict":
        checks["model"] = WarmUp(models, inference).check
    else:
        checks["broker"] = bell.check
    app.state.services = Services(
        settings=settings,
        database=database,
        storage=storage,
        bell=bell,
        limits=QueueLimits(settings),
        streams=streams,
        inference=inference,
        models=models,
        decoder=Decoder(settings.max_image_pixels),
        checks=Checks(checks),
        metering=Metering(database, inference),
        drawing=Drawing(),
        stored_datasets=StoredDatasets(storage),
        exporter=Exporter(),
    )
    with ExitStack() as stack:
        if accelerator is not None:
            stack.callback(accelerator.stop)
        stack.callback(_close, app.state.services)
        if app.state.role == "all":
            reaper = Reaper(settings, database, storage)
            reaper.start()
            stack.callback(reaper.stop)
            hints = Hints(settings)
            hints.listen(streams.hint)
            stack.callback(hints.close)
        yield


def _close(services: Services) -> None:
    services.streams.stop()
    services.streams.join()
    services.decoder.close()
    services.inference.stop()
    services.checks.close()
    services.metering.close()
    services.drawing.close()
    services.bell.close()
    services.database.dispose()


def create_app(settings: Settings | None = None, role: Role = "all") -> FastAPI:
    """The application over `settings`, by default the process's own."""
    app = FastAPI(
        title="Skipline",
        version=version("skipline"),
        description="Train, evaluate and serve image classifiers.",
        lifespan=_lifespan,
        # The one check of access, on every route there is.
        dependencies=[Depends(require_key)],
        # `api.docs` serves these as routes like any other, behind the same check.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings or get_settings()
    app.state.role = role
    bodies.install(app)
    problems.install(app)
    metering.install(app)
    for module in _MODULES[role]:
        app.include_router(module.router)
    return app
