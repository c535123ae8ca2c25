"""Ranks that run out of memory. What else may happen to ranks is tried in `tests/e2e`, with a
service around them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch

from shared import schema
from shared.database import Database
from shared.errors import TrainingError
from shared.lifecycle import Fence
from shared.storage import Storage
from shared.vision.bundle import BundleDataset
from shared.vision.preprocessing import Preprocessing
from skipline.specs import TrainSpec
from worker.datasets.packing import PackedDataset
from worker.engine.distributed import Ranks
from worker.engine.events import Control, Request, Sink
from worker.engine.runtime import Runtime, typed_failures
from worker.jobs import training
from worker.jobs.context import Context
from worker.jobs.plan import Plan
from worker.jobs.ranks import REQUESTS, RanksOutOfMemory, run_in_ranks


def plan_of(folder: Path, **keys: Any) -> Plan:
    spec = {"dataset": "tiny", "image_size": 8, "batch_size": 16, "resources": {"num_processes": 2}}
    return Plan(
        spec=TrainSpec.model_validate(spec | keys),
        fence=Fence("job", 1, "owner"),
        dataset=BundleDataset(name="tiny", id="ds_1", hash="abc"),
        classes=("a", "b"),
        images=PackedDataset(folder, 8, ("a", "b"), {"train": 32, "val": 8}),
        preprocessing=Preprocessing(
            image_size=8, channel_mean=(0.5, 0.5, 0.5), channel_std=(0.2, 0.2, 0.2)
        ),
        runtime=Runtime("cpu", "fp32", 1, num_processes=2),
        accumulate_steps=1,
        num_loaders=1,
        weights_folder=folder,
        resume_key="jobs/job/1/5",
    )


def sizes_unless_memory_ran_out(
    plan: Plan, storage: Storage, sink: Sink, control: Control, ranks: Ranks
) -> list[tuple[int, Request | None]]:
    """What each rank took part with, and what it was asked to do; the second one's memory holds
    four parts of a step or more."""
    with typed_failures():
        if ranks.rank == 1 and plan.accumulate_steps < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ranks.gather((10 * ranks.rank + plan.accumulate_steps, control.look()))


def disk_full_on_the_second(
    plan: Plan, storage: Storage, sink: Sink, control: Control, ranks: Ranks
) -> list[int]:
    """One rank fails by itself while the other waits for it."""
    if ranks.rank == 1:
        raise TrainingError("disk_full", "There is no disk left: ü", "Free some")
    return ranks.gather(1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the ranks, which are processes of their own, find by their settings."""
    monkeypatch.setenv("SKIPLINE_HOME", str(tmp_path))
    database = Database(f"sqlite:///{tmp_path / 'skipline.sqlite3'}")
    schema.migrate(database)
    database.dispose()
    return tmp_path


def test_one_rank_without_memory_ends_all_and_smaller_parts_succeed(home: Path) -> None:
    plan = plan_of(home)
    with pytest.raises(RanksOutOfMemory):
        run_in_ranks(plan, sizes_unless_memory_ran_out, Control())
    smaller, control = replace(plan, accumulate_steps=4), Control()
    control.request = "stop"  # which every rank knows from its first look on
    assert run_in_ranks(smaller, sizes_unless_memory_ran_out, control) == [
        (4, "stop"),
        (14, "stop"),
    ]


def test_ranks_can_be_told_whatever_a_trainer_can() -> None:
    assert set(REQUESTS) == {None, *get_args(Request)}


def test_what_one_rank_met_alone_is_the_jobs_error(home: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run_in_ranks(plan_of(home), disk_full_on_the_second, Control())
    error = caught.value
    assert (error.code, error.message, error.hint) == (
        "disk_full",
        "There is no disk left: ü",
        "Free some",
    )


@dataclass
class Events:
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def event(self, level: str, kind: str, message: str, data: dict[str, Any]) -> None:
        self.told.append((kind, data))


def carry_out(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, *, fits_from: int
) -> tuple[list[tuple[int, str | None]], Events]:
    """Carries out a plan whose ranks have memory for `fits_from` parts of a step or more. Returns
    the parts and the checkpoint of each try, and what was told."""
    tries: list[tuple[int, str | None]] = []
    sink = Events()

    def run(tried: Plan, work: Any, control: Control) -> str:
        tries.append((tried.accumulate_steps, tried.resume_key))
        if tried.accumulate_steps < fits_from:
            raise RanksOutOfMemory
        return "done"

    def last_key(context: Context, *, goes_on: bool = False) -> str:
        assert goes_on, "points that were written after the checkpoint are dropped"
        return f"jobs/job/1/{10 * len(tries)}"

    monkeypatch.setattr(training, "run_in_ranks", run)
    monkeypatch.setattr(training, "last_key", last_key)
    monkeypatch.setattr(training, "remove_unregistered", lambda context: None)
    context = cast(Context, SimpleNamespace(sink=sink, control=Control()))
    assert training.carry_out(context, plan, sizes_unless_memory_ran_out) == "done"  # type: ignore[comparison-overlap]
    return tries, sink


def test_each_try_goes_on_from_the_last_checkpoint_with_parts_of_half_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, sink = carry_out(plan_of(tmp_path), monkeypatch, fits_from=4)
    assert tries == [(1, "jobs/job/1/5"), (2, "jobs/job/1/10"), (4, "jobs/job/1/20")]
    assert sink.told == [
        ("micro_batch_halved", {"accumulate_steps": 2}),
        ("micro_batch_halved", {"accumulate_steps": 4}),
    ]


@pytest.mark.parametrize(
    ("keys", "num_tries"),
    # Two ranks cut a batch of 16 into parts of 8, 4, 2 and 1; pairs that are mixed stay together.
    # One of 6 is cut into 3, 2 and 1, of which the last part of a step may have fewer.
    [({}, 4), ({"augment": ["mixup"]}, 3), ({"batch_size": 6}, 3)],
)
def test_parts_that_cannot_be_halved_any_more_fail_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], num_tries: int
) -> None:
    plan = plan_of(tmp_path, **keys)
    tries = 0

    def run(*args: object) -> None:
        nonlocal tries
        tries += 1
        raise RanksOutOfMemory

    monkeypatch.setattr(training, "run_in_ranks", run)
    monkeypatch.setattr(training, "last_key", lambda context, goes_on: None)
    monkeypatch.setattr(training, "remove_unregistered", lambda context: None)
    context = cast(Context, SimpleNamespace(sink=Events(), control=Control()))
    with pytest.raises(TrainingError) as caught:
        training.carry_out(context, plan, sizes_unless_memory_ran_out)
    assert caught.value.code == "cuda_out_of_memory"
    assert tries == num_tries


def test_the_bundle_says_what_the_job_asked_for(tmp_path: Path) -> None:
    smaller = plan_of(tmp_path).with_smaller_parts()
    assert smaller is not None
    assert smaller.learnt_spec.accumulate_steps == 2
    assert smaller.spec.accumulate_steps == 1
