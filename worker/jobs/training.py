"""What a training does, and what a dry run does instead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import structlog
import torch
from sqlalchemy.orm import Session

from shared import datasets, repository
from shared.errors import CheckpointCorrupt, SetupError
from shared.tables import Checkpoint, Dataset
from shared.vision.architectures import build_model
from shared.vision.bundle import BundleDataset, read_bundle
from shared.vision.preprocessing import Preprocessing
from shared.vision.summary import summarize
from shared.vision.transfer import freeze
from skipline.catalog import selection_split
from skipline.plots import draw_samples
from skipline.schemas import Summary
from skipline.specs import IMAGENET_WEIGHTS, ChannelsSpec, TrainSpec
from worker.engine.augment import Augmentation
from worker.engine.data import epoch_order
from worker.engine.distributed import ALONE
from worker.engine.report import Subject
from worker.engine.resume import RESUME_FILE, load_resume
from worker.engine.runtime import out_of_memory
from worker.jobs.context import Context, remove_unregistered
from worker.jobs.datasets import dataset_of, images_of
from worker.jobs.evaluation import evaluation_of, image_finder, model_of, succeed
from worker.jobs.plan import Plan, Work, fit_plan, measure_plan
from worker.jobs.ranks import RanksOutOfMemory, run_in_ranks
from worker.jobs.runtime import num_loaders, stored_runtime, training_runtime

T = TypeVar("T")
log = structlog.get_logger(__name__)

SAMPLES = "samples"
NUM_SAMPLES = 32
"""The picture's name, and how many images it shows."""
IMAGENET_CHANNELS = ChannelsSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def train(context: Context, spec: TrainSpec) -> None:
    """Trains, then writes the report of the best checkpoint."""
    plan, summary = plan_of(context, spec)
    plan.prepare(context.sink, context.settings)
    context.sink.persist(lambda session: repository.add_summary(session, context.fence, summary))
    with drawing_samples(context, plan):
        result = carry_out(context, plan, fit_plan)
    # The ranks are gone, and with them the reason to leave cores to others.
    torch.set_num_threads(plan.runtime.num_threads * plan.runtime.num_processes)
    with context.database.read_scope() as session:
        best = repository.find_model(session, context.fence.job_id)
    split = selection_split(spec, plan.images.counts)
    _, val = plan.data()
    evaluation = evaluation_of(context, best, val, plan.runtime, spec.batch_size)
    with context.database.read_scope() as session:
        dataset = datasets.get_dataset(session, plan.dataset.id)
    stored_split = split if spec.val_fraction is None else "train"
    subject = Subject(
        classes=plan.classes,
        dataset=plan.dataset.name,
        dataset_id=plan.dataset.id,
        split=split,
        image_at=image_finder(context, dataset, stored_split, val),
        selected_on=split,
        checkpoint_id=best.id,
    )
    document = {
        "selected_on": split,
        "epoch": best.epoch,
        "step": best.step,
        "num_parameters": summary.num_parameters,
    }
    succeed(context, evaluation, subject, val, document, result.stop_reason)


def dry_run(context: Context, spec: TrainSpec) -> None:
    """Trains for a few steps and says what the whole would take."""
    plan, summary = plan_of(context, spec)
    context.sink.persist(lambda session: repository.add_summary(session, context.fence, summary))
    measurement = carry_out(context, plan, measure_plan)
    context.succeed(
        {
            "num_parameters": summary.num_parameters,
            "multiply_adds": summary.multiply_adds,
            "peak_memory_bytes": measurement.peak_memory_bytes,
            "seconds_per_epoch": measurement.seconds_per_epoch,
            "images_per_second": measurement.images_per_second,
            "checkpoint_bytes": measurement.checkpoint_bytes,
            "accumulate_steps": measurement.accumulate_steps,
            "device": plan.runtime.device,
            "precision": plan.runtime.precision,
            "data_path": plan.runtime.data_path,
        }
    )


def carry_out(context: Context, plan: Plan, work: Work[T]) -> T:
    """Does it in this process, or in as many as the plan says. Where the memory of one of several
    runs out, all begin again from the last checkpoint, with micro-batches of half the size.

    Raises:
        TrainingError: `cuda_out_of_memory`, or what `work` raises.
    """
    if plan.runtime.num_processes == 1:
        return work(plan, context.storage, context.sink, context.control, ALONE)
    while True:
        try:
            return run_in_ranks(plan, work, context.control)
        except RanksOutOfMemory:
            smaller = plan.with_smaller_parts()
            if smaller is None:
                raise out_of_memory() from None
            num_parts = smaller.accumulate_steps
            context.sink.event(
                "warning",
                "micro_batch_halved",
                f"A GPU's memory ran out: each step is made of {num_parts} passes from now on. "
                "The batch stays as it was",
                {"accumulate_steps": num_parts},
            )
            remove_unregistered(context)
            plan = replace(smaller, resume_key=last_key(context, goes_on=True))


