"""How what a client asks for becomes a queued job: checked, stored once, announced.

Knows the checks that need stored facts: what models there are, and whether they fit. Those that
need none are in `skipline.specs` and `skipline.catalog`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, Header, Request, Response
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.bodies import JsonDocument
from api.dependencies import Services, SubmitterDep
from shared import datasets, repository, uploads
from shared.archive_kinds import without_suffixes
from shared.dataset_paths import check_dataset_path
from shared.errors import IllegalTransition, ModelNotFound
from shared.repository import Workload
from shared.settings import Settings
from shared.tables import Checkpoint, Job
from skipline import catalog, schemas
from skipline.catalog import BUILTIN_DATASETS, SpecRefused
from skipline.schemas import JobKind, JobStatus
from skipline.specs import (
    IMAGENET_WEIGHTS,
    AnySpec,
    BringInSpec,
    EvaluateSpec,
    ImportSpec,
    IngestSpec,
    PredictSpec,
    TrainSpec,
    load_spec,
)

IDEMPOTENCY_KEY = "Idempotency-Key"


@dataclass(frozen=True)
class Posting:
    """A request for a job: who sends it, and the key by which it is known when it comes again."""

    submitter: str
    key: str | None
    path: str
    query: str
    document: Any = None

    @property
    def request_hash(self) -> str:
        """The same for requests that ask for the same."""
        parts = [self.path, self.query, self.document]
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


async def _posting(
    request: Request,
    submitter: SubmitterDep,
    key: Annotated[
        str | None,
        Header(
            alias=IDEMPOTENCY_KEY,
            min_length=1,
            max_length=255,
            pattern="^[ -~]+$",
            description="Of your choice: a request that comes again with it makes no second job",
        ),
    ] = None,
) -> Posting:
    return Posting(submitter, key, request.url.path, request.url.query)


async def _json_posting(
    posting: Annotated[Posting, Depends(_posting)], document: JsonDocument
) -> Posting:
    return replace(posting, document=document)


PostingDep = Annotated[Posting, Depends(_posting)]
"""Of a request without a body."""
JsonPostingDep = Annotated[Posting, Depends(_json_posting)]


def job_documents(session: Session, jobs: list[Job]) -> list[schemas.Job]:
    """The jobs as clients see them."""
    places = repository.queue_places(session, jobs)
    return [repository.job_document(job, places.get(job.id)) for job in jobs]


def submit(
    posting: Posting,
    store: Callable[[Session], Job],
    services: Services,
    background: BackgroundTasks,
    response: Response,
) -> schemas.Job:
    """Stores a queued job, and rings for a worker once it is stored. A request that comes again
    with its Idempotency-Key is answered with the job that it made.

    Raises:
        AppError, SpecRefused: it cannot work; nothing was stored.
    """
    try:
        document = _submit(posting, store, services)
    except IntegrityError:
        if posting.key is None:
            raise
        # The same request at the same moment was stored first.
        document = _submit(posting, store, services)
    background.add_task(services.bell.ring)
    response.headers["Location"] = f"/jobs/{document.id}"
    return document


def _submit(posting: Posting, store: Callable[[Session], Job], services: Services) -> schemas.Job:
    with services.database.session_scope() as session:
        job = None
        if posting.key is not None:
            job = repository.recall_request(
                session, posting.submitter, posting.key, posting.request_hash
            )
        if job is None:
            services.limits.take_place(session, posting.submitter)
            job = store(session)
            if posting.key is not None:
                repository.remember_request(
                    session, posting.submitter, posting.key, posting.request_hash, job.id
                )
        return job_documents(session, [job])[0]


# -------------------------------------------------------------------------------- what is stored


def store(
    session: Session,
    spec: AnySpec,
    submitter: str,
    settings: Settings,
    kind: JobKind | None = None,
) -> Job:
    """Checks and stores what a client asks for, as a job of the spec's own kind unless told
    otherwise.

    Raises:
        AppError, SpecRefused: it cannot work.
    """
    # Before any checkpoint is locked: transactions of trainers lock in this order, too.
    repository.hold_predecessor(session, spec)
    if isinstance(spec, TrainSpec):
        return _store_training(session, spec, submitter, kind)
    if isinstance(spec, EvaluateSpec):
        return _store_evaluation(session, spec, submitter)
    if isinstance(spec, ImportSpec):
        return _store_import(session, spec, submitter, settings)
    if isinstance(spec, PredictSpec):
        return _store_prediction(session, spec, submitter, settings)
    if spec.upload_id is not None:
        return _store_ingest_of_upload(session, spec, spec.upload_id, submitter, settings)
    if spec.path is not None:
        check_dataset_path(spec.path, settings)
    return repository.add_job(session, spec, submitter=submitter)


def _store_ingest_of_upload(
    session: Session, spec: IngestSpec, upload_id: str, submitter: str, settings: Settings
) -> Job:
    """The dataset is called as the file, unless the spec says how."""
    upload = uploads.hold_for_job(session, settings.artifacts_path, upload_id, submitter)
    if spec.name is None:
        spec = spec.model_copy(update={"name": without_suffixes(upload.file_name) or "dataset"})
    check_name(spec)
    job = repository.add_job(session, spec, submitter=submitter)
    uploads.pin(session, upload, job.id)
    return job


def _store_import(session: Session, spec: ImportSpec, submitter: str, settings: Settings) -> Job:
    check = uploads.check_model_file
    root = settings.artifacts_path
    upload = uploads.hold_for_job(session, root, spec.upload_id, submitter, check)
    job = repository.add_job(session, spec, submitter=submitter)
    uploads.pin(session, upload, job.id)
    return job


def check_name(spec: IngestSpec) -> None:
    """Raises `SpecRefused` for a name that would stand for something else."""
    name = spec.name or without_suffixes(PurePath(spec.path or "").name)
    if spec.source != "builtin" and name in BUILTIN_DATASETS:
        builtin = ", ".join(BUILTIN_DATASETS)
        message = f"{name} is a built-in's name; give another. Built in are: {builtin}"
    elif datasets.LABEL.fullmatch(name):
        message = "A name cannot end like a version: leave the : and the number out"
    else:
        return
    raise SpecRefused([{"loc": "name", "message": message}])


def store_retry(
    session: Session, job_id: str, submitter: str, settings: Settings, *, from_start: bool
) -> Job:
    """Stores a new job that does what a failed or cancelled one should have done. A training goes
    on from its last checkpoint, if it has one, unless `from_start`.

    Raises:
        JobNotFound: there is no such job.
        IllegalTransition: it has neither failed nor been cancelled.
        AppError, SpecRefused: it cannot work any more.
    """
    parent = repository.hold_job(session, job_id)
    if parent.status not in (JobStatus.failed, JobStatus.cancelled):
        raise IllegalTransition(
            f"The job is {parent.status}: only one that has failed or was cancelled is retried"
        )
    spec, kind = load_spec(parent.spec), JobKind(parent.kind)
    if isinstance(spec, BringInSpec):
        job = store(session, spec, submitter, settings)
        job.parent_id = parent.id
        return job
    spec = spec.model_copy(update={"parent_id": parent.id, "after": None})
    goes_on = kind is JobKind.train and not from_start
    if goes_on and repository.list_checkpoints(session, parent.id):
        assert isinstance(spec, TrainSpec)
        job = _store_training(session, spec, submitter, kind, continues=parent)
        repository.inherit(session, job, parent)
        return job
    return store(session, spec, submitter, settings, kind)


def _store_training(
    session: Session,
    spec: TrainSpec,
    submitter: str,
    kind: JobKind | None,
    continues: Job | None = None,
) -> Job:
    """`continues`: the job with whose checkpoints it begins. These belong to one dataset, whatever
    its name stands for now; and with them, the model from which that job started is not needed."""
    dataset = (continues and continues.dataset_id) or spec.dataset
    facts, dataset_id = datasets.dataset_facts(session, dataset, lock=True)
    resolved = catalog.resolve(spec, facts, repository.cluster_facts(session))
    origin = None
    if continues is None and resolved.model.init_from not in (None, IMAGENET_WEIGHTS):
        origin = _origin(session, resolved)
    if origin is not None:
        model = resolved.model.model_copy(update={"init_from": origin.id})
        resolved = resolved.model_copy(update={"model": model})
    return repository.add_job(
        session,
        resolved,
        kind=kind,
        dataset_id=dataset_id,
        checkpoint_id=origin.id if origin else None,
        workload=None if kind is JobKind.dry_run else _training_work(resolved, facts),
        submitter=submitter,
    )


def _store_evaluation(session: Session, spec: EvaluateSpec, submitter: str) -> Job:
    training, checkpoint = _find_model(session, spec.model, spec.after)
    trained = repository.trained_spec(training)
    facts, dataset_id = datasets.dataset_facts(session, spec.dataset, lock=True)
    resolved = catalog.resolve_evaluation(spec, facts, _classes(session, training, trained))
    return repository.add_job(
        session,
        resolved,
        dataset_id=dataset_id,
        checkpoint_id=checkpoint.id if checkpoint else None,
        workload=_evaluation_work(resolved, trained, facts),
        submitter=submitter,
    )


def _classes(session: Session, training: Job, trained: TrainSpec) -> tuple[str, ...] | None:
    """Of the model; None where it was imported and its dataset is not here: the worker reads them
    from the model."""
    if training.kind == JobKind.import_ and training.dataset_id is None:
        return None
    facts, _ = datasets.dataset_facts(session, training.dataset_id or trained.dataset)
    return facts.classes


def _store_prediction(
    session: Session, spec: PredictSpec, submitter: str, settings: Settings
) -> Job:
    training, checkpoint = _find_model(session, spec.model, spec.after)
    facts, dataset_id, upload = None, None, None
    if spec.upload_id is not None:
        upload = uploads.hold_for_job(session, settings.artifacts_path, spec.upload_id, submitter)
    elif spec.dataset is not None:
        facts, dataset_id = datasets.dataset_facts(session, spec.dataset, lock=True)
    catalog.check_prediction(spec, facts)
    trained = repository.trained_spec(training)
    job = repository.add_job(
        session,
        spec,
        dataset_id=dataset_id,
        checkpoint_id=checkpoint.id if checkpoint else None,
        workload=_prediction_work(spec, trained, facts) if facts else None,
        submitter=submitter,
    )
    if upload is not None:
        uploads.pin(session, upload, job.id)
    return job


def _find_model(
    session: Session, reference: str, after: str | None
) -> tuple[Job, Checkpoint | None]:
    """The training that makes a model, and the checkpoint that is meant, kept until the new job is
    over. There is none yet where the new job waits for another and the training is not over: then
    the worker looks for it when the job begins.

    Raises:
        ModelNotFound: neither a checkpoint nor a job.
        NoCheckpointYet: a job that has written none.
    """
    if after is not None:
        job = repository.find_job(session, reference)
        if job and job.kind == JobKind.train and not JobStatus(job.status).is_terminal:
            return job, None
    checkpoint = repository.pin_model(session, reference)
    return repository.get_job(session, checkpoint.job_id), checkpoint


def _origin(session: Session, spec: TrainSpec) -> Checkpoint | None:
    """The checkpoint that `model.init_from` means, as `_find_model` finds it.

    Raises:
        NoCheckpointYet: a job that has written none.
        SpecRefused: there is no such model, or its network is another.
    """
    assert spec.model.init_from is not None
    try:
        training, checkpoint = _find_model(session, spec.model.init_from, spec.after)
    except ModelNotFound as error:
        raise _origin_refused(error.detail, code=error.code) from None
    origin = repository.trained_spec(training)
    if origin.model.arch != spec.model.arch:
        raise _origin_refused(
            f"That model is a {origin.model.arch}; weights of a {spec.model.arch} are needed"
        )
    ours, theirs = _stem(spec), _stem(origin)
    if catalog.ARCHITECTURES[spec.model.arch].has_stems and ours != theirs:
        raise _origin_refused(f"That model has the stem {theirs}, this one {ours}: set model.stem")
    return checkpoint


def _stem(spec: TrainSpec) -> catalog.Stem:
    assert spec.image_size is not None, "the spec is resolved"
    return catalog.resolve_stem(spec.model.stem, spec.image_size)


def _origin_refused(message: str, code: str = "invalid_spec") -> catalog.SpecRefused:
    return catalog.SpecRefused([{"loc": "model.init_from", "message": message}], code=code)


# ------------------------------------------------------------------------------ how long it takes


def _training_work(spec: TrainSpec, facts: catalog.DatasetFacts) -> Workload:
    images_per_epoch = int(facts.splits["train"] * (1 - (spec.val_fraction or 0)))
    if spec.sanity_check:
        images_per_epoch = min(spec.batch_size, images_per_epoch)
    return Workload(_speed_key(spec, spec), spec.epochs * images_per_epoch)


def _evaluation_work(
    spec: EvaluateSpec, trained: TrainSpec, facts: catalog.DatasetFacts
) -> Workload:
    assert spec.split is not None, "the spec is resolved"
    return Workload(_speed_key(spec, trained), facts.splits[spec.split])


def _prediction_work(
    spec: PredictSpec, trained: TrainSpec, facts: catalog.DatasetFacts
) -> Workload:
    splits = [spec.split] if spec.split else list(facts.splits)
    return Workload(_speed_key(spec, trained), sum(facts.splits[split] for split in splits))


def _speed_key(spec: TrainSpec | EvaluateSpec | PredictSpec, network: TrainSpec) -> str:
    """What says most about how fast a job is."""
    where = spec.resources
    arch, size = network.model.arch, network.image_size
    return f"{spec.kind}/{arch}/{size}/{where.device}/{where.num_processes}"
