"""What is stored and found again, on each database."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError

from api import examples
from shared import datasets, lifecycle, repository
from shared.database import Database, db_now
from shared.errors import (
    IdempotencyMismatch,
    IllegalTransition,
    InvalidInput,
    JobInUse,
    JobNotFound,
    ModelNotFound,
    NoCheckpointYet,
    PictureNotReady,
    SummaryNotReady,
    UnknownDataset,
)
from shared.lifecycle import Capacity, Fence, Superseded
from shared.repository import NewPoint, WorkerFacts
from shared.tables import (
    Attempt,
    Checkpoint,
    IdempotencyKey,
    Job,
    LogPart,
    MetricPoint,
    Picture,
    Summary,
    Worker,
)
from skipline import schemas
from skipline.catalog import BUILTIN_DATASETS, ClusterFacts, resolve
from skipline.schemas import JobKind, JobStatus
from skipline.specs import EvaluateSpec, TrainSpec, dump_spec, load_spec, parse_request
from tests.shared import jobs

CPU, GPU = Capacity(("any", "auto", "cpu")), Capacity(("any", "auto", "cuda"), 1, 1)


def worker_facts(num_gpus: int) -> WorkerFacts:
    return WorkerFacts("host", num_gpus, num_cores=8, num_slots=1, devices=())


def add_job(database: Database, **keys: Any) -> str:
    spec = parse_request({"dataset": "digits", **keys})
    assert isinstance(spec, TrainSpec)
    with database.session_scope() as session:
        return repository.add_job(session, resolve(spec, BUILTIN_DATASETS["digits"])).id


def running(database: Database) -> Fence:
    add_job(database)
    with database.session_scope() as session:
        claim = lifecycle.claim(session, "w", "host", 60, CPU)
    assert claim is not None
    return claim.fence


def write(database: Database, fence: Fence, *points: tuple[str, int, float]) -> None:
    with database.session_scope() as session:
        new = [NewPoint(name, step, 1, value) for name, step, value in points]
        repository.write_progress(session, fence, {"step": 1}, new)


def register(database: Database, fence: Fence, step: int, *kinds: Any, key: str = "") -> None:
    with database.session_scope() as session:
        repository.register_checkpoint(
            session,
            fence,
            kinds=kinds,
            key=key or f"k{step}",
            epoch=step,
            step=step,
            metrics={"val_loss": 1.0},
            num_bytes=10,
        )


def rows(database: Database, job_id: str, after: int = 0) -> list[tuple[int, str, int]]:
    with database.read_scope() as session:
        found = repository.points_after(session, {job_id: after}, limit=100)
        return [(row.number, row.name, row.step) for row in found]


def test_a_stored_spec_is_read_back_as_it_was(database: Database) -> None:
    job_id = add_job(database, optimizer={"name": "adamw", "lr": 0.003}, scheduler={"name": "step"})
    with database.read_scope() as session:
        stored = repository.get_job(session, job_id).spec
    spec = load_spec(stored)
    assert dump_spec(spec) == stored
    assert stored["optimizer"]["lr"] == 0.003
    assert stored["scheduler"]["milestones"] == [10, 15]
    assert stored["image_size"] == 32


def test_points_are_numbered_within_their_job_without_a_gap(database: Database) -> None:
    one = running(database)
    other = running(database)
    write(database, one, ("train_loss", 1, 2.0), ("lr", 1, 0.1))
    write(database, other, ("train_loss", 1, 3.0))
    write(database, one, ("train_loss", 2, 1.0))
    assert rows(database, one.job_id) == [(1, "train_loss", 1), (2, "lr", 1), (3, "train_loss", 2)]
    assert rows(database, other.job_id) == [(1, "train_loss", 1)]
    assert rows(database, one.job_id, after=2) == [(3, "train_loss", 2)]


def test_many_jobs_are_read_in_one_query_each_from_its_own_place(database: Database) -> None:
    one, other = running(database), running(database)
    write(database, one, ("a", 1, 1.0), ("a", 2, 1.0))
    write(database, other, ("a", 1, 1.0), ("a", 2, 1.0))
    with database.read_scope() as session:
        found = repository.points_after(session, {one.job_id: 1, other.job_id: 0}, limit=100)
        places = [(row.job_id, row.number) for row in found]
    assert sorted(places) == sorted([(one.job_id, 2), (other.job_id, 1), (other.job_id, 2)])


def test_a_rewind_drops_what_came_after_the_checkpoint_and_says_so(database: Database) -> None:
    fence = running(database)
    write(database, fence, ("train_loss", 1, 2.0), ("val_loss", 2, 2.0))
    with database.session_scope() as session:
        repository.rewind(session, fence, last_point=1, step=1, epoch=1)
    write(database, fence, ("train_loss", 2, 1.5))
    assert rows(database, fence.job_id) == [
        (1, "train_loss", 1),
        (3, repository.REWIND, 1),
        (4, "train_loss", 2),
    ]
    with database.read_scope() as session:
        series, last = repository.series(session, fence.job_id, names=None, after=0, limit=10)
    assert [point.value for point in series["train_loss"]] == [2.0, 1.5]
    assert repository.REWIND not in series
    assert last == 4


def test_a_rewind_with_nothing_to_drop_leaves_no_trace(database: Database) -> None:
    fence = running(database)
    write(database, fence, ("train_loss", 1, 2.0))
    with database.session_scope() as session:
        repository.rewind(session, fence, last_point=1, step=1, epoch=1)
    assert rows(database, fence.job_id) == [(1, "train_loss", 1)]


def test_a_writer_whose_commit_was_not_answered_finds_what_is_missing(database: Database) -> None:
    fence = running(database)
    write(database, fence, ("a", 1, 1.0))
    points = [NewPoint("a", 1, 1, 1.0), NewPoint("b", 1, 1, 1.0), NewPoint("a", 2, 1, 1.0)]
    with database.read_scope() as session:
        assert repository.missing_points(session, fence, points) == points[1:]


def test_a_job_stands_for_its_best_checkpoint_else_its_last(database: Database) -> None:
    fence = running(database)
    with database.read_scope() as session, pytest.raises(NoCheckpointYet):
        repository.find_model(session, fence.job_id)
    with database.read_scope() as session, pytest.raises(ModelNotFound):
        repository.find_model(session, "nobody")
    register(database, fence, 1, "last")
    with database.read_scope() as session:
        assert repository.find_model(session, fence.job_id).step == 1
    register(database, fence, 2, "best", "last")
    register(database, fence, 3, "last")
    with database.read_scope() as session:
        best = repository.find_model(session, fence.job_id)
        assert (best.kind, best.step) == ("best", 2)
        assert repository.find_model(session, best.id).id == best.id


def test_a_checkpoint_is_calibrated_by_the_report_on_itself_alone(database: Database) -> None:
    fence = running(database)
    register(database, fence, 1, "best", "last")
    with database.session_scope() as session:
        best = repository.find_model(session, fence.job_id)
        assert repository.calibration_of(session, best) == (None, None)
        measured = {"ece": 0.1, "temperature": 1.5, "calibrated_ece": 0.0, "bins": []}
        report = examples.REPORT | {"checkpoint_id": best.id, "calibration": measured}
        repository.add_report(session, fence.job_id, schemas.Report.model_validate(report))
    with database.read_scope() as session:
        both = {row.kind: row for row in repository.list_checkpoints(session, fence.job_id)}
        assert repository.calibration_of(session, both["best"]) == (1.5, None)
        assert repository.calibration_of(session, both["last"]) == (None, None)


def test_a_report_of_an_older_version_calibrates_nothing(database: Database) -> None:
    fence = running(database)
    register(database, fence, 1, "best")
    with database.session_scope() as session:
        best = repository.find_model(session, fence.job_id)
        report = examples.REPORT | {"checkpoint_id": best.id, "calibration": None}
        repository.add_report(session, fence.job_id, schemas.Report.model_validate(report))
        assert repository.calibration_of(session, best) == (None, None)


def test_only_files_that_no_row_names_may_go(database: Database) -> None:
    fence = running(database)
    register(database, fence, 1, "best", "last")
    register(database, fence, 2, "last")
    register(database, fence, 3, "last")
    with database.session_scope() as session:
        unused = repository.retire_checkpoints(session, fence.job_id, {"best": 1, "last": 1})
    assert unused == ["k2"]
    with database.read_scope() as session:
        kept = repository.list_checkpoints(session, fence.job_id)
    assert [(row.kind, row.step) for row in kept] == [("last", 3), ("best", 1)]


def test_a_checkpoint_that_an_evaluation_waits_for_is_kept(database: Database) -> None:
    fence = running(database)
    register(database, fence, 1, "last")
    with database.session_scope() as session:
        wanted = repository.list_checkpoints(session, fence.job_id)[0].id
        spec = EvaluateSpec(model=wanted, dataset="digits", split="test")
        evaluation = repository.add_job(session, spec, checkpoint_id=wanted).id
    register(database, fence, 2, "last")
    with database.session_scope() as session:
        assert repository.retire_checkpoints(session, fence.job_id, {"last": 1}) == []
    with database.session_scope() as session:
        lifecycle.request(session, evaluation, "cancel")
    with database.session_scope() as session:
        assert repository.retire_checkpoints(session, fence.job_id, {"last": 1}) == ["k1"]


def test_lists_come_newest_first_and_go_on_at_the_cursor(database: Database) -> None:
    ids = [add_job(database) for _ in range(5)]
    seen: list[str] = []
    after = None
    for _ in range(3):
        with database.read_scope() as session:
            jobs, after = repository.list_jobs(
                session, status=JobStatus.queued, kind=JobKind.train, limit=2, after=after
            )
        seen += [job.id for job in jobs]
    assert seen == ids[::-1]
    assert after is None
    with database.read_scope() as session, pytest.raises(InvalidInput):
        repository.list_jobs(session, status=None, kind=None, limit=2, after="nobody")


def test_a_queued_job_knows_its_place(database: Database) -> None:
    for _ in range(3):
        add_job(database)
    with database.read_scope() as session:
        jobs, _ = repository.list_jobs(session, status=None, kind=None, limit=10, after=None)
        places = repository.queue_places(session, jobs)
    assert [places[job.id].position for job in jobs] == [3, 2, 1]


def test_a_worker_sees_only_jobs_that_it_can_run(database: Database) -> None:
    shared = add_job(database)
    add_job(database, resources={"device": "cuda"})
    with database.read_scope() as session:
        assert repository.num_queued(session) == 2
        assert repository.is_work_for(session, CPU)
        assert repository.is_work_for(session, GPU)
        lifecycle.request(session, shared, "cancel")
        assert not repository.is_work_for(session, CPU)
        assert repository.is_work_for(session, GPU)


def test_a_job_that_asks_for_more_gpus_than_a_worker_has_is_none_of_its(database: Database) -> None:
    add_job(database, resources={"device": "cuda", "num_processes": 2})
    with database.read_scope() as session:
        assert not repository.is_work_for(session, GPU)
        assert repository.is_work_for(session, Capacity(("auto", "cuda"), 2, 2))


def test_a_dry_run_is_a_job_with_the_spec_of_a_training(database: Database) -> None:
    spec = parse_request({"dataset": "digits"})
    assert isinstance(spec, TrainSpec)
    with database.session_scope() as session:
        resolved = resolve(spec, BUILTIN_DATASETS["digits"])
        job = repository.add_job(session, resolved, kind=JobKind.dry_run)
        document = repository.job_document(job, None)
    assert (document.kind, document.spec["kind"]) == (JobKind.dry_run, "train")
    assert isinstance(load_spec(document.spec), TrainSpec)


SUMMARY = {
    "layers": [{"name": "fc", "type": "Linear", "output_shape": [10], "num_parameters": 5130}],
    "num_parameters": 5130,
    "num_trainable_parameters": 5130,
    "multiply_adds": 5120,
    "forward_bytes": 40,
}


def test_a_later_attempt_replaces_the_summary_of_an_earlier_one(database: Database) -> None:
    fence = running(database)
    with database.read_scope() as session, pytest.raises(SummaryNotReady):
        repository.get_summary(session, fence.job_id)
    with database.read_scope() as session, pytest.raises(JobNotFound):
        repository.get_summary(session, "nobody")
    for multiply_adds in (1, 2):
        summary = schemas.Summary.model_validate({**SUMMARY, "multiply_adds": multiply_adds})
        with database.session_scope() as session:
            repository.add_summary(session, fence, summary)
        with database.read_scope() as session:
            assert repository.get_summary(session, fence.job_id) == summary


def test_a_later_attempt_replaces_the_picture_of_an_earlier_one(database: Database) -> None:
    fence = running(database)
    with database.read_scope() as session, pytest.raises(PictureNotReady):
        repository.get_picture(session, fence.job_id, "samples")
    with database.read_scope() as session, pytest.raises(JobNotFound):
        repository.get_picture(session, "nobody", "samples")
    for png in (b"\x89PNG one", b"\x89PNG \x00 two"):
        with database.session_scope() as session:
            repository.add_picture(session, fence, "samples", png)
        with database.read_scope() as session:
            assert repository.get_picture(session, fence.job_id, "samples") == png
    with database.read_scope() as session, pytest.raises(PictureNotReady):
        repository.get_picture(session, fence.job_id, "others")


def test_a_replaced_attempt_stores_neither_summary_nor_picture(database: Database) -> None:
    zombie = running(database)
    with database.session_scope() as session:
        lifecycle.release(session, zombie, "for a test")
    summary = schemas.Summary.model_validate(SUMMARY)
    with pytest.raises(Superseded), database.session_scope() as session:
        repository.add_summary(session, zombie, summary)
    with pytest.raises(Superseded), database.session_scope() as session:
        repository.add_picture(session, zombie, "samples", b"late")
    with database.read_scope() as session, pytest.raises(SummaryNotReady):
        repository.get_summary(session, zombie.job_id)
    with database.read_scope() as session, pytest.raises(PictureNotReady):
        repository.get_picture(session, zombie.job_id, "samples")


def see(database: Database, worker_id: str, num_gpus: int, seconds_ago: float = 0) -> None:
    with database.session_scope() as session:
        repository.see_worker(session, worker_id, worker_facts(num_gpus))
        if seconds_ago:
            seen = update(Worker).where(Worker.id == worker_id)
            session.execute(seen.values(seen_at=db_now(-seconds_ago)))


def facts(database: Database) -> ClusterFacts | None:
    with database.read_scope() as session:
        return repository.cluster_facts(session)


def test_the_cluster_has_what_its_largest_living_worker_has(database: Database) -> None:
    assert facts(database) is None
    see(database, "large", 8, seconds_ago=70)
    assert facts(database) is None
    see(database, "small", 0)
    assert facts(database) == ClusterFacts(max_gpus=0)
    see(database, "medium", 2, seconds_ago=50)
    assert facts(database) == ClusterFacts(max_gpus=2)


def test_a_worker_has_one_row_however_often_it_is_seen(database: Database) -> None:
    see(database, "w", 1, seconds_ago=50)
    see(database, "w", 2)
    with database.read_scope() as session:
        [row] = session.scalars(select(Worker))
        now = session.scalar(select(db_now()))
    assert (row.host, row.num_gpus, row.num_cores) == ("host", 2, 8)
    assert now is not None
    assert (now - row.seen_at).total_seconds() < 40


def test_a_worker_that_leaves_or_was_not_seen_for_an_hour_is_forgotten(database: Database) -> None:
    see(database, "dead", 1, seconds_ago=3700)
    see(database, "silent", 1, seconds_ago=3500)
    see(database, "leaving", 1)
    with database.session_scope() as session:
        repository.forget_worker(session, "leaving")
    with database.read_scope() as session:
        assert set(session.scalars(select(Worker.id))) == {"silent"}


def test_events_are_read_from_a_number_on(database: Database) -> None:
    fence = running(database)
    for number in (3, 4, 5):
        with database.session_scope() as session:
            repository.add_event(session, fence, "warning", "t", f"event {number}", {"n": number})
    with database.read_scope() as session:
        rows = repository.list_events(session, fence.job_id, after=2, limit=2)
        documents = [repository.event_document(row) for row in rows]
    assert [(event.id, event.message) for event in documents] == [(3, "event 3"), (4, "event 4")]
    assert (documents[0].level, documents[0].type, documents[0].data) == ("warning", "t", {"n": 3})


def test_two_workers_that_bring_in_the_same_images_at_once_agree(database: Database) -> None:
    columns: dict[str, Any] = {
        "id": "ds_1",
        "name": "digits",
        "hash": "h",
        "classes": ["a", "b"],
        "splits": {},
        "image_size": 32,
        "channel_mean": [0.5] * 3,
        "channel_std": [0.2] * 3,
        "problems": [],
        "num_bytes": 5,
    }
    keys: list[str] = []
    barrier = threading.Barrier(4)

    def bring_in(key: str) -> None:
        barrier.wait()
        with database.session_scope() as session:
            keys.append(datasets.add_dataset(session, key=key, **columns)[0].key)

    threads = [threading.Thread(target=bring_in, args=(f"k{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 4
    assert len(set(keys)) == 1


def test_a_pinned_checkpoint_is_not_retired_by_the_training(database: Database) -> None:
    fence = running(database)
    register(database, fence, 1, "last")
    register(database, fence, 2, "last")
    pinned = threading.Event()
    unused: list[list[str]] = []

    def retire() -> None:
        pinned.wait()
        with database.session_scope() as session:
            unused.append(repository.retire_checkpoints(session, fence.job_id, {"last": 1}))

    thread = threading.Thread(target=retire)
    thread.start()
    with database.session_scope() as session:
        older = repository.list_checkpoints(session, fence.job_id)[1].id
        checkpoint = repository.pin_model(session, older)
        pinned.set()
        spec = EvaluateSpec(model=older, dataset="digits", split="test")
        repository.add_job(session, spec, checkpoint_id=checkpoint.id)
    thread.join()
    assert unused == [[]]


def test_the_same_images_are_one_dataset_under_the_latest_name(database: Database) -> None:
    columns: dict[str, Any] = {
        "id": "ds_1",
        "hash": "h",
        "classes": ["a", "b"],
        "splits": {"train": {"num_images": 3, "per_class": [1, 2]}},
        "image_size": 32,
        "channel_mean": [0.5] * 3,
        "channel_std": [0.2] * 3,
        "problems": [],
        "num_bytes": 5,
    }
    with database.session_scope() as session:
        datasets.add_dataset(session, name="first", key="k1", **columns)
    with database.session_scope() as session:
        assert datasets.add_dataset(session, name="second", key="k2", **columns)[0].key == "k1"
    with database.read_scope() as session:
        facts, dataset_id = datasets.dataset_facts(session, "second")
        assert dataset_id == "ds_1"
        assert (facts.classes, dict(facts.splits)) == (("a", "b"), {"train": 3})
        assert datasets.dataset_facts(session, "first")[1] == "ds_1"
        with pytest.raises(UnknownDataset):
            datasets.dataset_facts(session, "third")
        assert datasets.dataset_facts(session, "digits") == (BUILTIN_DATASETS["digits"], None)


# ---------------------------------------------------------------- deleting a job, going on from one


def count(database: Database, *tables: type[Any]) -> list[int]:
    with database.read_scope() as session:
        return [session.scalar(select(func.count()).select_from(table)) or 0 for table in tables]


def test_with_a_job_goes_all_that_belongs_to_it(database: Database) -> None:
    kept = running(database)
    write(database, kept, ("a", 1, 1.0))
    register(database, kept, 1, "last", key="kept")
    fence = running(database)
    write(database, fence, ("a", 1, 1.0), ("a", 2, 1.0))
    register(database, fence, 1, "best", "last", key="k1")
    register(database, fence, 2, "last", key="k2")
    with database.session_scope() as session:
        repository.add_log_part(session, fence, 1, "Hello\n")
        repository.remember_request(session, "me", "key", "h", fence.job_id)
        repository.add_picture(session, fence, "samples", b"png")
        repository.add_summary(session, fence, schemas.Summary.model_validate(SUMMARY))
    with pytest.raises(IllegalTransition):
        jobs.delete(database, fence.job_id)
    jobs.finish(database, fence)
    assert jobs.delete(database, fence.job_id) == ["k1", "k2"]
    with pytest.raises(JobNotFound):
        jobs.get(database, fence.job_id)
    with pytest.raises(JobNotFound):
        jobs.delete(database, fence.job_id)
    tables = (Job, Attempt, MetricPoint, Checkpoint, LogPart, IdempotencyKey, Picture, Summary)
    assert count(database, *tables) == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_job_whose_checkpoint_a_waiting_job_needs_is_not_deleted(database: Database) -> None:
    fence = running(database)
    register(database, fence, 1, "last")
    jobs.finish(database, fence)
    with database.session_scope() as session:
        wanted = repository.list_checkpoints(session, fence.job_id)[0].id
        spec = EvaluateSpec(model=wanted, dataset="digits", split="test")
        evaluation = repository.add_job(session, spec, checkpoint_id=wanted).id
    with pytest.raises(JobInUse, match=evaluation):
        jobs.delete(database, fence.job_id)
    measuring = jobs.claimed(database)
    with pytest.raises(JobInUse, match=evaluation):
        jobs.delete(database, fence.job_id)
    jobs.finish(database, measuring)
    assert jobs.delete(database, fence.job_id) == ["k1"]


def retried(database: Database, parent: Fence) -> str:
    """A new job that goes on where the parent came to; returns its id."""
    with database.session_scope() as session:
        ended = repository.get_job(session, parent.job_id)
        spec = load_spec({**ended.spec, "parent_id": parent.job_id})
        job = repository.add_job(session, spec)
        repository.inherit(session, job, ended)
        return job.id


def test_a_retry_begins_with_the_curve_and_the_checkpoints_of_its_parent(
    database: Database,
) -> None:
    parent = running(database)
    write(database, parent, ("loss", 1, 5.0), ("loss", 2, 4.0))
    register(database, parent, 2, "best", "last")
    write(database, parent, ("loss", 3, 9.0))
    jobs.lose(database, parent)
    parent = jobs.claimed(database)
    with database.session_scope() as session:  # Point 3 goes, a rewind gets the number 4.
        repository.rewind(session, parent, last_point=2, step=2, epoch=1)
        repository.store_runtime(session, parent, {"precision": "bf16"})
    write(database, parent, ("loss", 3, 3.0), ("lr", 3, 0.1))
    register(database, parent, 4, "last")
    write(database, parent, ("loss", 5, 2.0))
    jobs.finish(database, parent, JobStatus.failed)

    job_id = retried(database, parent)
    points = [(1, "loss", 1), (2, "loss", 2), (3, "loss", 3), (4, "lr", 3)]
    assert rows(database, job_id) == points  # Neither the rewind nor what came after step 4.
    with database.read_scope() as session:
        series, _ = repository.series(session, job_id, names=["loss"], after=0, limit=10)
        mine, its = (repository.list_checkpoints(session, own) for own in (job_id, parent.job_id))
    assert [point.value for point in series["loss"]] == [5.0, 4.0, 3.0]
    assert [(row.kind, row.step, row.key, row.last_point) for row in mine] == [
        ("last", 4, "k4", 4),
        ("best", 2, "k2", 2),
        ("last", 2, "k2", 2),
    ]
    assert not {row.id for row in mine} & {row.id for row in its}
    job = jobs.get(database, job_id)
    assert (job.parent_id, job.runtime) == (parent.job_id, {"precision": "bf16"})
    assert (job.last_point, job.attempt, job.crashes) == (4, 0, 0)
    with database.read_scope() as session:
        inherited = repository.list_events(session, job_id)[-1]
    assert (inherited.type, inherited.data) == (
        "inherited",
        {"parent_id": parent.job_id, "step": 4},
    )

    # Its first attempt goes back to the older checkpoint, writes on, and numbers have no gap.
    fence = jobs.claimed(database)
    assert fence.job_id == job_id
    with database.session_scope() as session:
        assert repository.forget_checkpoints_after(session, fence, 2) == []  # The parent's, too.
        repository.rewind(session, fence, last_point=2, step=2, epoch=1)
    write(database, fence, ("loss", 3, 3.5))
    assert rows(database, job_id) == [*points[:2], (5, repository.REWIND, 2), (6, "loss", 3)]
    assert rows(database, parent.job_id)[-1] == (7, "loss", 5)


def test_shared_files_go_with_the_last_row_that_names_them(database: Database) -> None:
    parent = running(database)
    register(database, parent, 1, "last")
    register(database, parent, 2, "last")
    jobs.finish(database, parent, JobStatus.failed)
    job_id = retried(database, parent)
    fence = jobs.claimed(database)
    assert fence.job_id == job_id
    register(database, fence, 3, "last")
    with database.session_scope() as session:
        assert repository.retire_checkpoints(session, job_id, {"last": 2}) == []
        assert repository.unnamed_keys(session, ["k1", "k2", "k3", "k4"]) == ["k4"]
    # The retry has dropped k1, and still names k2.
    assert jobs.delete(database, parent.job_id) == ["k1"]
    jobs.finish(database, fence)
    assert jobs.delete(database, job_id) == ["k2", "k3"]


# ---------------------------------------------------------------------------- idempotency keys


def test_the_same_request_again_finds_the_job_of_the_first(database: Database) -> None:
    job_id, other = add_job(database), add_job(database)
    with database.session_scope() as session:
        assert repository.recall_request(session, "me", "key", "hash") is None
        repository.remember_request(session, "me", "key", "hash", job_id)
    with database.session_scope() as session:
        found = repository.recall_request(session, "me", "key", "hash")
        assert found is not None
        assert found.id == job_id
        with pytest.raises(IdempotencyMismatch):
            repository.recall_request(session, "me", "key", "other")
        assert repository.recall_request(session, "you", "key", "hash") is None
        repository.remember_request(session, "you", "key", "other", other)


def test_of_many_requests_at_once_with_one_key_one_is_stored(database: Database) -> None:
    num_refused: list[None] = []

    def post() -> None:
        spec = resolve(TrainSpec(dataset="digits"), BUILTIN_DATASETS["digits"])
        try:
            with database.session_scope() as session:
                job = repository.add_job(session, spec)
                repository.remember_request(session, "", "key", "hash", job.id)
        except IntegrityError:
            num_refused.append(None)

    jobs.in_threads(*[post] * 8)
    assert len(num_refused) == 7
    assert count(database, Job, IdempotencyKey) == [1, 1]


def test_keys_are_forgotten_when_they_are_old(database: Database) -> None:
    job_id = add_job(database)
    for key, seconds_ago in (("old", 100), ("new", 10)):
        with database.session_scope() as session:
            repository.remember_request(session, "", key, "hash", job_id)
            row = update(IdempotencyKey).where(IdempotencyKey.key == key)
            session.execute(row.values(created_at=db_now(-seconds_ago)))
    with database.session_scope() as session:
        assert repository.forget_requests(session, 50) == 1
    with database.read_scope() as session:
        assert repository.recall_request(session, "", "old", "hash") is None
        assert repository.recall_request(session, "", "new", "hash") is not None


# ----------------------------------------------------------------------------------------- logs


def test_a_log_is_read_in_the_order_of_its_parts_attempt_by_attempt(database: Database) -> None:
    fence = running(database)
    with database.session_scope() as session:
        for number, text in ((2, "two\n"), (10, "ten\n"), (1, "one\n")):
            assert repository.add_log_part(session, fence, number, text)
    jobs.lose(database, fence)
    again = jobs.claimed(database)
    with database.session_scope() as session:
        assert repository.add_log_part(session, again, 1, "Grüße ✓\n")
        # What the lost one printed last comes late, and is its own.
        assert repository.add_log_part(session, fence, 11, "end\n")
        stranger = Fence(fence.job_id, 1, "nobody")
        assert not repository.add_log_part(session, stranger, 12, "forged\n")
    with database.read_scope() as session:
        assert repository.read_log(session, fence.job_id, 1) == "one\ntwo\nten\nend\n"
        assert repository.read_log(session, fence.job_id, 2) == "Grüße ✓\n"
        assert repository.read_log(session, fence.job_id, 3) == ""
    with database.session_scope() as session:
        repository.drop_log_parts(session, fence, 2)
    with database.read_scope() as session:
        assert repository.read_log(session, fence.job_id, 1) == "ten\nend\n"
        assert repository.read_log(session, fence.job_id, 2) == "Grüße ✓\n"
    jobs.finish(database, again)
    jobs.delete(database, fence.job_id)
    with database.session_scope() as session:
        assert not repository.add_log_part(session, again, 2, "late\n")
    assert count(database, LogPart) == [0]


# -------------------------------------------------------------------------------------- workers

CPU_DEVICE = {"type": "cpu", "index": 0, "name": "A processor", "memory_bytes": 2**34}


def gpu(index: int) -> dict[str, Any]:
    return {"type": "cuda", "index": index, "name": "A GPU", "memory_bytes": 2**36}


def test_workers_are_listed_with_what_they_have_and_run(database: Database) -> None:
    large = WorkerFacts("one", 2, 16, 3, [CPU_DEVICE, gpu(0), gpu(1)])
    small = WorkerFacts("two", 0, 4, 1, [CPU_DEVICE], is_draining=True)
    silent = WorkerFacts("three", 0, 4, 1, [CPU_DEVICE])
    with database.session_scope() as session:
        for worker_id, worker in (("large", large), ("small", small), ("silent", silent)):
            repository.see_worker(session, worker_id, worker)
        gone = update(Worker).where(Worker.id == "silent")
        session.execute(gone.values(seen_at=db_now(-61), started_at=db_now(-100)))
    on_gpu = add_job(database, resources={"device": "cuda"})
    on_cpu = add_job(database, resources={"device": "cpu"})
    elsewhere = add_job(database, resources={"device": "cpu"})
    devices = ("any", "auto", "cpu", "cuda")
    with database.session_scope() as session:
        taken = lifecycle.claim(session, "o1", "one", 60, Capacity(devices, 2, 2), "large")
        assert taken is not None
        lifecycle.note_gpus(session, taken.fence, [1])
        lifecycle.claim(session, "o2", "one", 60, Capacity(devices, 2, 1), "large")
        lifecycle.claim(session, "o3", "three", 60, CPU, "silent")
    with database.read_scope() as session:
        workers = repository.list_workers(session)
    listed = [(w.id, w.host, w.status, w.num_slots, w.job_ids) for w in workers]
    assert listed[0] == ("silent", "three", "lost", 1, [elsewhere])
    assert sorted(listed[1:]) == [
        ("large", "one", "active", 3, [on_gpu, on_cpu]),
        ("small", "two", "draining", 1, []),
    ]
    [shown] = [w for w in workers if w.id == "large"]
    assert [(d.type, d.index, d.memory_bytes, d.job_id) for d in shown.devices] == [
        ("cpu", 0, 2**34, None),
        ("cuda", 0, 2**36, None),
        ("cuda", 1, 2**36, on_gpu),
    ]
    jobs.finish(database, taken.fence)
    with database.read_scope() as session:
        [shown] = [w for w in repository.list_workers(session) if w.id == "large"]
    assert shown.job_ids == [on_cpu]
    assert [device.job_id for device in shown.devices] == [None, None, None]
