"""How a job computes: chosen at its first attempt, kept by the ones to come."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from shared import repository
from shared.settings import Settings, num_cores
from shared.tables import Checkpoint, Dataset
from skipline.schemas import Summary
from skipline.specs import EvaluateSpec, PredictSpec, TrainSpec
from worker.datasets.packing import PackedDataset
from worker.engine.data import DataPath, choose_data_path
from worker.engine.runtime import (
    Device,
    Precision,
    Runtime,
    check_precision,
    choose_device,
    typed_failures,
)
from worker.engine.trainer import new_model
from worker.jobs.context import Context
from worker.jobs.plan import Images
from worker.jobs.precision import compile_pays, measured_speeds

CPU_NICENESS = 5
"""Training on the CPU gives way to the service that shares it."""


def num_loaders(settings: Settings) -> int:
    """Processes that decode the images of a dataset that is not packed."""
    return settings.loader_processes or num_cores()


def stored_runtime(context: Context) -> Runtime | None:
    """What an attempt before chose, unless its device is not there any more."""
    if context.job.runtime is None:
        return None
    runtime = Runtime(**context.job.runtime)
    if runtime.device == "cuda" and torch.cuda.device_count() < runtime.num_processes:
        context.sink.event(
            "warning", "device_changed", "Goes on without the GPUs that it began on", {}
        )
        return None
    return runtime


def training_runtime(
    context: Context,
    spec: TrainSpec,
    dataset: Dataset,
    images: Images,
    summary: Summary,
    stored: Runtime | None,
) -> Runtime:
    """The runtime of a training, active, and told in an event.

    Raises:
        TrainingError: `device_not_available`, `not_enough_gpus`, `precision_not_supported`.
    """
    runtime = stored or _chosen(context, spec, dataset, images, summary)
    _activate(context, runtime, spec.deterministic)
    if runtime != stored:
        _tell(context, runtime)
    return runtime


def evaluation_runtime(
    context: Context, spec: EvaluateSpec, checkpoint: Checkpoint, data_path: DataPath
) -> Runtime:
    """The runtime of an evaluation, active: in the precision that the model was trained in, as far
    as the device has it.

    Raises:
        TrainingError: `device_not_available`.
    """
    device = choose_device(_device(context, spec.resources.device))
    with context.database.read_scope() as session:
        trained = repository.get_job(session, checkpoint.job_id).runtime or {}
    precision: Precision = trained.get("precision", "fp32")
    if device == "cpu" and precision in ("tf32", "fp16"):
        precision = "fp32"
    runtime = Runtime(device, precision, torch.get_num_threads(), data_path)
    _activate(context, runtime, deterministic=False)
    _tell(context, runtime)
    return runtime


def prediction_runtime(context: Context, spec: PredictSpec) -> Runtime:
    """The runtime of a batch prediction, active: in the precision that clients are answered in.

    Raises:
        TrainingError: `device_not_available`.
    """
    device = choose_device(_device(context, spec.resources.device))
    runtime = Runtime(device, "fp32", torch.get_num_threads(), "files")
    _activate(context, runtime, deterministic=False)
    _tell(context, runtime)
    return runtime


def _device(
    context: Context, device: Literal["auto", "cpu", "cuda"]
) -> Literal["auto", "cpu", "cuda"]:
    """What the operator wants, where the job does not mind."""
    return context.settings.device if device == "auto" else device


def _chosen(
    context: Context, spec: TrainSpec, dataset: Dataset, images: Images, summary: Summary
) -> Runtime:
    num_processes = spec.resources.num_processes
    device = choose_device(_device(context, spec.resources.device), num_processes)
    runtime = Runtime(
        device=device,
        precision="fp32" if spec.precision == "auto" else spec.precision,
        num_threads=max(1, torch.get_num_threads() // num_processes),
        data_path=_data_path(context.settings, spec, images, device),
        compile=spec.compile is True,
        num_processes=num_processes,
    )
    check_precision(runtime.precision, device)
    wants_compiler = spec.compile == "auto" and device == "cuda" and _has_compiler()
    if spec.precision != "auto" and not wants_compiler:
        return runtime
    runtime.activate(deterministic=spec.deterministic)
    with typed_failures():
        speeds = measured_speeds(
            spec,
            lambda: new_model(spec, len(dataset.classes)),
            summary.multiply_adds,
            runtime,
            context.settings.cache_path / "precision.json",
            context.control.check,
        )
    precision = speeds.fastest if spec.precision == "auto" else runtime.precision
    listed = ", ".join(f"{name} {rate:,.0f}" for name, rate in speeds.images_per_second.items())
    context.sink.event(
        "info",
        "precision_measured",
        f"Images per second of training steps {'now' if speeds.is_new else 'as measured before'}: "
        f"{listed}. It trains in {precision}"
        f"{'' if speeds.is_kept else '. The machine was busy: the next job measures again'}",
        {"images_per_second": speeds.images_per_second, "is_new": speeds.is_new},
    )
    rate = speeds.images_per_second.get(precision, max(speeds.images_per_second.values()))
    num_images = spec.batch_size if spec.sanity_check else dataset.splits["train"]["num_images"]
    seconds = spec.epochs * num_images / rate
    if spec.time_budget_seconds is not None:
        seconds = min(seconds, spec.time_budget_seconds)
    return replace(
        runtime,
        precision=precision,
        compile=runtime.compile or (wants_compiler and compile_pays(seconds)),
    )


def _has_compiler() -> bool:
    """Whether torch can compile for a GPU here: it calls Triton and a C compiler."""
    has_triton = importlib.util.find_spec("triton") is not None
    return has_triton and shutil.which(os.environ.get("CC", "cc")) is not None


def _data_path(settings: Settings, spec: TrainSpec, images: Images, device: Device) -> DataPath:
    if not isinstance(images, PackedDataset):
        return "files"
    if spec.data_path != "auto":
        return spec.data_path
    num_bytes = sum(images.counts.values()) * images.image_size**2 * 3
    return choose_data_path(num_bytes, torch.device(device), settings.gpu_data_share)


def _activate(context: Context, runtime: Runtime, deterministic: bool) -> None:
    # Where torch's compiler keeps what it made, so that the next job of a kind finds it.
    folder: Path = context.settings.cache_path / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    runtime.activate(deterministic=deterministic)
    if runtime.device == "cpu":
        os.nice(CPU_NICENESS)


def _tell(context: Context, runtime: Runtime) -> None:
    document = runtime.to_json()
    context.sink.persist(lambda session: repository.store_runtime(session, context.fence, document))
    processes = f", {runtime.num_processes} processes" if runtime.num_processes > 1 else ""
    message = (
        f"Runs on {runtime.device} in {runtime.precision}, {runtime.num_threads} threads"
        f"{processes}; images are {runtime.data_path}"
        f"{'; compiled' if runtime.compile else ''}"
    )
    context.sink.event("info", "runtime", message, document)
