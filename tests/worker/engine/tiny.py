"""A tiny problem, a network of milliseconds for it, and a sink that remembers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.vision.bundle import Bundle, BundleDataset, read_bundle, write_bundle
from shared.vision.preprocessing import Preprocessing
from skipline.schemas import Progress
from skipline.specs import TrainSpec
from worker.engine.data import ArrayData
from worker.engine.distributed import ALONE, Ranks
from worker.engine.events import Control, Request, TrainingCheckpoint
from worker.engine.resume import load_resume, save_resume
from worker.engine.runtime import Runtime
from worker.engine.trainer import FitResult, Resume, fit

IMAGE_SIZE = 8
NUM_CLASSES = 3
NUM_TRAIN, NUM_VAL = 22, 10

PREPROCESSING = Preprocessing(
    image_size=IMAGE_SIZE, channel_mean=(0.45, 0.45, 0.45), channel_std=(0.25, 0.25, 0.25)
)
RUNTIME = Runtime(device="cpu", precision="fp32", num_threads=torch.get_num_threads())


def colored(num_samples: int, seed: int) -> ArrayData:
    """Noise in which the class's channel is brighter."""
    generator = np.random.default_rng(seed)
    labels = np.arange(num_samples) % NUM_CLASSES
    images = generator.integers(0, 180, (num_samples, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    images[np.arange(num_samples), :, :, labels] += 70
    return ArrayData(images, labels.astype(np.int64))


@dataclass
class Recorder:
    """A sink that keeps copies of what it was told."""

    points: list[tuple[str, int, int, float]] = field(default_factory=list)
    progresses: list[Progress] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    event_data: list[Mapping[str, Any]] = field(default_factory=list)
    checkpoints: list[TrainingCheckpoint] = field(default_factory=list)
    on_checkpoint: Callable[[], None] = lambda: None

    def metrics(self, values: Mapping[str, float], *, step: int, epoch: int) -> None:
        self.points += [(name, step, epoch, value) for name, value in values.items()]

    def progress(self, progress: Progress) -> None:
        self.progresses.append(progress)

    def event(self, level: str, kind: str, message: str, data: Mapping[str, Any]) -> None:
        self.events.append(kind)
        self.event_data.append(data)

    def save_checkpoint(self, checkpoint: TrainingCheckpoint) -> None:
        weights = {name: weight.clone() for name, weight in checkpoint.weights.items()}
        resume = copy.deepcopy(checkpoint.resume)
        self.checkpoints.append(replace(checkpoint, weights=weights, resume=resume))
        self.on_checkpoint()

    def values(self, name: str) -> list[float]:
        return [value for point, _, _, value in self.points if point == name]

    def reproducible_points(self) -> list[tuple[str, int, int, float]]:
        """All but what the clock says."""
        timed = ("images_per_second", "epoch_seconds")
        return [point for point in self.points if point[0] not in timed]


class Ticking(Control):
    """A clock that goes on by a second at each look."""

    now = 0.0

    def look(self) -> Request | None:
        self.now += 1
        return super().look()


class RequestAt(Control):
    """Asks for something at each of these looks, that is, before the n-th batch."""

    def __init__(self, requests: Mapping[int, Request]) -> None:
        self.num_looks = 0
        self.requests = requests

    def look(self) -> Request | None:
        self.num_looks += 1
        self.request = self.requests.get(self.num_looks, self.request)
        return super().look()


class ReleaseAt(RequestAt):
    """Asks for a release (or else) at the n-th look."""

    def __init__(self, looks: int, request: Request = "release") -> None:
        super().__init__({looks: request})


def tiny_spec(**options: Any) -> TrainSpec:
    defaults: dict[str, Any] = {
        "dataset": "tiny",
        "image_size": IMAGE_SIZE,
        "epochs": 3,
        "batch_size": 4,
        "log_every_steps": 3,
        "optimizer": {"name": "sgd", "lr": 0.05},
    }
    return TrainSpec.model_validate(defaults | options)


def tiny_model(spec: TrainSpec) -> nn.Module:
    """Batch norm and dropout, as the real ones have them."""
    torch.manual_seed(spec.seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(spec.model.dropout),
        nn.Linear(8, NUM_CLASSES),
    )


def plain_model(spec: TrainSpec) -> nn.Module:
    """Without batch norm: what it makes of an image does not depend on those beside it."""
    torch.manual_seed(spec.seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(spec.model.dropout),
        nn.Linear(16, NUM_CLASSES),
    )


class Hungry(nn.Module):
    """A network that runs out of memory with more than `capacity` images at once."""

    def __init__(self, network: nn.Module, capacity: int) -> None:
        super().__init__()
        self.network = network
        self.capacity = capacity
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(x))
        answer: torch.Tensor = self.network(x)
        return answer


@dataclass
class Run:
    result: FitResult
    sink: Recorder
    weights: dict[str, torch.Tensor]


def run_fit(
    spec: TrainSpec,
    *,
    model: nn.Module | None = None,
    sink: Recorder | None = None,
    control: Control | None = None,
    resume: Resume | None = None,
    runtime: Runtime = RUNTIME,
    num_val: int = NUM_VAL,
    ranks: Ranks = ALONE,
) -> Run:
    sink = sink or Recorder()
    model = model or tiny_model(spec)
    train, val = colored(NUM_TRAIN, seed=1), colored(num_val, seed=2)
    control = control or Control()
    result = fit(spec, model, train, val, PREPROCESSING, runtime, sink, control, resume, ranks)
    return Run(result, sink, model.state_dict())


def assert_same_run(run: Run, expected: Run) -> None:
    assert all(torch.equal(run.weights[name], expected.weights[name]) for name in expected.weights)
    assert run.sink.reproducible_points() == expected.sink.reproducible_points()
    assert run.result == expected.result


def through_files(checkpoint: TrainingCheckpoint, spec: TrainSpec, folder: Path) -> Resume:
    """What another process finds of a checkpoint."""
    bundle = Bundle(
        spec=spec,
        classes=("red", "green", "blue"),
        preprocessing=PREPROCESSING,
        dataset=BundleDataset(name="tiny", id="ds-1", hash="abc"),
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        metrics=dict(checkpoint.metrics),
    )
    folder.mkdir()
    write_bundle(folder, bundle, checkpoint.weights)
    save_resume(folder / "resume.pt", checkpoint.resume)
    return Resume(read_bundle(folder)[1], load_resume(folder / "resume.pt"))
