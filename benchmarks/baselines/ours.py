"""Skipline itself: datasets brought in and packed as its worker does, trained by its engine.

The benchmarks of whole epochs call the engine here only. A `Stopwatch` takes the
sink's place; no database, no files but the packed arrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.baselines.problem import WrongUsage, synchronized_time
from shared.errors import TrainingError
from shared.settings import Settings
from shared.vision.preprocessing import Preprocessing
from shared.vision.summary import summarize
from skipline.catalog import DatasetFacts, resolve
from skipline.schemas import Progress
from skipline.specs import ChannelsSpec, IngestSpec, TrainSpec, parse_request
from worker.datasets.ingest import DatasetRecord, ingest
from worker.datasets.packing import PackedDataset, pack
from worker.datasets.sources import open_source
from worker.engine.data import ArrayData, choose_data_path
from worker.engine.events import Control, Released, Request, TrainingCheckpoint
from worker.engine.runtime import Precision, Runtime, choose_device
from worker.engine.trainer import fit, new_model
from worker.jobs.precision import compile_pays, measured_speeds

DATASET_NAME = "benchmark"
CHECKPOINT_MINUTES = 10_000
"""A `Stopwatch` knows no checkpoints within an epoch."""


@dataclass(frozen=True)
class OurData:
    """A dataset, brought in and packed below `home`; `seconds` is what both took, once."""

    home: Path
    record: DatasetRecord
    packed: PackedDataset
    seconds: float

    def split(self, name: str) -> ArrayData:
        return ArrayData(*self.packed.split(name))

    @property
    def validation(self) -> ArrayData:
        return self.split("val" if "val" in self.packed.counts else "test")


def bring_in(source: IngestSpec, image_size: int, home: Path, settings: Settings) -> OurData:
    """Reads, checks and packs what `source` names into `home`.

    Raises:
        WrongUsage: the images cannot be trained on.
    """
    stored = home / "dataset"
    stored.mkdir(parents=True)
    try:
        images = open_source(source, settings)
        start = time.perf_counter()
        record = ingest(images, DATASET_NAME, None, source.seed, stored, settings)
    except TrainingError as error:
        raise WrongUsage(f"{error.message}. {error.hint}") from None
    packed = pack(
        stored,
        image_size,
        home / "packed",
        record.hash,
        max_pixels=settings.max_image_pixels,
        num_threads=settings.cpu_threads,
    )
    return OurData(home, record, packed, time.perf_counter() - start)


def folder_settings(folder: Path, num_threads: int) -> Settings:
    return Settings(home=folder, dataset_roots=(folder,), cpu_threads=num_threads)


def recipe_spec(recipe: str, data: OurData, **changes: Any) -> TrainSpec:
    """The recipe for this dataset, resolved.

    Raises:
        SpecRefused: the recipe is not made for such images.
    """
    rarely = {"every_minutes": CHECKPOINT_MINUTES}
    spec = parse_request(
        {"recipe": recipe, "dataset": DATASET_NAME, "checkpoint": rarely, **changes}
    )
    assert isinstance(spec, TrainSpec)
    facts = DatasetFacts(
        name=DATASET_NAME,
        classes=data.packed.classes,
        image_size=data.record.image_size,
        splits=data.packed.counts,
    )
    return resolve(spec, facts)


def preprocessing_of(spec: TrainSpec, record: DatasetRecord) -> Preprocessing:
    """By the spec's own channels, else by the dataset's."""
    assert spec.image_size is not None, "the spec is not resolved"
    own = spec.normalize if isinstance(spec.normalize, ChannelsSpec) else None
    red, green, blue = own.mean if own else record.channel_mean
    red_std, green_std, blue_std = own.std if own else record.channel_std
    return Preprocessing(
        image_size=spec.image_size,
        channel_mean=(red, green, blue),
        channel_std=(red_std, green_std, blue_std),
    )


@dataclass(frozen=True)
class Epoch:
    """`seconds` of reading, augmenting and training, without validation and checkpoints."""

    seconds: float
    top1: float


@dataclass
class Stopwatch:
    """A sink that keeps what each epoch took; nothing of training is written anywhere."""

    device: torch.device
    epochs: list[Epoch] = field(default_factory=list)
    on_epoch: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.started = self._resumed = synchronized_time(self.device)
        self._seconds = 0.0

    def metrics(self, values: Mapping[str, float], *, step: int, epoch: int) -> None:
        now = synchronized_time(self.device)
        if "train_loss" in values:
            self._seconds = now - self._resumed
        if "val_top1" in values:
            self.epochs.append(Epoch(self._seconds, values["val_top1"]))
            self._resumed = now
            self.on_epoch()

    def progress(self, progress: Progress) -> None:
        pass

    def event(self, level: str, kind: str, message: str, data: Mapping[str, Any]) -> None:
        pass

    def save_checkpoint(self, checkpoint: TrainingCheckpoint) -> None:
        self._resumed = synchronized_time(self.device)


class FirstStep(Control):
    """Notes when the first step is done: training looks at its control before every batch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_looks = 0
        self.done: float | None = None

    def look(self) -> Request | None:
        self._num_looks += 1
        if self._num_looks == 2:
            self.done = synchronized_time(self._device)
        return super().look()


def prepare(spec: TrainSpec, data: OurData, num_threads: int, num_epochs: int) -> Runtime:
    """How a job would compute the spec, if it had `num_epochs`; it is active from now on.

    Chosen as `worker.jobs.runtime` does, which needs a job for it.
    """
    device = choose_device(spec.resources.device)
    train = data.split("train")
    runtime = Runtime(
        device=device,
        precision="fp32" if spec.precision == "auto" else spec.precision,
        num_threads=num_threads,
        data_path=choose_data_path(train.images.nbytes, torch.device(device)),
        compile=spec.compile is True,
    )
    runtime.activate(deterministic=spec.deterministic)
    wants_compiler = spec.compile == "auto" and device == "cuda"
    if spec.precision == "auto" or wants_compiler:
        rates = _measured_rates(spec, data, runtime)
        if spec.precision == "auto":
            runtime = replace(runtime, precision=max(rates, key=rates.__getitem__))
        rate = rates.get(runtime.precision, max(rates.values()))
        pays = wants_compiler and compile_pays(num_epochs * len(train) / rate)
        runtime = replace(runtime, compile=runtime.compile or pays)
        runtime.activate(deterministic=spec.deterministic)
    return runtime


def _measured_rates(spec: TrainSpec, data: OurData, runtime: Runtime) -> dict[Precision, float]:
    """Images per second by precision."""
    assert spec.image_size is not None, "the spec is not resolved"
    model = initial_model(spec, len(data.packed.classes))
    multiply_adds = summarize(model, spec.image_size).multiply_adds
    cache = data.home / "precision.json"
    speeds = measured_speeds(spec, lambda: model, multiply_adds, runtime, cache)
    return speeds.images_per_second


def initial_model(spec: TrainSpec, num_classes: int) -> nn.Module:
    return new_model(spec, num_classes)


def train(
    spec: TrainSpec,
    model: nn.Module,
    data: tuple[ArrayData, ArrayData],
    preprocessing: Preprocessing,
    runtime: Runtime,
    stopwatch: Stopwatch,
    control: Control | None = None,
) -> None:
    """Trains on the first split and validates on the second, until the end or until `control` asks
    for a release."""
    control = control or Control()
    with suppress(Released):
        fit(spec, model, *data, preprocessing, runtime, stopwatch, control)
