"""What is stored and found again, on each database."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import select, update

from shared import lifecycle, repository
from shared.database import Database, db_now
from shared.errors import (
    InvalidInput,
    JobNotFound,
    ModelNotFound,
    NoCheckpointYet,
    PictureNotReady,
    SummaryNotReady,
    UnknownDataset,
)
from shared.lifecycle import Fence, Superseded
from shared.repository import NewPoint
from shared.tables import Worker
from skipline import schemas
from skipline.catalog import BUILTIN_DATASETS, ClusterFacts, resolve
from skipline.schemas import JobKind, JobStatus
from skipline.specs import EvaluateSpec, TrainSpec, dump_spec, load_spec, parse_request


def add_job(database: Database, **keys: Any) -> str:
    spec = parse_request({"dataset": "digits", **keys})
    assert isinstance(spec, TrainSpec)
    with database.session_scope() as session:
        return repository.add_job(session, resolve(spec, BUILTIN_DATASETS["digits"])).id


def running(database: Database) -> Fence:
    add_job(database)
    with database.session_scope() as session:
        fence = lifecycle.claim(session, "w", "host", 60, ("auto",))
    assert fence is not None
    return fence


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
        lifecycle.request_cancel(session, evaluation)
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
        positions = repository.queue_positions(session, jobs)
    assert [positions[job.id] for job in jobs] == [3, 2, 1]


def test_a_worker_sees_only_jobs_that_it_can_run(database: Database) -> None:
    add_job(database)
    add_job(database, resources={"device": "cuda"})
    with database.read_scope() as session:
        assert repository.num_queued(session) == 2
        assert repository.num_queued(session, ("auto", "cpu")) == 1
        assert repository.num_queued(session, ("auto", "cuda"), num_gpus=1) == 2


def test_a_job_that_asks_for_more_gpus_than_a_worker_has_is_none_of_its(database: Database) -> None:
    add_job(database, resources={"device": "cuda", "num_processes": 2})
    with database.read_scope() as session:
        assert repository.num_queued(session, ("auto", "cuda"), num_gpus=1) == 0
        assert repository.num_queued(session, ("auto", "cuda"), num_gpus=2) == 1


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
        repository.see_worker(session, worker_id, "host", num_gpus, num_cores=8)
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
    for number in (2, 3, 4):
        with database.session_scope() as session:
            repository.add_event(session, fence, "warning", "t", f"event {number}", {"n": number})
    with database.read_scope() as session:
        rows = repository.list_events(session, fence.job_id, after=1, limit=2)
        documents = [repository.event_document(row) for row in rows]
    assert [(event.id, event.message) for event in documents] == [(2, "event 2"), (3, "event 3")]
    assert (documents[0].level, documents[0].type, documents[0].data) == ("warning", "t", {"n": 2})


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
            keys.append(repository.add_dataset(session, key=key, **columns).key)

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
        repository.add_dataset(session, name="first", key="k1", **columns)
    with database.session_scope() as session:
        assert repository.add_dataset(session, name="second", key="k2", **columns).key == "k1"
    with database.read_scope() as session:
        facts, dataset_id = repository.dataset_facts(session, "second")
        assert dataset_id == "ds_1"
        assert (facts.classes, dict(facts.splits)) == (("a", "b"), {"train": 3})
        with pytest.raises(UnknownDataset):
            repository.dataset_facts(session, "first")
        assert repository.dataset_facts(session, "digits") == (BUILTIN_DATASETS["digits"], None)
