"""What each kind of job does: glue between datasets, engine, storage and database."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sqlalchemy.orm import Session

from shared import lifecycle, repository
from shared.database import Database
from shared.errors import CheckpointCorrupt, SetupError, TrainingError
from shared.lifecycle import Fence
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Checkpoint, Dataset, Job
from shared.vision.bundle import Bundle, BundleDataset, read_bundle
from shared.vision.preprocessing import Preprocessing
from skipline.catalog import BUILTIN_DATASETS, selection_split
from skipline.schemas import JobStatus, Progress, Report
from skipline.specs import AnySpec, EvaluateSpec, IngestSpec, TrainSpec
from worker.datasets.ingest import DatasetRecord, ingest
from worker.datasets.packing import PackedDataset, pack
from worker.datasets.sources import dataset_name, open_source
from worker.datasets.splits import split_train
from worker.engine.data import ArrayData
from worker.engine.evaluate import Evaluation, build_report, evaluate_bundle
from worker.engine.events import Control, TrainingCheckpoint
from worker.engine.resume import RESUME_FILE, load_resume
from worker.engine.runtime import Runtime, choose_runtime
from worker.engine.trainer import Resume, fit, new_model
from worker.sink import DatabaseSink

CPU_NICENESS = 5
"""Training on the CPU gives way to the service that shares it."""


@dataclass(frozen=True)
class Context:
    """An attempt at a job, and all it works with."""

    settings: Settings
    database: Database
    storage: Storage
    fence: Fence
    control: Control
    sink: DatabaseSink
    job: Job
    spec: AnySpec

    def should_stop(self) -> bool:
        return self.control.request is not None

    def show_images(self, done: int, total: int | None) -> None:
        """Progress of a job whose steps are images."""
        self.sink.progress(Progress(step=done, num_steps=total or done, epoch=1, num_epochs=1))


def run(context: Context) -> None:
    """Does the job and finishes it.

    Raises:
        Superseded: another attempt owns the job.
        Cancelled, Released, worker.datasets.locks.Interrupted: it was asked to end.
        TrainingError, AppError: it cannot be done.
    """
    remove_unregistered(context)
    match context.spec:
        case TrainSpec() as spec:
            train(context, spec)
        case EvaluateSpec() as spec:
            evaluate(context, spec)
        case IngestSpec() as spec:
            bring_in(context, spec)


def remove_unregistered(context: Context) -> None:
    """Deletes what an attempt before wrote and did not come to register."""
    job_id = context.fence.job_id
    with context.database.read_scope() as session:
        registered = repository.registered_keys(session, job_id)
    for prefix in (f"jobs/{job_id}", f"datasets/{job_id}"):
        for key in context.storage.keys(prefix):
            if key not in registered:
                context.storage.delete(key)


# --------------------------------------------------------------------------------------- training


def train(context: Context, spec: TrainSpec) -> None:
    """Trains, then writes the report of the best checkpoint."""
    dataset = dataset_of(context, spec.dataset)
    assert spec.image_size is not None, "stored specs are resolved"
    packed = packed_dataset(context, dataset, spec.image_size)
    train_data, val_data = training_data(packed, spec)
    preprocessing = Preprocessing(
        image_size=spec.image_size,
        channel_mean=tuple(dataset.channel_mean),
        channel_std=tuple(dataset.channel_std),
    )
    runtime = activated_runtime(context, spec.precision, spec.resources.device, spec.deterministic)

    def describe(checkpoint: TrainingCheckpoint) -> Bundle:
        return Bundle(
            spec=spec,
            classes=tuple(dataset.classes),
            preprocessing=preprocessing,
            dataset=BundleDataset(name=dataset.name, id=dataset.id, hash=dataset.hash),
            epoch=checkpoint.epoch,
            step=checkpoint.step,
            metrics=dict(checkpoint.metrics),
        )

    context.sink.describe = describe
    context.sink.keep = spec.checkpoint
    resume = last_state(context)
    model = new_model(spec, len(dataset.classes))
    fit(
        spec,
        model,
        train_data,
        val_data,
        preprocessing,
        runtime,
        context.sink,
        context.control,
        resume,
    )
    with context.database.read_scope() as session:
        best = repository.find_model(session, context.fence.job_id)
    split = selection_split(spec, dataset.splits)
    evaluation = evaluation_of(context, best, val_data, runtime, spec.batch_size)
    report = build_report(
        evaluation,
        dataset.classes,
        dataset=dataset.name,
        dataset_id=dataset.id,
        split=split,
        selected_on=split,
        checkpoint_id=best.id,
    )
    result = {
        **result_of(report),
        "selected_on": report.selected_on,
        "epoch": best.epoch,
        "step": best.step,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    succeed(context, result, report)


def training_data(packed: PackedDataset, spec: TrainSpec) -> tuple[ArrayData, ArrayData]:
    """The images to train on and those that select the best checkpoint."""
    images, labels = packed.split("train")
    if spec.val_fraction is None:
        return ArrayData(images, labels), ArrayData(
            *packed.split(selection_split(spec, packed.counts))
        )
    train_rows, val_rows = split_train(labels, spec.val_fraction, spec.seed)
    if not len(val_rows):
        raise TrainingError(
            "val_fraction_too_large",
            "Every class has a single image, so none can be held out",
            "Add images to the dataset, or a split val",
        )
    return ArrayData(images, labels, train_rows), ArrayData(images, labels, val_rows)


def activated_runtime(
    context: Context, precision: Any, device: Any, deterministic: bool
) -> Runtime:
    """How this job computes: as its first attempt chose, as far as this machine can."""
    if device == "auto":
        device = context.settings.device
    chosen = choose_runtime(precision, device, torch.get_num_threads())
    stored = context.job.runtime
    if stored is not None:
        earlier = Runtime(**stored)
        if earlier.device != "cuda" or torch.cuda.is_available():
            chosen = earlier
        else:
            context.sink.event(
                "warning", "device_changed", "Goes on without the GPU that it began on", {}
            )
    chosen.activate(deterministic=deterministic)
    if chosen.device == "cpu":
        os.nice(CPU_NICENESS)
    document = chosen.to_json()
    if document != stored:
        context.sink.persist(
            lambda session: repository.store_runtime(session, context.fence, document)
        )
        message = f"Runs on {chosen.device} in {chosen.precision}, {chosen.num_threads} threads"
        context.sink.event("info", "runtime", message, document)
    return chosen


def last_state(context: Context) -> Resume | None:
    """The newest checkpoint that reads well, after everything that came after it was dropped;
    None when training starts afresh."""
    with context.database.read_scope() as session:
        rows = repository.list_checkpoints(session, context.fence.job_id)
    if rows and not any(context.storage.path(row.key).exists() for row in rows):
        # Not damaged, but elsewhere: to start afresh would throw them away.
        raise SetupError(
            "None of the job's checkpoints is in this worker's storage: SKIPLINE_ARTIFACTS_URL "
            "must name the same folder for all processes"
        )
    chosen, resume = None, None
    for row in {row.key: row for row in rows}.values():
        try:
            folder = context.storage.verify(row.key)
            _, weights = read_bundle(folder)
            chosen, resume = row, Resume(weights, load_resume(folder / RESUME_FILE))
            break
        except CheckpointCorrupt as error:
            message = f"The checkpoint at step {row.step} is damaged: going back to one before"
            data = {"checkpoint_id": row.id, "detail": error.detail}
            context.sink.event("warning", "checkpoint_corrupt", message, data)
    if context.fence.attempt > 1:
        drop_later(context, chosen)
    return resume


def drop_later(context: Context, chosen: Checkpoint | None) -> None:
    """Points and checkpoints after the one that training goes on from are written anew."""
    step, epoch, last_point = (
        (chosen.step, chosen.epoch, chosen.last_point) if chosen else (0, 0, 0)
    )

    def drop(session: Session) -> list[str]:
        repository.rewind(session, context.fence, last_point=last_point, step=step, epoch=epoch)
        return repository.forget_checkpoints_after(session, context.fence, step)

    for key in context.sink.persist(drop):
        context.storage.delete(key)


# ------------------------------------------------------------------------------------- evaluation


def evaluate(context: Context, spec: EvaluateSpec) -> None:
    """Measures a checkpoint on a split."""
    dataset = dataset_of(context, spec.dataset)
    with context.database.read_scope() as session:
        checkpoint = repository.find_model(session, context.job.checkpoint_id or spec.model)
    bundle, _ = bundle_of(context, checkpoint)
    packed = packed_dataset(context, dataset, bundle.preprocessing.image_size)
    assert spec.split is not None, "stored specs are resolved"
    data = ArrayData(*packed.split(spec.split))
    runtime = activated_runtime(context, bundle.spec.precision, spec.resources.device, False)
    evaluation = evaluation_of(
        context, checkpoint, data, runtime, spec.batch_size, context.show_images
    )
    report = build_report(
        evaluation,
        dataset.classes,
        dataset=dataset.name,
        dataset_id=dataset.id,
        split=spec.split,
        checkpoint_id=checkpoint.id,
    )
    succeed(context, result_of(report), report)


def evaluation_of(
    context: Context,
    checkpoint: Checkpoint,
    data: ArrayData,
    runtime: Runtime,
    batch_size: int,
    show: Callable[[int, int | None], None] = lambda done, total: None,
) -> Evaluation:
    """What the stored checkpoint, not a model in memory, says of these images; `show` is told how
    many are done."""
    bundle, weights = bundle_of(context, checkpoint)

    def before_batch(done: int, total: int) -> None:
        context.control.check()
        show(done * batch_size, len(data))

    evaluation = evaluate_bundle(
        bundle, weights, data, runtime, batch_size=batch_size, before_batch=before_batch
    )
    show(len(data), len(data))
    return evaluation


def bundle_of(context: Context, checkpoint: Checkpoint) -> tuple[Bundle, dict[str, torch.Tensor]]:
    """Raises `TrainingError` `checkpoint_corrupt`."""
    try:
        return read_bundle(context.storage.path(checkpoint.key))
    except CheckpointCorrupt as error:
        raise TrainingError(
            error.code,
            f"The checkpoint {checkpoint.id} is damaged: {error.detail}",
            "Evaluate another checkpoint of its job, or train again",
        ) from None


def result_of(report: Report) -> dict[str, Any]:
    """The figures of a report that a job's result repeats."""
    return {
        "checkpoint_id": report.checkpoint_id,
        "dataset_id": report.dataset_id,
        "split": report.split,
        "num_samples": report.num_samples,
        "loss": report.loss,
        "top1": report.top1,
        "top5": report.top5,
        "mean_class_accuracy": report.mean_class_accuracy,
    }


