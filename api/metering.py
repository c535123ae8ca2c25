"""What Prometheus reads: requests, predictions, models in memory, jobs and workers.

Numbers of this process are counted as things happen; jobs and workers are counted in the database
when they are asked for. No label grows with what is stored.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.serving.inference import Answer, Inference
from shared import repository
from shared.database import Database

log = structlog.get_logger(__name__)

DATABASE_SECONDS = 3.0
"""For the counts of jobs and workers; an answer without them comes after that."""
PHASES = ("decode", "queue", "load", "forward")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metering:
    """The metrics of one application."""

    def __init__(self, database: Database, inference: Inference) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Histogram(
            "skipline_http_request_seconds",
            "From a request's head to the end of its answer",
            ("method", "route", "status"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._images = Counter(
            "skipline_predicted_images", "Images that were classified", registry=registry
        )
        self._phases = Histogram(
            "skipline_prediction_seconds",
            "Where the time of an answered prediction went",
            ("phase",),
            buckets=_SECONDS,
            registry=registry,
        )
        for phase in PHASES:
            self._phases.labels(phase)
        waiting = Gauge(
            "skipline_predictions_waiting", "Predictions in work or queued", registry=registry
        )
        waiting.set_function(lambda: inference.num_places_taken)
        models = Gauge("skipline_loaded_models", "Models in memory", registry=registry)
        models.set_function(lambda: len(inference.loaded().items))
        model_bytes = Gauge("skipline_loaded_model_bytes", "Of all of them", registry=registry)
        model_bytes.set_function(lambda: inference.loaded().num_bytes)
        self._census = _Census(database)
        registry.register(self._census)

    def exposition(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)

    def count_prediction(self, num_images: int, decode_ms: float, answer: Answer) -> None:
        """A prediction that was answered."""
        self._images.inc(num_images)
        times = (decode_ms, answer.queue_ms, answer.load_ms, answer.forward_ms)
        for phase, milliseconds in zip(PHASES, times, strict=True):
            self._phases.labels(phase).observe(milliseconds / 1000)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request that was answered; `route` is the pattern of its path."""
        self._requests.labels(method, route, str(status)).observe(seconds)

    def close(self) -> None:
        """Waits for no database that hangs."""
        self._census.close()


class _Census(Collector):
    """What is in the database. It is asked in a thread of its own: where it hangs, it hangs once,
    and the other metrics are told without it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._thread = ThreadPoolExecutor(1, "census")

    def describe(self) -> list[Metric]:
        """Named beforehand, so that registering asks nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("skipline_database_up", "1 if the database answers")
        try:
            census = self._thread.submit(self._count).result(DATABASE_SECONDS)
        except (SQLAlchemyError, NotInTime) as error:
            log.warning("jobs cannot be counted", error=str(error))
            up.add_metric((), 0)
            yield up
            return
        up.add_metric((), 1)
        yield up
        jobs = GaugeMetricFamily("skipline_jobs", "Stored jobs", labels=("kind", "status"))
        for (kind, status), number in census.jobs.items():
            jobs.add_metric((kind, status), number)
        yield jobs
        workers = GaugeMetricFamily("skipline_workers", "Workers", labels=("status",))
        for status, number in census.workers.items():
            workers.add_metric((status,), number)
        yield workers
        waited = GaugeMetricFamily(
            "skipline_oldest_queued_job_seconds", "How long the job that queued first has waited"
        )
        waited.add_metric((), census.longest_wait_seconds)
        yield waited

    def _count(self) -> repository.Census:
        with self._database.read_scope() as session:
            return repository.census(session)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Meter:
    """Counts requests, whatever becomes of them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # should there be no answer
        started = time.monotonic()

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            metering: Metering = scope["app"].state.services.metering
            method = scope["method"] if scope["method"] in METHODS else "other"
            # What is at no known address has no route: its paths are the clients' invention.
            route = getattr(scope.get("route"), "path", "other")
            metering.count_request(method, route, status, time.monotonic() - started)


def install(app: FastAPI) -> None:
    """Counts the requests of `app`. Outermost: also what other layers answer is counted."""
    app.add_middleware(Meter)
