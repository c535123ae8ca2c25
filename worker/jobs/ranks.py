"""Several processes that carry out one plan together, on one machine.

Torch's elastic launcher starts them, and ends all when one dies. It gives each a session of its
own, out of reach of the signals that end this process's group: so every rank watches its parent
and leaves with it. The first rank reports to the database; all get the same plan.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shared import logs
from shared.database import Database
from shared.errors import TrainingError
from shared.settings import get_settings
from shared.storage import Storage
from skipline.schemas import Progress
from worker.engine.distributed import Ranks
from worker.engine.events import (
    Cancelled,
    Control,
    Released,
    Request,
    Sink,
    TrainingCheckpoint,
)
from worker.jobs.plan import Plan, Work
from worker.sink import DatabaseSink

LOOK_SECONDS = 0.05
"""How often a request is passed on, and a rank looks for its parent."""
ORPHANED = 70
"""Exit code of a rank whose parent is gone."""
REQUEST, OUT_OF_MEMORY = 0, 1
"""Places in the bytes that parent and ranks share."""
REQUESTS: tuple[Request | None, ...] = (None, "cancel", "release")

T = TypeVar("T")
Flags = Any
"""Shared bytes: the parent writes the request, a rank that its memory ran out."""


class RanksOutOfMemory(Exception):
    """Smaller parts of a batch may fit: none of the ranks could go on with a step that one of them
    had to give up."""


@dataclass(frozen=True)
class _Outcome:
    """How the first rank ended, in words that travel between processes."""

    kind: Literal["finished", "cancel", "release", "failed"]
    result: Any = None
    error: tuple[str, str, str] | None = None


def run_in_ranks(plan: Plan, work: Work[T], control: Control) -> T:
    """What `work` returns in the first of the plan's processes, each of which runs it.

    Raises:
        RanksOutOfMemory: the memory of one of them ran out; all have ended.
        ChildFailedError: one of them died, which it also does when another attempt owns the job.
        As `work` else.
    """
    flags = multiprocessing.get_context("spawn").RawArray("b", 2)
    with _passing_on(control, flags):
        try:
            return cast(T, _result_of(_launch(plan, work, flags)))
        except ChildFailedError as error:
            if flags[OUT_OF_MEMORY]:
                raise RanksOutOfMemory from error
            raise


def _launch(plan: Plan, work: Work[Any], flags: Flags) -> _Outcome:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=plan.runtime.num_processes,
        run_id=plan.fence.owner,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="spawn",
    )
    answers: Mapping[int, _Outcome | None] = elastic_launch(config, _rank_main)(
        plan, work, flags, os.getpid()
    )
    outcome = answers[0]
    assert outcome is not None, "the first rank says how it ended"
    return outcome


def _result_of(outcome: _Outcome) -> Any:
    match outcome.kind:
        case "cancel":
            raise Cancelled
        case "release":
            raise Released
        case "failed":
            assert outcome.error is not None
            raise TrainingError(*outcome.error)
    return outcome.result


@contextmanager
def _passing_on(control: Control, flags: Flags) -> Iterator[None]:
    """Hands what this process is asked to do on to the ranks."""
    over = threading.Event()

    def pass_on() -> None:
        while not over.wait(LOOK_SECONDS):
            flags[REQUEST] = REQUESTS.index(control.look())

    thread = threading.Thread(target=pass_on, name="ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---------------------------------------------------------------------------------- in each rank


def _rank_main(plan: Plan, work: Work[Any], flags: Flags, parent_pid: int) -> _Outcome | None:
    """What a rank runs."""
    _leave_with(parent_pid)
    settings = get_settings()
    logs.configure(settings)
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if plan.runtime.device == "cuda":
        torch.cuda.set_device(ranks.rank)
    plan.runtime.activate(deterministic=plan.spec.deterministic)
    if sys.platform == "linux":  # All ranks are on this machine: no other network is of use.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if plan.runtime.device == "cuda" else "gloo"
    )
    control = _SharedControl(flags)
    storage = Storage(settings.artifacts_path)
    try:
        if not ranks.is_first:
            _outcome_of(work, plan, storage, _Silent(), control, ranks, flags)
            return None
        database = Database(settings.database)
        with DatabaseSink(database, storage, plan.fence, control) as sink:
            plan.prepare(sink)
            outcome = _outcome_of(work, plan, storage, sink, control, ranks, flags)
            sink.flush()
            return outcome
    finally:
        distributed.destroy_process_group()


def _outcome_of(
    work: Work[Any],
    plan: Plan,
    storage: Storage,
    sink: Sink,
    control: Control,
    ranks: Ranks,
    flags: Flags,
) -> _Outcome:
    """What all ranks find alike is an answer. What one of them meets alone is raised, and ends
    them all."""
    try:
        return _Outcome("finished", work(plan, storage, sink, control, ranks))
    except Cancelled:
        return _Outcome("cancel")
    except Released:
        return _Outcome("release")
    except TrainingError as error:
        if error.code == "cuda_out_of_memory":
            flags[OUT_OF_MEMORY] = 1
            raise
        return _Outcome("failed", error=(error.code, error.message, error.hint))


def _leave_with(parent_pid: int) -> None:
    """Ends this process as soon as its parent is gone, wherever it is."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(LOOK_SECONDS)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class _SharedControl(Control):
    """What the parent was asked to do."""

    def __init__(self, flags: Flags) -> None:
        self._flags = flags

    def look(self) -> Request | None:
        return self.request or REQUESTS[self._flags[REQUEST]]


class _Silent:
    """The sink of the ranks that do not report."""

    def metrics(self, values: Mapping[str, float], *, step: int, epoch: int) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def event(
        self, level: Literal["info", "warning"], kind: str, message: str, data: Mapping[str, Any]
    ) -> None: ...

    def save_checkpoint(self, checkpoint: TrainingCheckpoint) -> None: ...