# --------------------------------------------------------------------------------------- datasets


def bring_in(context: Context, spec: IngestSpec) -> None:
    """Ingests a dataset."""

    def and_finish(session: Session, dataset: Dataset) -> None:
        result = {
            "dataset_id": dataset.id,
            "name": dataset.name,
            "num_images": sum(split["num_images"] for split in dataset.splits.values()),
            "num_problems": len(dataset.problems),
        }
        lifecycle.finish(session, context.fence, JobStatus.succeeded, result=result)

    store_dataset(context, spec, and_finish)


def dataset_of(context: Context, reference: str) -> Dataset:
    """The job's dataset; a built-in is brought in when it is first used."""
    with context.database.read_scope() as session:
        dataset = repository.find_dataset(session, context.job.dataset_id or reference)
    if dataset is None:
        if reference not in BUILTIN_DATASETS:
            raise TrainingError(
                "dataset_gone", f"The dataset {reference} is not there any more", "Add it again"
            )
        dataset = store_dataset(context, IngestSpec(source="builtin", name=reference))
    if context.job.dataset_id is None:
        dataset_id = dataset.id
        context.sink.persist(
            lambda session: repository.store_dataset_id(session, context.fence, dataset_id)
        )
    return dataset


def store_dataset(
    context: Context,
    spec: IngestSpec,
    and_then: Callable[[Session, Dataset], None] = lambda session, dataset: None,
) -> Dataset:
    """Writes a dataset's files and its row; one that is there already is found by its hash."""
    key = f"datasets/{context.fence.job_id}/{context.fence.attempt}"
    source = open_source(spec, context.settings)
    with context.storage.writing(key, context.fence.owner) as folder:
        record = ingest(
            source,
            dataset_name(spec),
            spec.val_fraction,
            spec.seed,
            folder,
            context.settings,
            context.show_images,
            context.should_stop,
        )
    num_bytes = context.storage.num_bytes(key)

    def register(session: Session) -> Dataset:
        repository.check_fence(session, context.fence)
        dataset = repository.add_dataset(
            session, key=key, num_bytes=num_bytes, **dataset_columns(record)
        )
        if not context.storage.path(dataset.key).exists():
            dataset.key = key
        and_then(session, dataset)
        return dataset

    dataset = context.sink.finish(register)
    if dataset.key != key:
        context.storage.delete(key)
    return dataset


def dataset_columns(record: DatasetRecord) -> dict[str, Any]:
    """The record as the columns of its row."""
    columns = {name: getattr(record, name) for name in ("id", "name", "hash", "classes")}
    return columns | {
        "splits": {name: split.model_dump() for name, split in record.splits.items()},
        "image_size": record.image_size,
        "channel_mean": record.channel_mean,
        "channel_std": record.channel_std,
        "problems": [problem.model_dump() for problem in record.problems],
    }


def packed_dataset(context: Context, dataset: Dataset, image_size: int) -> PackedDataset:
    """The dataset's images as arrays, made once for each size."""
    return pack(
        context.storage.path(dataset.key),
        image_size,
        context.settings.cache_path / "packed",
        dataset.hash,
        max_pixels=context.settings.max_image_pixels,
        num_threads=torch.get_num_threads(),
        progress=context.show_images,
        should_stop=context.should_stop,
    )


# -------------------------------------------------------------------------------------------- end


def succeed(context: Context, result: dict[str, Any], report: Report) -> None:
    """Report, result and status become visible together."""

    def write(session: Session) -> None:
        repository.add_report(session, context.fence.job_id, report)
        lifecycle.finish(session, context.fence, JobStatus.succeeded, result=result)

    context.sink.finish(write)
