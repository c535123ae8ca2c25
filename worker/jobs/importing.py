"""Takes in a model that another Skipline has exported."""

from __future__ import annotations

from sqlalchemy.orm import Session

from shared import datasets, lifecycle, repository, uploads
from shared.errors import TrainingError
from shared.vision.bundle import write_bundle
from shared.vision.portable import Portable, read_portable
from skipline.schemas import JobStatus
from skipline.specs import ImportSpec, dump_spec
from worker.datasets.disk import full_disk_is_reported
from worker.datasets.layout import check_class_names
from worker.datasets.sources import upload_path
from worker.jobs.context import Context


def take_in(context: Context, spec: ImportSpec) -> None:
    """Makes it the job's one checkpoint, with the report that came with it. Of the upload nothing
    is left then.

    Raises:
        BadModelFile: it is damaged, or none.
        TrainingError: `upload_gone`, `bad_class_name`, `too_many_classes`, `disk_full`.
    """
    portable, weights = read_portable(upload_path(context.settings, spec.upload_id))
    bundle = portable.bundle
    check_class_names(bundle.classes)
    if len(bundle.classes) > context.settings.max_dataset_classes:
        raise TrainingError(
            "too_many_classes",
            f"The model has {len(bundle.classes)} classes; "
            f"{context.settings.max_dataset_classes} are allowed",
            "Raise SKIPLINE_MAX_DATASET_CLASSES",
        )
    key = f"jobs/{context.fence.job_id}/{context.fence.attempt}/{bundle.step}"
    with (
        full_disk_is_reported("a checkpoint"),
        context.storage.writing(key, context.fence.owner) as folder,
    ):
        write_bundle(folder, bundle, weights)
    num_bytes = context.storage.num_bytes(key)

    def register(session: Session) -> None:
        fence = context.fence
        repository.register_checkpoint(
            session,
            fence,
            kinds=["best"],
            key=key,
            epoch=bundle.epoch,
            step=bundle.step,
            metrics=bundle.metrics,
            num_bytes=num_bytes,
        )
        checkpoint = repository.find_model(session, fence.job_id)
        if portable.report is not None:
            report = portable.report.model_copy(update={"checkpoint_id": checkpoint.id})
            repository.add_report(session, fence.job_id, report)
        # A dataset's id says what is in it, so that it may well be here too.
        if datasets.find_dataset(session, bundle.dataset.id) is not None:
            repository.store_dataset_id(session, fence, bundle.dataset.id)
        uploads.forget(session, spec.upload_id)
        result = {
            "checkpoint_id": checkpoint.id,
            "num_classes": len(bundle.classes),
            **_figures(portable),
            "trained": dump_spec(bundle.spec),
        }
        lifecycle.finish(session, fence, JobStatus.succeeded, result=result)

    context.sink.finish(register)
    uploads.remove_files(context.storage.root, spec.upload_id)


def _figures(portable: Portable) -> dict[str, float]:
    report = portable.report
    return {} if report is None else {name: getattr(report, name) for name in ("loss", "top1")}
