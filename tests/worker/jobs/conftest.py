"""Attempts at real jobs within this process: a database, a storage, a small dataset that was
brought in, and a network of milliseconds in the place of the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from shared import datasets, lifecycle, repository, schema, uploads
from shared.bundle_files import WEIGHTS_FILE
from shared.database import Database
from shared.lifecycle import Action, Capacity, Fence
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Checkpoint, Job
from shared.vision import bundle
from skipline import catalog, schemas
from skipline.schemas import JobKind, JobStatus
from skipline.specs import EvaluateSpec, IngestSpec, ModelSpec, PredictSpec, TrainSpec
from tests.conftest import make_settings
from worker.datasets.cache import packed_path
from worker.datasets.packing import pack
from worker.engine import trainer
from worker.engine.events import Control, Request
from worker.jobs import training
from worker.runner import run_attempt

IMAGE_SIZE = 8
NUM_TRAIN, NUM_TEST = 24, 12
"""Of each of two classes."""
BATCH_SIZE = 8
STEPS_PER_EPOCH = 2 * NUM_TRAIN // BATCH_SIZE
VAL_LOOKS = 2 * NUM_TEST // BATCH_SIZE
LOOKS_PER_EPOCH = STEPS_PER_EPOCH + VAL_LOOKS
"""A training looks what it is asked before each batch, of training and of validation."""
CPU = Capacity(("any", "auto", "cpu"))


def small_network(
    spec: ModelSpec, num_classes: int, image_size: int, *, num_hidden: int = 8
) -> nn.Module:
    """Batch norm and dropout, as the real ones have them."""
    return nn.Sequential(
        nn.Conv2d(3, 4, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(spec.dropout),
        nn.Linear(4 * image_size**2, num_hidden),
        nn.ReLU(),
        nn.Linear(num_hidden, num_classes),
    )


class Supervised(Control):
    """Asks for something at the n-th look, and says so in the job's row before, as a client and a
    supervisor would. `crash_at`: a look at which the process breaks down."""

    ORDERS: Mapping[Action, Request] = {"cancel": "cancel", "pause": "release", "stop": "stop"}

    def __init__(
        self,
        actions: Mapping[int, Action | Request] | None = None,
        crash_at: int | None = None,
        before: Callable[[int], None] = lambda look: None,
    ) -> None:
        self.actions = dict(actions or {})
        self.crash_at = crash_at
        self.before = before
        self.num_looks = 0
        self.ask: Callable[[Action], None] = lambda action: None

    def look(self) -> Request | None:
        self.num_looks += 1
        self.before(self.num_looks)
        if self.num_looks == self.crash_at:
            raise ZeroDivisionError
        match self.actions.get(self.num_looks):
            case "release":
                self.request = "release"
            case "cancel" | "pause" | "stop" as action:
                self.ask(action)
                self.request = self.ORDERS[action]
        return super().look()


@dataclass
class Shop:
    """Where jobs are posted and worked at, one attempt after the other."""

    settings: Settings
    database: Database
    storage: Storage

    def train(self, kind: JobKind | None = None, **keys: Any) -> str:
        """Posts a training of `squares`; `keys` are its spec's. Returns the job's id."""
        spec = TrainSpec.model_validate(
            {
                "dataset": "squares",
                "image_size": IMAGE_SIZE,
                "epochs": 3,
                "batch_size": BATCH_SIZE,
                "augment": ["horizontal_flip"],
                "optimizer": {"lr": 0.05, "momentum": 0.9},
                "model": {"arch": "resnet18", "dropout": 0.2},
                "precision": "fp32",
                "log_every_steps": 4,
            }
            | keys
        )
        with self.database.session_scope() as session:
            facts, dataset_id = datasets.dataset_facts(session, spec.dataset)
            resolved = catalog.resolve(spec, facts)
            return repository.add_job(session, resolved, kind=kind, dataset_id=dataset_id).id

    def evaluate(self, model: str, dataset: str = "squares", **keys: Any) -> str:
        """Posts an evaluation that finds its model when it begins."""
        spec = EvaluateSpec(model=model, dataset=dataset, batch_size=BATCH_SIZE, **keys)
        with self.database.session_scope() as session:
            return repository.add_job(session, spec).id

    def predict(self, model: str, **keys: Any) -> str:
        """Posts a batch prediction that finds its model when it begins."""
        spec = PredictSpec.model_validate({"model": model} | keys)
        with self.database.session_scope() as session:
            return repository.add_job(session, spec).id

    def upload(self, file_name: str, data: bytes) -> str:
        """A file as a client has sent it; returns the upload's id."""
        root = self.storage.root
        with self.database.session_scope() as session:
            upload = uploads.create(
                session,
                self.settings,
                root,
                submitter="",
                file_name=file_name,
                num_bytes=len(data),
            )
            uploads.data_path(root, upload.id).write_bytes(data)
            return upload.id

    def ingest(self, folder: Path, name: str) -> str:
        spec = IngestSpec(source="path", path=str(folder), name=name)
        with self.database.session_scope() as session:
            return repository.add_job(session, spec).id

    def retry(self, parent_id: str) -> str:
        """A job that goes on where `parent_id` came to, as the API stores it."""
        with self.database.session_scope() as session:
            parent = repository.get_job(session, parent_id)
            spec = TrainSpec.model_validate(parent.spec | {"parent_id": parent_id})
            job = repository.add_job(session, spec, dataset_id=parent.dataset_id)
            repository.inherit(session, job, parent)
            return job.id

    def attempt(self, job_id: str, control: Supervised | None = None) -> Job:
        """An attempt at the job, which is the first in the queue; returns what it left."""
        control = control or Supervised()
        control.ask = lambda action: self.ask(job_id, action)
        with self.database.session_scope() as session:
            claim = lifecycle.claim(session, "owner", "host", 60, CPU)
        assert claim is not None
        assert claim.fence.job_id == job_id
        try:
            run_attempt(self.settings, self.database, self.storage, claim.fence, control)
        except ZeroDivisionError:
            self.lose(claim.fence)
        return self.job(job_id)

    def ask(self, job_id: str, action: Action) -> None:
        with self.database.session_scope() as session:
            lifecycle.request(session, job_id, action)

    def lose(self, fence: Fence) -> None:
        with self.database.session_scope() as session:
            lifecycle.lose(session, fence.job_id, fence.attempt, "gone", max_crashes=9)

    def job(self, job_id: str) -> Job:
        with self.database.read_scope() as session:
            return repository.get_job(session, job_id)

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """From the first one on."""
        with self.database.read_scope() as session:
            return repository.list_checkpoints(session, job_id)[::-1]

    def report(self, job_id: str) -> schemas.Report:
        with self.database.read_scope() as session:
            return repository.get_report(session, job_id)

    def curve(self, job_id: str, name: str) -> list[tuple[int, float]]:
        with self.database.read_scope() as session:
            series, _ = repository.series(session, job_id, names=[name], after=0, limit=10_000)
        return [(point.step, point.value) for point in series.get(name, [])]

    def events(self, job_id: str) -> list[str]:
        with self.database.read_scope() as session:
            return [event.type for event in repository.list_events(session, job_id)]

    def last_weights(self, job_id: str) -> bytes:
        """The file of the job's newest checkpoint."""
        key = self.checkpoints(job_id)[-1].key
        return (self.storage.path(key) / WEIGHTS_FILE).read_bytes()


def squares(folder: Path, classes: tuple[str, str] = ("dark", "light")) -> Path:
    """Noisy images of 8x8 pixels, of which one class is a little lighter."""
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        for place, label in enumerate(classes):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 200, (IMAGE_SIZE, IMAGE_SIZE, 3)) + 30 * place
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """With the dataset `squares` brought in and packed."""
    for module in (bundle, trainer, training):
        monkeypatch.setattr(module, "build_model", small_network)
    monkeypatch.setattr("worker.jobs.runtime.CPU_NICENESS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = make_settings(home=tmp_path / "home", dataset_roots=(tmp_path,), device="cpu")
    database = Database(settings.database)
    schema.migrate(database)
    shop = Shop(settings, database, Storage(settings.artifacts_path))
    job = shop.attempt(shop.ingest(squares(tmp_path / "squares"), "squares"))
    assert job.status == JobStatus.succeeded, job.error
    with database.read_scope() as session:
        dataset = datasets.find_dataset(session, "squares")
    assert dataset is not None
    folder = shop.storage.path(dataset.key)
    pack(folder, IMAGE_SIZE, packed_path(settings), dataset.hash, max_pixels=10_000)
    yield shop
    database.dispose()
    torch.set_num_threads(threads)
