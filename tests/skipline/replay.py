"""A server that answers from a table, and the documents that it answers with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

TIME = "2026-11-01T12:00:00.000Z"


@dataclass
class Asked:
    """A request as it came in."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """What goes back: a body, or parts of a stream after which the connection is cut; nothing at
    all where it is lost."""

    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    cut: bool = False
    lost: bool = False


def answer_json(document: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(document).encode(), status)


def answer_problem(
    status: int, code: str, detail: str, errors: list[dict[str, str]] | None = None
) -> Answer:
    document = {"title": "Refused", "status": status, "detail": detail, "code": code}
    body = json.dumps(document | {"errors": errors or []}).encode()
    return Answer(body, status, "application/problem+json")


def answer_events(*events: str, cut: bool = False) -> Answer:
    return Answer("".join(events).encode(), 200, "text/event-stream", cut)


def event(kind: str, number: int | None, data: dict[str, Any]) -> str:
    number_line = "" if number is None else f"id: {number}\n"
    return f"event: {kind}\n{number_line}data: {json.dumps(data)}\n\n"


def metric_event(number: int, step: int, value: float, name: str = "train_loss") -> str:
    data = {"name": name, "step": step, "epoch": 1, "value": value, "time": TIME, "attempt": 1}
    return event("metric", number, data)


def job_document(**changes: Any) -> dict[str, Any]:
    """A queued training as the server shows it, with some keys changed."""
    return {
        "id": "job-1",
        "kind": "train",
        "name": None,
        "status": "queued",
        "spec": {
            "dataset": "digits",
            "model": {"arch": "resnet18"},
            "epochs": 2,
        },
        "dataset_id": None,
        "attempt": 0,
        "progress": None,
        "queue_position": None,
        "estimated_start_at": None,
        "created_at": TIME,
        "started_at": None,
        "finished_at": None,
        "result": None,
        "error": None,
        "stop_reason": None,
        "parent_id": None,
    } | changes


def dataset_document(**changes: Any) -> dict[str, Any]:
    """Two classes with a problem, as the server shows it, with some keys changed."""
    spread = {"min": 8, "p25": 20, "median": 32, "p75": 40, "max": 64}
    return {
        "id": "d-1",
        "name": "pets",
        "hash": "0123",
        "num_classes": 2,
        "classes": ["cat", "dog"],
        "splits": {
            "train": {"num_images": 1200, "per_class": [700, 500]},
            "test": {"num_images": 20, "per_class": [12, 8]},
        },
        "image_size": 32,
        "channel_mean": [0.5, 0.25, 0.125],
        "channel_std": [0.2, 0.1, 0.05],
        "channel_image_std": [0.2, 0.1, 0.05],
        "image_sizes": {
            **{"width": spread, "height": spread, "file_bytes": spread, "num_distinct": 9},
            "most_common": [{"width": 32, "height": 24, "num_images": 900}],
        },
        "problems": [
            {
                "code": "leaked_images",
                "level": "warning",
                "message": "The same file in two splits",
                "count": 3,
                "examples": ["train/cat/1.jpg = test/cat/2.jpg"],
            }
        ],
        "num_bytes": 3_145_728,
        "labels": ["pets:2", "animals:1"],
        "created_at": TIME,
        "dropped_at": None,
    } | changes


def point(step: int, value: float, epoch: int = 1) -> dict[str, Any]:
    return {"step": step, "epoch": epoch, "value": value, "time": TIME}


def report_document() -> dict[str, Any]:
    """Two classes, 4 images each: one cat is called a dog."""
    row = {"num_samples": 4, "f1": 0.875}
    return {
        "dataset": "pets",
        "dataset_id": "d-1",
        "split": "test",
        "num_samples": 8,
        "loss": 0.25,
        "top1": 0.875,
        "top5": 1.0,
        "mean_class_accuracy": 0.875,
        "per_class": [
            {**row, "label": "cat", "accuracy": 0.75, "precision": 1.0, "recall": 0.75},
            {**row, "label": "dog", "accuracy": 1.0, "precision": 0.8, "recall": 1.0},
        ],
        "confusion": [[3, 1], [0, 4]],
    }


def summary_document() -> dict[str, Any]:
    """A convolution that is frozen, a pooling, and a linear layer."""
    layers = [
        ("conv1", "Conv2d", [64, 32, 32], 1728),
        ("pool", "AvgPool2d", [64, 1, 1], 0),
        ("fc", "Linear", [10], 650),
    ]
    keys = ("name", "type", "output_shape", "num_parameters")
    return {
        "layers": [dict(zip(keys, layer, strict=True)) for layer in layers],
        "num_parameters": 2378,
        "num_trainable_parameters": 650,
        "multiply_adds": 1_770_112,
        "forward_bytes": 262_656,
    }


def event_document(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "time": TIME,
        "level": "info",
        "type": "created",
        "message": f"Event {number}",
        "data": {},
    } | changes


def attempt_document(number: int, **changes: Any) -> dict[str, Any]:
    """An attempt that succeeded within 65 seconds."""
    return {
        "number": number,
        "host": "alpha",
        "gpus": [],
        "started_at": TIME,
        "ended_at": "2026-11-01T12:01:05.000Z",
        "outcome": "succeeded",
        "reason": None,
    } | changes


def worker_document(**changes: Any) -> dict[str, Any]:
    """A host with two GPUs, of which the second has a job."""
    gpu = {"type": "cuda", "name": "NVIDIA H100", "memory_bytes": 80 * 2**30}
    cpu = {"type": "cpu", "index": 0, "name": "AMD EPYC", "memory_bytes": 128 * 2**30}
    return {
        "id": "w-1",
        "host": "alpha",
        "status": "active",
        "num_slots": 2,
        "num_cores": 16,
        "devices": [
            {**cpu, "job_id": None},
            {**gpu, "index": 0, "job_id": None},
            {**gpu, "index": 1, "job_id": "job-1"},
        ],
        "job_ids": ["job-1"],
        "started_at": TIME,
        "seen_at": TIME,
    } | changes


RECIPE = {
    "name": "pets_resnet18",
    "description": "ResNet-18 on pets",
    "source": "ours",
    "dataset": "pets",
    "spec": {"dataset": "pets", "epochs": 3},
}
DRY_RUN_RESULT = {
    "num_parameters": 11_173_962,
    "multiply_adds": 555_422_720,
    "peak_memory_bytes": 3_221_225_472,
    "seconds_per_epoch": 75.2,
    "checkpoint_bytes": 89_478_485,
    "images_per_second": 664.9,
    "device": "cpu",
    "precision": "bf16",
    "data_path": "mapped",
}


@dataclass
class Server:
    """Routes are tried by method and path; what was asked is kept in order."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    routes: dict[str, Callable[[Asked], Answer]] = field(default_factory=dict)

    def on(self, route: str, answer: Callable[[Asked], Answer] | Answer) -> None:
        """`server.on("GET /jobs/1", …)`: an answer, or a function that makes one."""
        self.routes[route] = answer if callable(answer) else lambda _: answer

    def answer(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        route = self.routes.get(f"{asked.method} {asked.path}")
        if route is None:
            return answer_problem(404, "not_found", "There is no such thing")
        return route(asked)


def handler_of(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            parts = urlsplit(self.path)
            answer = server.answer(
                Asked(
                    method=self.command,
                    path=parts.path,
                    query={key: values[0] for key, values in parse_qs(parts.query).items()},
                    headers={key.lower(): value for key, value in self.headers.items()},
                    body=self.rfile.read(int(self.headers.get("Content-Length", 0))),
                )
            )
            self.close_connection = True
            if answer.lost:
                return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            missing = 1 if answer.cut else 0  # The client waits for a byte that never comes.
            self.send_header("Content-Length", str(len(answer.body) + missing))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
