"""How good a stored checkpoint is on a split of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from sqlalchemy.orm import Session

from shared import datasets, repository
from shared.bundle_files import BUNDLE_FILE
from shared.comparison import Outcomes
from shared.dataset_files import read_index
from shared.errors import CheckpointCorrupt, ModelNotFound, NoCheckpointYet, TrainingError
from shared.tables import Checkpoint, Dataset
from shared.vision.bundle import Bundle, read_bundle
from skipline.catalog import SpecRefused, resolve_evaluation
from skipline.plots import draw_hardest
from skipline.specs import EvaluateSpec
from worker.engine.data import DataPath, FileData, SplitData
from worker.engine.evaluate import Evaluation, evaluate_bundle
from worker.engine.report import Subject, build_report, hardest
from worker.engine.runtime import Runtime
from worker.jobs.context import Context
from worker.jobs.datasets import dataset_of, images_of
from worker.jobs.plan import split_data
from worker.jobs.runtime import evaluation_runtime, num_loaders

HARDEST = "hardest"
"""The picture's name."""
FIGURES = (
    *("checkpoint_id", "dataset_id", "split", "num_samples"),
    *("loss", "top1", "top5", "mean_class_accuracy"),
)
"""Of a report, which a job's result repeats."""


def evaluate(context: Context, spec: EvaluateSpec) -> None:
    """Measures a checkpoint on a split."""
    dataset = dataset_of(context, spec.dataset)
    checkpoint = model_of(context, spec.model)
    bundle, _ = bundle_of(context, checkpoint)
    spec = resolved(context, spec, dataset, bundle)
    images = images_of(context, dataset, bundle.preprocessing.image_size, "auto")
    assert spec.split is not None, "stored specs are resolved"
    data = split_data(images, spec.split, num_loaders(context.settings))
    data_path: DataPath = "files" if isinstance(data, FileData) else "mapped"
    runtime = evaluation_runtime(context, spec, checkpoint, data_path)
    evaluation = evaluation_of(
        context, checkpoint, data, runtime, spec.batch_size, context.show_images
    )
    subject = Subject(
        classes=dataset.classes,
        dataset=dataset.name,
        dataset_id=dataset.id,
        split=spec.split,
        image_at=image_finder(context, dataset, spec.split, data),
        checkpoint_id=checkpoint.id,
    )
    succeed(context, evaluation, subject, data)


def model_of(context: Context, reference: str) -> Checkpoint:
    """The checkpoint that a job works with. One that waited for the job that made it finds it when
    it begins, and keeps to it.

    Raises:
        TrainingError: `model_not_found`, `no_checkpoint_yet`.
    """

    def pin(session: Session) -> Checkpoint:
        checkpoint = repository.pin_model(session, reference)
        repository.store_checkpoint_id(session, context.fence, checkpoint.id)
        return checkpoint

    try:
        if context.job.checkpoint_id is None:
            return context.sink.persist(pin)
        with context.database.read_scope() as session:
            return repository.find_model(session, context.job.checkpoint_id)
    except (ModelNotFound, NoCheckpointYet) as error:
        hint = "Name a training that has succeeded, or one of its checkpoints"
        raise TrainingError(error.code, error.detail, hint) from None


def resolved(
    context: Context, spec: EvaluateSpec, dataset: Dataset, bundle: Bundle
) -> EvaluateSpec:
    """The evaluation of this model on this dataset, both of which a name may have stood for when it
    was stored.

    Raises:
        TrainingError: `invalid_spec`: the split does not exist, or the classes are not the model's.
    """
    with context.database.read_scope() as session:
        facts, _ = datasets.dataset_facts(session, dataset.id)
    try:
        return resolve_evaluation(spec, facts, bundle.classes)
    except SpecRefused as error:
        raise TrainingError(
            error.code, error.items[0]["message"], "Evaluate on the dataset that it was trained on"
        ) from None


def evaluation_of(
    context: Context,
    checkpoint: Checkpoint,
    data: SplitData,
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
        # The hash of the weights is in the bundle's document, and that one's in the manifest.
        return read_bundle(context.storage.verify(checkpoint.key, BUNDLE_FILE))
    except CheckpointCorrupt as error:
        raise TrainingError(
            error.code,
            f"The checkpoint {checkpoint.id} is damaged: {error.detail}",
            "Take another checkpoint of its job, or train again",
        ) from None


def image_finder(
    context: Context, dataset: Dataset, split: str, data: SplitData
) -> Callable[[int], tuple[str, int, str]]:
    """Where an image of `data`, which is made of the stored split, is in the dataset."""
    paths = read_index(context.storage.path(dataset.key)).splits[split].paths

    def image_at(place: int) -> tuple[str, int, str]:
        row = place if data.rows is None else int(data.rows[place])
        return split, row, paths[row]

    return image_at


def succeed(
    context: Context,
    evaluation: Evaluation,
    subject: Subject,
    data: SplitData,
    result: Mapping[str, Any] = MappingProxyType({}),
    stop_reason: str | None = None,
) -> None:
    """Ends the job with the report of an evaluation of `data`, a picture of the hardest images, and
    the report's figures before what else is in `result`."""
    report = build_report(evaluation, subject)
    images = data.read(np.array(hardest(evaluation), dtype=np.int64))
    title = f"{subject.dataset}: the hardest images of {subject.split}"
    png = draw_hardest(images, report.hardest, title)
    figures = {name: getattr(report, name) for name in FIGURES}
    outcomes = outcomes_of(evaluation, subject, data)
    context.succeed({**figures, **result}, report, outcomes, stop_reason, {HARDEST: png})


def outcomes_of(evaluation: Evaluation, subject: Subject, data: SplitData) -> Outcomes:
    """What is kept to compare models by."""
    rows = np.arange(len(data)) if data.rows is None else data.rows
    order = np.argsort(rows)
    stored_split, _, _ = subject.image_at(0)
    columns = (rows, evaluation.labels, evaluation.predicted)
    return Outcomes(stored_split, *(column[order].astype(np.int32) for column in columns))