def plan_of(context: Context, spec: TrainSpec) -> tuple[Plan, Summary]:
    """All that training needs, made ready: the dataset packed, the runtime chosen and active, the
    checkpoint found to go on from."""
    assert spec.image_size is not None, "stored specs are resolved"
    dataset = dataset_of(context, spec.dataset)
    stored = stored_runtime(context)
    data_path = stored.data_path if stored else spec.data_path
    images = images_of(context, dataset, spec.image_size, data_path)
    summary = network_summary(spec, len(dataset.classes))
    runtime = training_runtime(context, spec, dataset, images, summary, stored)
    resume_key = last_key(context)
    plan = Plan(
        spec=spec,
        fence=context.fence,
        dataset=BundleDataset(name=dataset.name, id=dataset.id, hash=dataset.hash),
        classes=tuple(dataset.classes),
        images=images,
        preprocessing=preprocessing_of(spec, dataset),
        runtime=runtime,
        accumulate_steps=spec.accumulate_steps,
        num_loaders=max(1, num_loaders(context.settings) // runtime.num_processes),
        weights_folder=context.settings.cache_path / "weights",
        resume_key=resume_key,
        init_key=None if resume_key else init_key(context, spec),
    )
    return plan, summary


def network_summary(spec: TrainSpec, num_classes: int) -> Summary:
    """The network layer by layer."""
    assert spec.image_size is not None
    with torch.device("meta"):
        network = build_model(spec.model, num_classes, spec.image_size)
    freeze(network, spec.model.freeze)
    return summarize(network, spec.image_size)


def preprocessing_of(spec: TrainSpec, dataset: Dataset) -> Preprocessing:
    """What `normalize` means for this dataset. One that was stored before the deviations of single
    images were counted has none: the deviation over all pixels stands in."""
    assert spec.image_size is not None
    mean, std = dataset.channel_mean, dataset.channel_std
    if spec.normalize == "image_std":
        std = dataset.channel_image_std or std
    elif spec.normalize == "imagenet":
        mean, std = list(IMAGENET_CHANNELS.mean), list(IMAGENET_CHANNELS.std)
    elif isinstance(spec.normalize, ChannelsSpec):
        mean, std = list(spec.normalize.mean), list(spec.normalize.std)
    return Preprocessing(
        image_size=spec.image_size, channel_mean=tuple(mean), channel_std=tuple(std)
    )


def init_key(context: Context, spec: TrainSpec) -> str | None:
    """Where the checkpoint lies that the job starts from, if it does.

    Raises:
        TrainingError: as `worker.jobs.evaluation.model_of`.
    """
    if spec.model.init_from in (None, IMAGENET_WEIGHTS):
        return None
    assert spec.model.init_from is not None
    return model_of(context, spec.model.init_from).key


def last_key(context: Context, *, goes_on: bool = False) -> str | None:
    """The newest checkpoint that reads well, after everything that came after it was dropped;
    None when training starts afresh. `goes_on`: this attempt itself has trained already."""
    with context.database.read_scope() as session:
        rows = repository.list_checkpoints(session, context.fence.job_id)
    if rows and not any(context.storage.path(row.key).exists() for row in rows):
        # Not damaged, but elsewhere: to start afresh would throw them away.
        raise SetupError(
            "None of the job's checkpoints is in this worker's storage: SKIPLINE_ARTIFACTS_URL "
            "must name the same folder for all processes"
        )
    chosen = None
    for row in {row.key: row for row in rows}.values():
        try:
            folder = context.storage.verify(row.key)
            read_bundle(folder)
            load_resume(folder / RESUME_FILE)
            chosen = row
            break
        except CheckpointCorrupt as error:
            message = f"The checkpoint at step {row.step} is damaged: going back to one before"
            data = {"checkpoint_id": row.id, "detail": error.detail}
            context.sink.event("warning", "checkpoint_corrupt", message, data)
    if rows or goes_on or context.fence.attempt > 1:
        drop_later(context, chosen)
    return chosen.key if chosen else None


def drop_later(context: Context, chosen: Checkpoint | None) -> None:
    """Points and checkpoints after the one that training goes on from are written anew."""
    step, epoch, last_point = (
        (chosen.step, chosen.epoch, chosen.last_point) if chosen else (0, 0, 0)
    )
    last_step = chosen.step if chosen else -1  # A run that never took a step has one at step 0.

    def drop(session: Session) -> list[str]:
        repository.rewind(session, context.fence, last_point=last_point, step=step, epoch=epoch)
        return repository.forget_checkpoints_after(session, context.fence, last_step)

    for key in context.sink.persist(drop):
        context.storage.delete(key)


@contextmanager
def drawing_samples(context: Context, plan: Plan) -> Iterator[None]:
    """Draws a grid of training images beside the training, which does not wait for it, unless an
    attempt before has drawn it."""
    job_id = context.fence.job_id
    with context.database.read_scope() as session:
        is_drawn = repository.has_picture(session, job_id, SAMPLES)
    if is_drawn:
        yield
        return

    def draw() -> None:
        try:
            png = samples_png(plan)
            context.sink.persist(
                lambda session: repository.add_picture(session, context.fence, SAMPLES, png)
            )
        except Exception as error:  # A training is worth more than its picture.
            log.warning("no samples were drawn", error=type(error).__name__)

    thread = threading.Thread(target=draw, name="samples", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def samples_png(plan: Plan) -> bytes:
    """The images that the first epoch begins with, as it sees them, but for mixing."""
    train, _ = plan.data()
    seed, num_samples = plan.spec.seed, len(train)
    samples = epoch_order(seed, 1, num_samples)[:NUM_SAMPLES]
    augment = Augmentation(
        plan.spec.augment, plan.preprocessing.image_size, plan.preprocessing.channel_mean
    )
    draws = augment.draw(seed, 1, num_samples)[torch.from_numpy(samples)]
    images = augment(torch.from_numpy(train.read(samples)), draws)
    rows = samples if train.rows is None else train.rows[samples]
    labels = [plan.classes[label] for label in train.labels[rows].tolist()]
    return draw_samples(images.numpy(), labels, f"{plan.dataset.name}: the first images")
