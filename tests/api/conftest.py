"""A real server over HTTP for the tests of the API, and a stand-in for the worker that writes as
the real one does: through the lifecycle, under its fence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
import torch
from PIL import Image
from pydantic import SecretStr

from api.app import Role, create_app
from api.server import Server
from shared import datasets, lifecycle, repository, schema
from shared.comparison import Outcomes
from shared.database import Database
from shared.lifecycle import Fence
from shared.repository import NewPoint
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Base
from shared.vision.architectures import build_model
from shared.vision.bundle import Bundle, BundleDataset, write_bundle
from shared.vision.preprocessing import Preprocessing
from skipline.schemas import JobStatus, Report, Summary
from skipline.specs import TrainSpec, load_spec

PATIENCE_SECONDS = 20.0


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition`, or a failure that says `what` never came."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    pytest.fail(f"No {what} within {PATIENCE_SECONDS:g} s")


@pytest.fixture(name="wait_for")
def _wait_for() -> Callable[[Callable[[], Any], str], Any]:
    return wait_for


class Api(httpx2.Client):
    """A client of a running server, with the requests that tests make most."""

    def __init__(self, server: Server, url: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(base_url=url, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False)
        self.server = server
        self.url = url

    def submit(self, **keys: Any) -> dict[str, Any]:
        """Posts a job, which must be accepted."""
        response = self.post("/jobs", json={"dataset": "digits", **keys})
        assert response.status_code == 202, response.text
        document: dict[str, Any] = response.json()
        return document

    def predict(
        self, images: Sequence[bytes], files: str = "{}.png", **form: Any
    ) -> httpx2.Response:
        parts = [("image", (files.format(place), image)) for place, image in enumerate(images)]
        return self.post("/predict", data=form, files=parts)


def assert_problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document that `response` must be."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert (document["status"], document["code"]) == (status, code), document
    assert set(document) == {"type", "title", "status", "detail", "code", "errors"}
    return document


@pytest.fixture(name="assert_problem")
def _assert_problem() -> Callable[..., dict[str, Any]]:
    return assert_problem


class Running:
    """Servers that were started; `stop` ends them."""

    def __init__(self) -> None:
        self._running: list[tuple[Api, threading.Thread]] = []

    def start(self, settings: Settings, key: str | None = None, role: Role = "all") -> Api:
        server = Server(create_app(settings, role), "127.0.0.1", 0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_for(lambda: server.started or not thread.is_alive(), "started server")
        port = server.servers[0].sockets[0].getsockname()[1]
        headers = {"Authorization": f"Bearer {key}"} if key else None
        api = Api(server, f"http://127.0.0.1:{port}", headers)
        self._running.append((api, thread))
        return api

    def stop(self) -> None:
        for api, _ in self._running:
            api.close()
            api.server.should_exit = True
        for _, thread in self._running:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
        self._running.clear()


StartServer = Callable[..., Api]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers with given settings; they end with the test."""
    running = Running()
    yield running.start
    running.stop()


# One database of each kind and one server over it for a module: starting and stopping them for
# every test would take most of the time.


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    url = f"sqlite:///{home / 'test.sqlite3'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("new_postgres_schema")()
    return ready_settings(home, url)


@pytest.fixture(scope="module")
def module_database(settings: Settings) -> Iterator[Database]:
    opened = Database(settings.database)
    yield opened
    opened.dispose()


@pytest.fixture(scope="module")
def module_api(settings: Settings) -> Iterator[Api]:
    running = Running()
    yield running.start(settings)
    running.stop()


@pytest.fixture
def database(module_database: Database) -> Database:
    """An empty database, of each kind."""
    with module_database.session_scope() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
    return module_database


@pytest.fixture
def api(module_api: Api, database: Database) -> Api:
    """A server over an empty database, of each kind."""
    return module_api


def ready_settings(home: Path, url: str) -> Settings:
    """Settings over a database that has the newest schema."""
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        home=home,
        database_url=SecretStr(url),
        dataset_roots=(home / "datasets",),
    )
    database = Database(settings.database)
    schema.migrate(database)
    database.dispose()
    return settings


