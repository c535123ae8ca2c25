"""Several processes that carry out one plan together, on one machine.

Torch's elastic launcher starts them, and ends all when one dies. It gives each a session of its
own, out of reach of the signals that end this process's group: so every rank watches its parent
and leaves with it. The first rank reports to the database; all get the same plan.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shared import logs
from shared.database import Database
from shared.errors import AppError, TrainingError
from shared.hints import Hints
from shared.settings import get_settings
from shared.storage import Storage
from skipline.schemas import Progress
from worker.engine.distributed import Ranks
from worker.engine.events import (
    Cancelled,
    Control,
    Released,
    Request,
    TrainingCheckpoint,
)
from worker.jobs.plan import Plan, Work
from worker.sink import DatabaseSink

LOOK_SECONDS = 0.05
"""How often a request is passed on, and a rank looks for its parent."""
ORPHANED, FAILED = 70, 71
"""Exit codes of a rank whose parent is gone, and of one that failed."""
REQUESTS: tuple[Request | None, ...] = (None, "cancel", "release", "stop")
OUT_OF_MEMORY = "cuda_out_of_memory"
MAX_ERROR_BYTES = 16_384

T = TypeVar("T")


@dataclass(frozen=True)
class _Shared:
    """Memory that parent and ranks share. The parent writes the place of a request in `REQUESTS`;
    a rank that fails writes why, as JSON."""

    request: Any
    error: Any

    @staticmethod
    def new() -> _Shared:
        context = multiprocessing.get_context("spawn")
        return _Shared(context.RawArray("b", 1), context.RawArray("c", MAX_ERROR_BYTES))

    def write_error(self, code: str, message: str, hint: str) -> None:
        document = json.dumps([code, message[:2000], hint[:2000]]).encode()
        self.error.value = document[: MAX_ERROR_BYTES - 1]

    def read_error(self) -> tuple[str, str, str] | None:
        """None when no rank said why it ended, or was ended while it said so."""
        try:
            code, message, hint = json.loads(self.error.value)
        except ValueError:
            return None
        return code, message, hint


class RanksOutOfMemory(Exception):
    """Smaller parts of a batch may fit: none of the ranks could go on with a step that one of them
    had to give up."""


@dataclass(frozen=True)
class _Outcome:
    """How the first rank ended, in words that travel between processes."""

    kind: Literal["finished", "cancel", "release"]
    result: Any = None


def run_in_ranks(plan: Plan, work: Work[T], control: Control) -> T:
    """What `work` returns in the first of the plan's processes, each of which runs it.

    Raises:
        RanksOutOfMemory: the memory of one of them ran out; all have ended.
        TrainingError: as `work` raised it in one of them, or in all.
        ChildFailedError: one of them died, which it also does when another attempt owns the job.
        Cancelled, Released: as `work`.
    """
    shared = _Shared.new()
    with _passing_on(control, shared):
        try:
            return cast(T, _result_of(_launch(plan, work, shared)))
        except ChildFailedError as error:
            code = shared.read_error()
            if code is None:
                raise
            failure = TrainingError(*code)
            raise (RanksOutOfMemory if failure.code == OUT_OF_MEMORY else failure) from error


def _launch(plan: Plan, work: Work[Any], shared: _Shared) -> _Outcome:
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
        plan, work, shared, os.getpid()
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
    return outcome.result


@contextmanager
def _passing_on(control: Control, shared: _Shared) -> Iterator[None]:
    """Hands what this process is asked to do on to the ranks."""
    over = threading.Event()
    shared.request[0] = REQUESTS.index(control.look())

    def pass_on() -> None:
        while not over.wait(LOOK_SECONDS):
            shared.request[0] = REQUESTS.index(control.look())

    thread = threading.Thread(target=pass_on, name="ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---------------------------------------------------------------------------------- in each rank


def _rank_main(plan: Plan, work: Work[Any], shared: _Shared, parent_pid: int) -> _Outcome | None:
    """What a rank runs. One that fails leaves at once, without a word to the others, who may wait
    for it in the middle of a step: the launcher ends them."""
    _leave_with(parent_pid)
    try:
        outcome = _take_part(plan, work, shared)
    except BaseException as error:
        if isinstance(error, TrainingError):
            shared.write_error(error.code, error.message, error.hint)
        elif isinstance(error, AppError):
            shared.write_error(error.code, error.detail, error.title)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(FAILED)
    distributed.destroy_process_group()
    return outcome


def _take_part(plan: Plan, work: Work[Any], shared: _Shared) -> _Outcome | None:
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
    control = _SharedControl(shared)
    storage = Storage(settings.artifacts_path)
    if not ranks.is_first:
        _outcome_of(lambda: work(plan, storage, _Silent(), control, ranks))
        return None
    hints, database = Hints(settings), Database(settings.database)
    on_written = partial(hints.publish, plan.fence.job_id)
    with DatabaseSink(database, storage, plan.fence, control, on_written) as sink:
        plan.prepare(sink, settings)
        outcome = _outcome_of(lambda: work(plan, storage, sink, control, ranks))
        sink.flush()
        return outcome


def _outcome_of(work: Callable[[], Any]) -> _Outcome:
    """What all ranks come to together is an answer, not an error."""
    try:
        return _Outcome("finished", work())
    except Cancelled:
        return _Outcome("cancel")
    except Released:
        return _Outcome("release")


def _leave_with(parent_pid: int) -> None:
    """Ends this process as soon as its parent is gone, wherever it is."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(LOOK_SECONDS)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class _SharedControl(Control):
    """What the parent was asked to do."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    def look(self) -> Request | None:
        return self.request or REQUESTS[self._shared.request[0]]


class _Silent:
    """The sink of the ranks that do not report."""

    def metrics(self, values: Mapping[str, float], *, step: int, epoch: int) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def event(
        self, level: Literal["info", "warning"], kind: str, message: str, data: Mapping[str, Any]
    ) -> None: ...

    def save_checkpoint(self, checkpoint: TrainingCheckpoint) -> None: ...
