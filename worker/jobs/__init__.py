"""What each kind of job does: glue between datasets, engine, storage and database."""

from __future__ import annotations

from skipline.schemas import JobKind
from skipline.specs import EvaluateSpec, ImportSpec, IngestSpec, PredictSpec, TrainSpec
from worker.jobs.context import Context, remove_unregistered
from worker.jobs.datasets import bring_in
from worker.jobs.evaluation import evaluate
from worker.jobs.importing import take_in
from worker.jobs.prediction import predict
from worker.jobs.training import dry_run, train

__all__ = ["Context", "run"]


def run(context: Context) -> None:
    """Does the job and finishes it.

    Raises:
        Superseded: another attempt owns the job.
        Cancelled, Released, worker.datasets.locks.Interrupted: it was asked to end.
        TrainingError, AppError: it cannot be done.
    """
    context.control.was_stopped = context.job.stop_requested
    remove_unregistered(context)
    match context.spec:
        case TrainSpec() as spec if context.job.kind == JobKind.dry_run:
            dry_run(context, spec)
        case TrainSpec() as spec:
            train(context, spec)
        case EvaluateSpec() as spec:
            evaluate(context, spec)
        case PredictSpec() as spec:
            predict(context, spec)
        case ImportSpec() as spec:
            take_in(context, spec)
        case IngestSpec() as spec:
            bring_in(context, spec)