@pytest.fixture(scope="module")
def sqlite_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a module where the kind of the database does not matter."""
    home = tmp_path_factory.mktemp("home")
    return ready_settings(home, f"sqlite:///{home / 'test.sqlite3'}")


@pytest.fixture(scope="module")
def sqlite_api(sqlite_settings: Settings) -> Iterator[Api]:
    """One server for a whole module, where it does not matter what other tests stored."""
    running = Running()
    yield running.start(sqlite_settings)
    running.stop()


@dataclass(frozen=True)
class Attempt:
    """A job in the hands of the stand-in."""

    worker: Worker
    fence: Fence

    def write(self, *points: NewPoint, progress: Mapping[str, Any] | None = None) -> None:
        with self.worker.database.session_scope() as session:
            repository.write_progress(session, self.fence, progress, points)

    def rewind(self, last_point: int, step: int) -> None:
        with self.worker.database.session_scope() as session:
            repository.rewind(session, self.fence, last_point=last_point, step=step, epoch=1)

    def summarise(self, summary: Summary) -> None:
        with self.worker.database.session_scope() as session:
            repository.add_summary(session, self.fence, summary)

    def picture(self, name: str, png: bytes) -> None:
        with self.worker.database.session_scope() as session:
            repository.add_picture(session, self.fence, name, png)

    def report(self, report: Report) -> None:
        with self.worker.database.session_scope() as session:
            repository.add_report(session, self.fence.job_id, report)

    def event(self, level: str, type_: str, message: str, **data: Any) -> None:
        with self.worker.database.session_scope() as session:
            repository.add_event(session, self.fence, level, type_, message, data)

    def finish(
        self,
        status: JobStatus = JobStatus.succeeded,
        report: Report | None = None,
        outcomes: Outcomes | None = None,
    ) -> None:
        error = {"code": "nan_loss", "message": "The loss is NaN", "hint": "Lower the lr"}
        with self.worker.database.session_scope() as session:
            if report is not None:
                packed = None if outcomes is None else outcomes.encode()
                repository.add_report(session, self.fence.job_id, report, packed)
            lifecycle.finish(
                session,
                self.fence,
                status,
                result={},
                error=error if status is JobStatus.failed else None,
            )

    def print(self, number: int, text: str) -> None:
        with self.worker.database.session_scope() as session:
            repository.add_log_part(session, self.fence, number, text)

    def release(self) -> None:
        with self.worker.database.session_scope() as session:
            lifecycle.release(session, self.fence, "for a test")

    def checkpoint(
        self,
        step: int,
        *kinds: Literal["best", "last", "epoch"],
        bias: Sequence[float] | None = None,
    ) -> str:
        """Writes a checkpoint and returns its storage key. With `bias` it is a real bundle, of a
        network that answers the same for every image: the softmax of `bias`."""
        with self.worker.database.read_scope() as session:
            spec = load_spec(repository.get_job(session, self.fence.job_id).spec)
        assert isinstance(spec, TrainSpec)
        key = f"jobs/{self.fence.job_id}/{self.fence.attempt}/{step}"
        with self.worker.storage.writing(key, self.fence.owner) as folder:
            if bias is None:
                (folder / "model.safetensors").write_bytes(b"0123456789")
            else:
                write_bundle_that_answers(folder, spec, bias)
        with self.worker.database.session_scope() as session:
            repository.register_checkpoint(
                session,
                self.fence,
                kinds=kinds or ("best", "last"),
                key=key,
                epoch=1,
                step=step,
                metrics={"val_loss": 0.5},
                num_bytes=10,
            )
        return key


class Worker:
    """Claims jobs and writes what a trainer would."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.database = database
        self.storage = Storage(settings.artifacts_path)

    def claim(self) -> Attempt:
        """The next job of the queue."""
        with self.database.session_scope() as session:
            capacity = lifecycle.Capacity(("any", "auto", "cpu"))
            claim = lifecycle.claim(session, "stand-in", "nowhere", 600, capacity)
        assert claim is not None, "a job is queued"
        return Attempt(self, claim.fence)

    def add_dataset(
        self, name: str, classes: Sequence[str], *, called: str | None = None, **splits: int
    ) -> str:
        """`called`: its name, if another than the one that its id and hash are made of."""
        with self.database.session_scope() as session:
            dataset, _ = datasets.add_dataset(
                session,
                id=f"id-of-{name}",
                name=called or name,
                hash=f"hash-of-{name}",
                classes=list(classes),
                splits={
                    split: {"num_images": number, "per_class": [number] + [0] * (len(classes) - 1)}
                    for split, number in splits.items()
                },
                image_size=32,
                channel_mean=[0.5, 0.5, 0.5],
                channel_std=[0.25, 0.25, 0.25],
                problems=[],
                num_bytes=1,
                key=f"datasets/{name}",
            )
            return dataset.id


@pytest.fixture
def worker(settings: Settings, database: Database) -> Worker:
    return Worker(settings, database)


def write_bundle_that_answers(folder: Path, spec: TrainSpec, bias: Sequence[float]) -> None:
    assert spec.image_size is not None
    weights = build_model(spec.model, 10, spec.image_size).state_dict()
    weights["fc.weight"].zero_()
    weights["fc.bias"].copy_(torch.tensor(bias))
    bundle = Bundle(
        spec=spec,
        classes=tuple("0123456789"),
        preprocessing=Preprocessing(
            image_size=spec.image_size, channel_mean=(0.5, 0.5, 0.5), channel_std=(0.5, 0.5, 0.5)
        ),
        dataset=BundleDataset(name="digits", id="an-id", hash="a-hash"),
        epoch=1,
        step=1,
        metrics={},
    )
    write_bundle(folder, bundle, weights)


def png(width: int = 8, height: int = 8, value: int = 128) -> bytes:
    """A grey picture as a file's bytes."""
    buffer = BytesIO()
    Image.new("L", (width, height), value).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(name="png")
def _png() -> Callable[..., bytes]:
    return png
