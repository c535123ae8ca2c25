"""What becomes of a job that is asked to end early, in each state of its work, and of what the
attempt after it finds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from shared import datasets, repository
from shared.comparison import Outcomes
from shared.dataset_files import read_index
from shared.errors import TrainingError
from shared.lifecycle import Action
from shared.tables import Job
from skipline.schemas import JobKind, JobStatus
from tests.worker.jobs.conftest import (
    LOOKS_PER_EPOCH,
    NUM_TEST,
    NUM_TRAIN,
    STEPS_PER_EPOCH,
    Shop,
    Supervised,
    squares,
)
from worker.datasets.cache import packed_path

# Stop


def assert_stopped(shop: Shop, job: Job, step: int) -> None:
    """It has succeeded with a result and a report of weights after `step` steps at most."""
    assert job.status == JobStatus.succeeded, job.error
    assert job.stop_reason == "user"
    assert job.result is not None
    assert shop.checkpoints(job.id)[-1].step == step
    assert shop.report(job.id).num_samples == 2 * NUM_TEST
    assert job.result["top1"] == shop.report(job.id).top1


@pytest.mark.parametrize(
    ("look", "step"),
    [(1, 0), (3, 2), (LOOKS_PER_EPOCH - 1, 6), (LOOKS_PER_EPOCH + 3, 8)],
    ids=["before the first step", "in the first epoch", "validating", "in the second epoch"],
)
def test_a_stopped_training_has_a_result(shop: Shop, look: int, step: int) -> None:
    job = shop.attempt(shop.train(), Supervised({look: "stop"}))
    assert_stopped(shop, job, step)
    assert shop.curve(job.id, "val_loss")[-1][0] == step


def test_a_stop_in_the_report_changes_nothing_but_the_reason(shop: Shop) -> None:
    job = shop.attempt(shop.train(epochs=2), Supervised({2 * LOOKS_PER_EPOCH + 2: "stop"}))
    assert_stopped(shop, job, 2 * STEPS_PER_EPOCH)


def test_after_a_crash_a_stopped_training_does_no_more_steps(shop: Shop) -> None:
    job_id = shop.train(epochs=9)
    first = shop.attempt(
        job_id,
        Supervised({2 * LOOKS_PER_EPOCH + 3: "stop"}, crash_at=2 * LOOKS_PER_EPOCH + 4),
    )
    assert (first.status, first.stop_requested) == (JobStatus.queued, True)
    control = Supervised()
    second = shop.attempt(job_id, control)
    assert second.attempt == 2
    assert_stopped(shop, second, 2 * STEPS_PER_EPOCH)
    assert [step for step, _ in shop.curve(job_id, "val_loss")] == [6, 12]


def test_a_stopped_training_that_is_released_only_writes_its_report_elsewhere(shop: Shop) -> None:
    job_id = shop.train(epochs=9)
    first = shop.attempt(job_id, Supervised({3: "stop", 5: "release"}))
    assert first.status == JobStatus.queued
    assert [(row.step, row.metrics) for row in shop.checkpoints(job_id)] == [(2, {})]
    second = shop.attempt(job_id)
    assert_stopped(shop, second, 2)
    twin = shop.attempt(shop.train(epochs=9), Supervised({3: "stop"}))
    assert shop.last_weights(job_id) == shop.last_weights(twin.id)
    assert second.result is not None
    assert twin.result is not None
    assert second.result["loss"] == twin.result["loss"]


def test_a_stopped_training_can_still_be_cancelled(shop: Shop) -> None:
    job = shop.attempt(shop.train(), Supervised({3: "stop", 5: "cancel"}))
    assert (job.status, job.result) == (JobStatus.cancelled, None)


# Pause, release and cancel


def test_a_paused_training_goes_on_to_the_bits_of_one_that_was_not(shop: Shop) -> None:
    job_id = shop.train()
    paused = shop.attempt(job_id, Supervised({LOOKS_PER_EPOCH + 4: "pause"}))
    assert paused.status == JobStatus.paused
    shop.ask(job_id, "resume")
    assert shop.attempt(job_id).status == JobStatus.succeeded
    twin = shop.train()
    shop.attempt(twin)
    assert shop.last_weights(job_id) == shop.last_weights(twin)
    for name in ("train_loss", "val_loss"):
        assert shop.curve(job_id, name) == shop.curve(twin, name)


LEAVES: dict[Action, JobStatus] = {"cancel": JobStatus.cancelled, "pause": JobStatus.paused}


@pytest.mark.parametrize("action", LEAVES)
@pytest.mark.parametrize("kind", ["ingest", "evaluate", "predict", "dry_run", "packing"])
def test_every_kind_of_job_is_left_at_its_next_batch(
    shop: Shop, tmp_path: Path, kind: str, action: Action
) -> None:
    if kind == "evaluate":
        model = shop.train(epochs=1)
        shop.attempt(model)
        job_id = shop.evaluate(model)
    elif kind == "predict":
        model = shop.train(epochs=1)
        shop.attempt(model)
        job_id = shop.predict(model, dataset="squares")
    elif kind == "dry_run":
        shop.attempt(shop.train(epochs=1))  # packs the dataset
        job_id = shop.train(JobKind.dry_run)
    elif kind == "packing":
        shutil.rmtree(packed_path(shop.settings))
        job_id = shop.train()
    else:
        job_id = shop.ingest(squares(tmp_path / "others", ("a", "b")), "others")
    control = Supervised({1: action})
    job = shop.attempt(job_id, control)
    assert job.status == LEAVES[action]
    assert control.num_looks <= 3  # at once, not after all batches
    if action == "pause":
        shop.ask(job_id, "resume")
        assert shop.attempt(job_id).status == JobStatus.succeeded


def test_a_stop_is_no_reason_to_leave_packing(shop: Shop) -> None:
    shutil.rmtree(packed_path(shop.settings))
    job = shop.attempt(shop.train(), Supervised({1: "stop"}))
    assert_stopped(shop, job, 0)


# Retries


@pytest.mark.parametrize("way", ["cancelled", "failed"])
def test_a_retry_ends_with_the_bits_of_a_training_that_was_never_interrupted(
    shop: Shop, way: str
) -> None:
    parent = shop.train()
    # In the third epoch, so that the best checkpoint may be the parent's.
    look = 2 * LOOKS_PER_EPOCH + 3
    if way == "cancelled":
        assert shop.attempt(parent, Supervised({look: "cancel"})).status == JobStatus.cancelled
    else:
        assert shop.attempt(parent, failing_at(look)).status == JobStatus.failed
    last = {row.kind: row for row in shop.checkpoints(parent)}["last"]
    job_id = shop.retry(parent)
    job = shop.attempt(job_id)
    assert job.status == JobStatus.succeeded, job.error
    assert job.parent_id == parent
    twin = shop.train()
    shop.attempt(twin)
    assert last.step == 2 * STEPS_PER_EPOCH
    assert shop.last_weights(job_id) == shop.last_weights(twin)
    for name in ("train_loss", "val_loss", "lr"):
        assert shop.curve(job_id, name) == shop.curve(twin, name)
    one, other = (shop.job(own).result or {} for own in (job_id, twin))
    for name in ("epoch", "step", "loss", "top1"):
        assert one[name] == other[name]


def failing_at(look: int) -> Supervised:
    """Lets a job fail at this look."""

    def before(now: int) -> None:
        if now == look:
            raise TrainingError("nan_loss", "The loss is nan", "Lower optimizer.lr")

    return Supervised(before=before)


def test_a_parents_checkpoint_can_stay_the_best_of_its_retry(shop: Shop) -> None:
    parent = shop.train()
    shop.attempt(parent, Supervised({LOOKS_PER_EPOCH + 2: "cancel"}))
    best = {row.kind: row for row in shop.checkpoints(parent)}["best"]
    job_id = shop.retry(parent)
    # A stop before the first step: nothing can be better than what the parent left.
    job = shop.attempt(job_id, Supervised({1: "stop"}))
    assert job.result is not None
    assert (job.result["step"], job.stop_reason) == (best.step, "user")
    own = {row.kind: row for row in shop.checkpoints(job_id)}
    assert own["best"].key == best.key
    assert job.result["checkpoint_id"] == own["best"].id


def damage(shop: Shop, key: str) -> None:
    (shop.storage.path(key) / "resume.pt").write_bytes(b"damaged")


def test_a_retry_goes_back_before_a_damaged_checkpoint_of_its_parent(shop: Shop) -> None:
    keys: dict[str, Any] = {"checkpoint": {"keep_last": 2}}
    parent = shop.train(**keys)
    shop.attempt(parent, Supervised({2 * LOOKS_PER_EPOCH + 3: "cancel"}))
    newest = shop.checkpoints(parent)[-1]
    assert newest.step == 2 * STEPS_PER_EPOCH
    damage(shop, newest.key)
    job_id = shop.retry(parent)
    assert shop.attempt(job_id).status == JobStatus.succeeded
    assert "checkpoint_corrupt" in shop.events(job_id)
    twin = shop.train(**keys)
    shop.attempt(twin)
    assert shop.last_weights(job_id) == shop.last_weights(twin)
    for name in ("train_loss", "val_loss"):
        assert shop.curve(job_id, name) == shop.curve(twin, name)
    # The parent still names it, so it is still there.
    assert shop.storage.path(newest.key).exists()
    assert newest.key not in {row.key for row in shop.checkpoints(job_id)}


def test_a_retry_starts_afresh_when_all_of_its_parents_checkpoints_are_damaged(shop: Shop) -> None:
    parent = shop.train()
    shop.attempt(parent, Supervised({LOOKS_PER_EPOCH + 3: "cancel"}))
    for row in shop.checkpoints(parent):
        damage(shop, row.key)
    job_id = shop.retry(parent)
    assert shop.attempt(job_id).status == JobStatus.succeeded
    twin = shop.train()
    shop.attempt(twin)
    assert shop.last_weights(job_id) == shop.last_weights(twin)
    assert shop.curve(job_id, "val_loss") == shop.curve(twin, "val_loss")


def test_files_go_with_the_last_job_that_names_them(shop: Shop) -> None:
    parent = shop.train()
    shop.attempt(parent, Supervised({LOOKS_PER_EPOCH + 3: "cancel"}))
    inherited = {row.key for row in shop.checkpoints(parent)}
    job_id = shop.retry(parent)
    shop.attempt(job_id)  # retires what it began with, which its parent still names
    assert all(shop.storage.path(key).exists() for key in inherited)
    with shop.database.session_scope() as session:
        unnamed = repository.delete_job(session, parent)
    kept = {row.key for row in shop.checkpoints(job_id)}
    assert set(unnamed) == inherited - kept


# Which checkpoints are kept


def test_every_second_epoch_the_best_two_and_the_last_are_kept(shop: Shop) -> None:
    job_id = shop.train(
        epochs=6, checkpoint={"keep_every_epochs": 2, "keep_best": 2, "every_epochs": 4}
    )
    shop.attempt(job_id)
    rows = shop.checkpoints(job_id)
    epochs = {kind: [row.epoch for row in rows if row.kind == kind] for kind in ("epoch", "last")}
    assert epochs == {"epoch": [2, 4, 6], "last": [6]}
    # The best so far of what was stored, which is each second epoch.
    losses = dict(shop.curve(job_id, "val_loss"))
    so_far = [
        step
        for step in (12, 24, 36)
        if all(losses[step] < losses[before] for before in (12, 24, 36) if before < step)
    ]
    assert [row.step for row in rows if row.kind == "best"] == so_far[-2:]
    assert len({row.key for row in rows}) == 3
    folders = shop.storage.keys(f"jobs/{job_id}")
    assert set(folders) == {row.key for row in rows}


def test_a_kept_checkpoint_outlives_a_crash_and_is_registered_once(shop: Shop) -> None:
    job_id = shop.train(epochs=4, checkpoint={"keep_every_epochs": 2})
    shop.attempt(job_id, Supervised(crash_at=3 * LOOKS_PER_EPOCH + 2))
    shop.attempt(job_id)
    rows = [row for row in shop.checkpoints(job_id) if row.kind == "epoch"]
    assert [(row.epoch, row.attempt) for row in rows] == [(2, 1), (4, 2)]


# Models that are found when the job begins


def test_an_evaluation_that_waited_finds_the_model_and_keeps_to_it(shop: Shop) -> None:
    model = shop.train(epochs=1)
    trained = shop.attempt(model)
    job_id = shop.evaluate(model)
    assert shop.job(job_id).checkpoint_id is None
    job = shop.attempt(job_id)
    assert job.status == JobStatus.succeeded, job.error
    assert trained.result is not None
    assert job.result is not None
    assert job.checkpoint_id == trained.result["checkpoint_id"] == job.result["checkpoint_id"]
    assert (job.result["split"], job.result["num_samples"]) == ("test", 2 * NUM_TEST)
    assert job.result["loss"] == pytest.approx(trained.result["loss"], rel=1e-6)


@pytest.mark.parametrize("val_fraction", [None, 0.25])
def test_what_became_of_each_image_is_kept_with_the_report(
    shop: Shop, val_fraction: float | None
) -> None:
    job_id = shop.train(epochs=1, val_fraction=val_fraction)
    result = shop.attempt(job_id).result
    report = shop.report(job_id)
    assert result is not None
    with shop.database.read_scope() as session:
        checkpoint = repository.find_model(session, result["checkpoint_id"])
        dataset = datasets.get_dataset(session, report.dataset_id)
        kept = repository.outcomes_on(session, checkpoint, dataset, report.split)
    found = Outcomes.decode(kept)
    assert len(found.rows) == report.num_samples == len(set(found.rows.tolist()))
    assert (found.predicted == found.labels).mean() == pytest.approx(report.top1)
    # The images of a split lie class by class: a row's place tells its label.
    per_class = NUM_TEST if val_fraction is None else NUM_TRAIN
    assert found.split == ("test" if val_fraction is None else "train")
    assert (found.labels == found.rows // per_class).all()
    hard = {(image.split, image.index): image for image in report.hardest}
    assert len(hard) == report.num_samples
    for row, label, predicted in zip(found.rows, found.labels, found.predicted, strict=True):
        image = hard[found.split, int(row)]
        assert (image.label, image.predicted) == tuple(
            ("dark", "light")[index] for index in (label, predicted)
        )


def test_a_training_that_waited_starts_from_the_model_and_keeps_to_it(shop: Shop) -> None:
    model = shop.train(epochs=1)
    trained = shop.attempt(model)
    arch = {"arch": "resnet18", "dropout": 0.2}
    job_id = shop.train(epochs=1, model={**arch, "init_from": model})
    job = shop.attempt(job_id, Supervised({1: "stop"}))  # the weights that it began with
    assert trained.result is not None
    assert job.checkpoint_id == trained.result["checkpoint_id"]
    assert shop.last_weights(job_id) == shop.last_weights(model)


def test_a_model_that_is_not_there_fails_the_job_with_what_to_do(shop: Shop) -> None:
    without = shop.train()
    shop.attempt(without, Supervised({2: "cancel"}))
    for reference, code in ((without, "no_checkpoint_yet"), ("nobody", "model_not_found")):
        job = shop.attempt(shop.evaluate(reference))
        assert job.status == JobStatus.failed
        assert job.error is not None
        assert (job.error["code"], bool(job.error["hint"])) == (code, True)


def test_a_model_of_other_classes_is_not_evaluated(shop: Shop, tmp_path: Path) -> None:
    shop.attempt(shop.ingest(squares(tmp_path / "others", ("dark", "dim")), "others"))
    model = shop.train(epochs=1)
    shop.attempt(model)
    job = shop.attempt(shop.evaluate(model, "others"))
    assert job.error is not None
    assert job.error["code"] == "invalid_spec"
    assert "differ in: dim, light" in job.error["message"]


@pytest.mark.parametrize("val_fraction", [None, 0.25])
def test_a_report_shows_its_hardest_images_and_where_the_dataset_has_them(
    shop: Shop, val_fraction: float | None
) -> None:
    job = shop.attempt(shop.train(epochs=1, val_fraction=val_fraction))
    with shop.database.read_scope() as session:
        report = repository.get_report(session, job.id)
        png = repository.get_picture(session, job.id, "hardest")
        dataset = datasets.find_dataset(session, "squares")
    assert dataset is not None
    assert png.startswith(b"\x89PNG")
    assert report.calibration is not None
    split = read_index(shop.storage.path(dataset.key)).splits["train" if val_fraction else "test"]
    assert report.hardest
    for image in report.hardest:
        assert image.split == ("train" if val_fraction else "test")
        assert split.paths[image.index] == image.image
        assert f"/{image.label}/" in image.image
    losses = [image.loss for image in report.hardest]
    assert losses == sorted(losses, reverse=True)


def test_what_is_odd_about_a_dataset_is_repeated_once_by_each_job_on_it(
    shop: Shop, tmp_path: Path
) -> None:
    folder = squares(tmp_path / "odd", ("a", "b"))
    (folder / "train" / "a" / "text.png").write_text("no image")
    ingested = shop.attempt(shop.ingest(folder, "odd"))
    assert ingested.result is not None
    problems = [{"code": "unreadable_images", "level": "warning", "count": 1}]
    assert (ingested.result["label"], ingested.result["problems"]) == ("odd:1", problems)
    job_id = shop.train(epochs=1, dataset="odd")
    shop.attempt(job_id, Supervised({LOOKS_PER_EPOCH // 2: "release"}))
    shop.attempt(job_id)
    evaluation = shop.attempt(shop.evaluate(job_id, "odd"))
    for job in (job_id, evaluation.id):
        with shop.database.read_scope() as session:
            events = repository.list_events(session, job)
        [told] = [event for event in events if event.type == "dataset_problems"]
        assert "unreadable_images 1" in told.message
        assert told.data["problems"] == problems
