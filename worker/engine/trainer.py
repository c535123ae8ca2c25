"""The training loop.

It reports to a `Sink` and looks at a `Control`; it knows nothing of databases, files, signals or
processes. Within an epoch the host of a single process never waits for the device, except to write
the means of a log window. Whatever is random derives from the seed and the place in the run, and a
checkpoint holds all else, so that a resumed run ends with the bits of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import nn

from shared.errors import TrainingError
from shared.vision.architectures import build_model
from shared.vision.bundle import Weights
from shared.vision.preprocessing import Preprocessing
from skipline.schemas import Progress
from skipline.specs import TrainSpec
from worker.engine.data import (
    Batch,
    DeviceData,
    Purpose,
    Rows,
    SplitData,
    epoch_generator,
    epoch_order,
)
from worker.engine.distributed import ALONE, Ranks
from worker.engine.evaluate import Evaluation, evaluate
from worker.engine.events import Cancelled, Control, Released, Sink, TrainingCheckpoint
from worker.engine.learner import Learner
from worker.engine.optim import Schedule
from worker.engine.runtime import Runtime, typed_failures

PROGRESS_SECONDS = 1.0
"""Progress is told no more often than this."""
RATE_SECONDS = 20.0
"""Images per second are measured over about this long."""

EarlyEnd = Literal["user", "early_stopping", "time_budget"]


@dataclass(frozen=True)
class Resume:
    """Where a training goes on: what `read_bundle` and `load_resume` gave for one checkpoint."""

    weights: Weights
    state: Mapping[str, Any]


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint whose monitored metric is best."""

    epoch: int
    step: int
    value: float


@dataclass(frozen=True)
class FitResult:
    """A training that came to its end; `metrics` are those of the last validation, `stop_reason`
    says why it came before the last epoch."""

    epoch: int
    step: int
    metrics: Mapping[str, float]
    best: BestCheckpoint
    stop_reason: EarlyEnd | None = None


def new_model(spec: TrainSpec, num_classes: int) -> nn.Module:
    """The network that a training starts from; its weights derive from the spec's seed."""
    assert spec.image_size is not None, "the spec is not resolved"
    torch.manual_seed(spec.seed)
    return build_model(spec.model, num_classes, spec.image_size)


def fit(
    spec: TrainSpec,
    model: nn.Module,
    train: SplitData,
    val: SplitData,
    preprocessing: Preprocessing,
    runtime: Runtime,
    sink: Sink,
    control: Control,
    resume: Resume | None = None,
    ranks: Ranks = ALONE,
) -> FitResult:
    """Trains `model` in place by a resolved spec and validates it after each epoch.

    `runtime` is active already. `images_per_second` is written with each `train_loss`, over the
    same steps and without validation and checkpoints; `epoch_seconds` includes validation. Of
    several `ranks` each calls this with the same arguments, but that the first one's sink and
    control alone are heard.

    Raises:
        Cancelled: as asked by `control`.
        Released: as asked by `control`, after a checkpoint of what was done since the last.
        TrainingError: `nan_loss`, `cuda_out_of_memory`, `batch_too_small`, `not_deterministic`.
    """
    with typed_failures():
        trainer = Trainer(spec, model, train, val, preprocessing, runtime, sink, control, ranks)
        if resume is not None:
            trainer.load(resume)
        return trainer.run()


class _Decision(IntEnum):
    """What to do before the next batch, on all ranks alike."""

    go_on = 0
    cancel = 1
    release = 2
    stop = 3
    checkpoint = 4
    time_is_over = 5


_ENDS: dict[_Decision, EarlyEnd] = {_Decision.stop: "user", _Decision.time_is_over: "time_budget"}
"""Decisions to train no more steps."""


class _Window:
    """Sums over the steps since metrics were last written: loss and number of right answers. They
    stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)
        self.num_steps = 0

    def add(self, sums: torch.Tensor) -> None:
        self.sums += sums
        self.num_steps += 1

    def clear(self) -> None:
        self.sums.zero_()
        self.num_steps = 0


class _Clock:
    """Training speed by the host's clock, over the last steps done without a pause.

    A GPU lags behind the host by a bounded number of steps, which evens out over the span.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()
        self.steps_per_second: float | None = None

    def restart(self) -> None:
        """Training goes on after something else."""
        self._marks.clear()

    def mark(self, step: int) -> None:
        """`step` steps are done."""
        now = time.perf_counter()
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[1][0] > RATE_SECONDS:
            self._marks.popleft()
        start, first_step = self._marks[0]
        if step > first_step:
            self.steps_per_second = (step - first_step) / (now - start)


class Trainer:
    """A run in progress. `step` counts the optimizer steps done, `epoch` the epochs that are
    trained and validated: the two say where in the run it stands."""

    def __init__(
        self,
        spec: TrainSpec,
        model: nn.Module,
        train: SplitData,
        val: SplitData,
        preprocessing: Preprocessing,
        runtime: Runtime,
        sink: Sink,
        control: Control,
        ranks: Ranks = ALONE,
    ) -> None:
        device = runtime.torch_device
        self.spec, self.runtime, self.sink, self.control = spec, runtime, sink, control
        self.ranks = ranks
        if spec.sanity_check:
            val = val.first(spec.batch_size)
        self.num_train = len(train)
        self.batch_size = batch_size_of(spec, len(train))
        self.steps_per_epoch = 1 if spec.sanity_check else max(1, len(train) // self.batch_size)
        self.num_steps = spec.epochs * self.steps_per_epoch
        self.learner = Learner(
            spec, model, preprocessing, runtime, ranks, self.batch_size // ranks.size
        )
        self.train_data = DeviceData(train, device, runtime.data_path)
        self.val_data = DeviceData(val, device, runtime.data_path)
        num_parts = 1 if ranks.size == 1 else ranks.size * spec.accumulate_steps
        self.val_batch_size = max(1, spec.batch_size // num_parts)
        self.schedule = Schedule(
            spec.scheduler,
            spec.optimizer.lr,
            steps_per_epoch=self.steps_per_epoch,
            num_epochs=spec.epochs,
        )
        self.step = self.epoch = 0
        self.window = _Window(device)
        self.metrics: dict[str, float] = {}
        self.best: BestCheckpoint | None = None
        self.patience = Patience(spec)
        self.stop_reason: EarlyEnd | None = None
        self.last_finite_loss: float | None = None
        self.epoch_seconds = 0.0
        self.seconds_before = 0.0
        self.saved_at = (0, 0)
        self.stored_validation = False

        # Clocks of this process, of no consequence to the result.
        self.clock = _Clock()
        self.between_epochs_seconds = 0.0
        self.begun = self.checkpoint_time = time.monotonic()
        self.progress_time = -math.inf
        self.window_start = (0.0, 0)

    # The run

    def run(self) -> FitResult:
        try:
            while self.epoch < self.spec.epochs and self.stop_reason is None:
                self.run_epoch()
        except Released:
            if self.saved_at != (self.step, self.epoch):
                self.save_checkpoint({})
            raise
        if self.saved_at != (self.step, self.epoch) or not self.stored_validation:
            self.save_checkpoint(self.metrics)
        self.tell_progress()
        assert self.best is not None, "the last validation is always stored"
        return FitResult(self.epoch, self.step, self.metrics, self.best, self.stop_reason)

    def run_epoch(self) -> None:
        """The rest of the epoch that the run stands in: steps, validation, metrics, checkpoint."""
        start = time.perf_counter() - self.epoch_seconds
        first_step = self.epoch * self.steps_per_epoch
        self.train_epoch(start)
        if self.step == first_step and self.metrics:
            return  # It ended before it began, with weights that are validated already.
        trained = time.perf_counter()
        evaluation = self.validate()
        self.epoch_seconds = time.perf_counter() - start
        self.finish_epoch(evaluation)
        self.between_epochs_seconds = time.perf_counter() - trained

    def train_epoch(self, start: float) -> None:
        first = self.step - self.epoch * self.steps_per_epoch
        self.restart_clocks()
        for batch, draws, seed in self.epoch_batches(self.epoch + 1, first):
            decision = self.decide()
            if decision in _ENDS:
                self.stop_reason = _ENDS[decision]
                self.write_window()
                return
            if decision is _Decision.checkpoint:
                self.save_checkpoint({})
                self.restart_clocks()
            self.train_step(batch, draws, seed)
            self.clock.mark(self.step)
            is_last = self.step % self.steps_per_epoch == 0
            if is_last or self.step % self.spec.log_every_steps == 0:
                self.write_window()
            self.epoch_seconds = time.perf_counter() - start

    def epoch_batches(self, epoch: int, first: int) -> Iterator[tuple[Batch, torch.Tensor, int]]:
        """This rank's part of the epoch's batches from number `first` on, with the draws of each
        one's samples and the seed for what the network draws. All is drawn for the whole epoch,
        wherever it starts."""
        seed = self.spec.seed
        order = epoch_order(seed, epoch, self.num_train)
        draws = self.learner.augment.draw(seed, epoch, self.num_train)
        generator = epoch_generator(seed, epoch, Purpose.dropout)
        network_seeds = generator.integers(2**32, size=self.steps_per_epoch)[first:]
        samples = [
            rank_part(order, step * self.batch_size, self.batch_size, self.ranks)
            for step in range(first, self.steps_per_epoch)
        ]
        batches = self.train_data.batches(samples)
        for batch, network_seed in zip(batches, network_seeds.tolist(), strict=True):
            yield batch, draws[batch.samples], network_seed

    def train_step(self, batch: Batch, draws: torch.Tensor, seed: int) -> None:
        number = self.step + 1
        lr = self.schedule.lr(number)
        while True:
            try:
                sums = self.learner.step(batch, draws, lr, seed, number)
                break
            except torch.OutOfMemoryError:
                # Other ranks are in the middle of a step that this one cannot join again.
                if self.ranks.size > 1 or not self.learner.halve():
                    raise
            torch.cuda.empty_cache()
            self.tell_halved()
        self.step = number
        self.window.add(sums)

    def validate(self) -> Evaluation:
        return self.validate_on(self.val_data)

    def validate_on(self, data: DeviceData) -> Evaluation:
        evaluation = evaluate(
            self.learner.served,
            data,
            self.learner.normalize,
            self.runtime,
            batch_size=self.val_batch_size,
            before_batch=lambda done, total: self.decide(),
            ranks=self.ranks,
        )
        self.require_finite(evaluation.loss, "validation")
        return evaluation

    def finish_epoch(self, evaluation: Evaluation) -> None:
        self.epoch += 1
        self.metrics = {
            "val_loss": evaluation.loss,
            "val_top1": evaluation.top1,
            "val_top5": evaluation.top5,
        }
        values = self.metrics | {"epoch_seconds": self.epoch_seconds}
        if self.runtime.device == "cuda":
            values["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        self.sink.metrics(values, step=self.step, epoch=self.epoch)
        self.epoch_seconds = 0.0
        if self.schedule.observe(evaluation.loss, self.step):
            lr = self.schedule.lr(self.step + 1)
            self.sink.event(
                "info", "lr_reduced", f"The learning rate is {lr:g} from now on", {"lr": lr}
            )
        is_last = self.epoch == self.spec.epochs
        if self.patience.is_over(self.metrics) and not is_last and self.stop_reason != "user":
            self.stop_reason = "early_stopping"
        is_due = self.epoch % self.spec.checkpoint.every_epochs == 0
        if is_due or is_last or self.stop_reason or self.is_kept():
            self.save_checkpoint(self.metrics)

    # What is told

    @property
    def current_epoch(self) -> int:
        """The epoch that `step` belongs to, from 1."""
        return max(1, -(-self.step // self.steps_per_epoch))

    def decide(self) -> _Decision:
        """Before every batch: what to do next. Tells progress once a second.

        Raises:
            Cancelled, Released: so the control says.
        """
        decision = _Decision(self.ranks.agree(self.wish()))
        if decision is _Decision.cancel:
            raise Cancelled
        if decision is _Decision.release:
            raise Released
        now = time.monotonic()
        if now - self.progress_time >= PROGRESS_SECONDS:
            self.progress_time = now
            self.tell_progress()
        return decision

    def wish(self) -> _Decision:
        """What this rank would do; the first one's counts."""
        request = self.control.look()
        if request is not None:
            return _Decision[request]
        budget = self.spec.time_budget_seconds
        if budget is not None and self.step and self.training_seconds > budget:
            return _Decision.time_is_over
        is_stored = self.saved_at == (self.step, self.epoch)
        return (
            _Decision.checkpoint if self.is_checkpoint_old() and not is_stored else _Decision.go_on
        )

    @property
    def training_seconds(self) -> float:
        """Of all attempts together."""
        return self.seconds_before + time.monotonic() - self.begun

    def tell_progress(self) -> None:
        rate = self.clock.steps_per_second
        eta_seconds = None
        if rate is not None:
            num_validations = self.spec.epochs - self.epoch
            eta_seconds = (self.num_steps - self.step) / rate
            eta_seconds += num_validations * self.between_epochs_seconds
            if self.spec.time_budget_seconds is not None:
                left = max(0.0, self.spec.time_budget_seconds - self.training_seconds)
                eta_seconds = min(eta_seconds, left)
            if self.stop_reason is not None:
                eta_seconds = 0.0
        self.sink.progress(
            Progress(
                step=self.step,
                num_steps=self.num_steps,
                epoch=self.current_epoch,
                num_epochs=self.spec.epochs,
                eta_seconds=eta_seconds,
                images_per_second=None if rate is None else rate * self.batch_size,
            )
        )

    def tell_halved(self) -> None:
        num_parts, size = self.learner.accumulate_steps, self.learner.part_size
        self.sink.event(
            "warning",
            "micro_batch_halved",
            f"The GPU's memory ran out: each step is made of {num_parts} passes of {size} images "
            "from now on. The batch stays as it was",
            {"accumulate_steps": num_parts, "micro_batch_size": size},
        )

    def restart_clocks(self) -> None:
        """Training goes on after something else."""
        self.clock.restart()
        self.clock.mark(self.step)
        self.window_start = (time.perf_counter(), self.step)

    def write_window(self) -> None:
        """Writes the means since the last time, if there was a step. Here the host waits for the
        device."""
        if not self.window.num_steps:
            return
        loss, top1 = self.read_window()
        start, first_step = self.window_start
        now = time.perf_counter()
        values = {"train_loss": loss, "train_top1": top1, "lr": self.schedule.lr(self.step)}
        if self.step > first_step:  # Resuming leaves nothing to measure by.
            images = (self.step - first_step) * self.batch_size
            values["images_per_second"] = images / (now - start)
        self.sink.metrics(values, step=self.step, epoch=self.current_epoch)
        self.last_finite_loss = loss
        self.window.clear()
        self.window_start = (now, self.step)

    def read_window(self) -> tuple[float, float]:
        """Mean loss and top-1 of the window, of at least one step."""
        num_images = self.window.num_steps * self.batch_size
        loss, top1 = (self.ranks.sum_(self.window.sums.clone()) / num_images).tolist()
        self.require_finite(loss, "training")
        return loss, top1

    def require_finite(self, loss: float, what: str) -> None:
        if math.isfinite(loss):
            return
        lr = self.schedule.lr(max(1, self.step))
        last = "none" if self.last_finite_loss is None else f"{self.last_finite_loss:.4g}"
        raise TrainingError(
            "nan_loss",
            f"The {what} loss is {loss} at step {self.step} with lr {lr:g}; "
            f"the last finite training loss was {last}",
            "Lower optimizer.lr (try a tenth), lengthen scheduler.warmup_epochs, or set "
            "gradient_clip_norm to 1",
        )

    # Checkpoints

    def is_checkpoint_old(self) -> bool:
        age_seconds = time.monotonic() - self.checkpoint_time
        return age_seconds > 60 * self.spec.checkpoint.every_minutes

    def save_checkpoint(self, metrics: Mapping[str, float]) -> None:
        """`metrics` are of these weights, and empty before they were validated."""
        if self.window.num_steps:  # never store weights that went wrong within the window
            self.read_window()
        self.saved_at, self.stored_validation = (self.step, self.epoch), bool(metrics)
        is_best = bool(metrics) and self.is_best(metrics[self.spec.checkpoint.monitor])
        if is_best:
            value = metrics[self.spec.checkpoint.monitor]
            self.best = BestCheckpoint(self.epoch, self.step, value)
        self.sink.save_checkpoint(
            TrainingCheckpoint(
                epoch=self.current_epoch,
                step=self.step,
                metrics=dict(metrics),
                is_best=is_best,
                is_kept=bool(metrics) and self.is_kept(),
                weights=self.learner.weights(),
                resume=self.state_dict(),
            )
        )
        self.checkpoint_time = time.monotonic()

    def is_best(self, value: float) -> bool:
        """The first of equals stays the best."""
        return self.best is None or improves(self.spec, value, self.best.value)

    def is_kept(self) -> bool:
        """Whether these weights end an epoch, that is validated, whose checkpoint is kept."""
        every = self.spec.checkpoint.keep_every_epochs
        is_whole = self.step == self.epoch * self.steps_per_epoch
        return every is not None and is_whole and self.epoch % every == 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "learner": self.learner.state_dict(),
            "schedule": self.schedule.state_dict(),
            "window_sums": torch.stack(self.ranks.gather(self.window.sums.cpu())),
            "window_num_steps": self.window.num_steps,
            "metrics": self.metrics,
            "best": None if self.best is None else asdict(self.best),
            "patience": self.patience.state_dict(),
            # Asked to leave while validating the last weights, the next attempt validates them.
            "stop_reason": self.stop_reason if self.stored_validation else None,
            "last_finite_loss": self.last_finite_loss,
            "epoch_seconds": self.epoch_seconds,
            "training_seconds": self.training_seconds,
            "stored_validation": self.stored_validation,
        }

    def load(self, resume: Resume) -> None:
        state = resume.state
        self.learner.load(resume.weights, state["learner"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.window.sums.copy_(state["window_sums"][self.ranks.rank])
        self.window.num_steps = state["window_num_steps"]
        self.metrics = state["metrics"]
        self.best = None if state["best"] is None else BestCheckpoint(**state["best"])
        self.patience.load_state_dict(state["patience"])
        self.stop_reason = state["stop_reason"]
        self.last_finite_loss = state["last_finite_loss"]
        self.epoch_seconds = state["epoch_seconds"]
        self.seconds_before = state["training_seconds"]
        if self.stop_reason == "user" and not self.ranks.agree(self.control.look() == "stop"):
            # Another job goes on where one was stopped: with the epoch that was broken off.
            self.stop_reason, self.epoch = None, self.step // self.steps_per_epoch
        self.saved_at = (self.step, self.epoch)
        self.stored_validation = state["stored_validation"]
        self.sink.event(
            "info",
            "resumed",
            f"Goes on after step {self.step} of {self.num_steps}",
            {"step": self.step, "num_steps": self.num_steps},
        )


class Patience:
    """Early stopping: counts the validations since the monitored metric was best."""

    def __init__(self, spec: TrainSpec) -> None:
        self._spec = spec
        self._best: float | None = None
        self._num_bad = 0

    def is_over(self, metrics: Mapping[str, float]) -> bool:
        """Takes note of a validation; true if training shall end. Never without a spec for it."""
        early = self._spec.early_stopping
        if early is None:
            return False
        value = metrics[self._spec.checkpoint.monitor]
        if self._best is None or improves(self._spec, value, self._best, early.min_delta):
            self._best, self._num_bad = value, 0
        else:
            self._num_bad += 1
        return self._num_bad >= early.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "num_bad": self._num_bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._num_bad = state["best"], state["num_bad"]


def improves(spec: TrainSpec, value: float, best: float, by: float = 0.0) -> bool:
    """Whether a value of the monitored metric is better than `best` by more than `by`."""
    return value < best - by if spec.checkpoint.mode == "min" else value > best + by


def batch_size_of(spec: TrainSpec, num_samples: int) -> int:
    """Images of one optimizer step. Fewer samples than a batch make one batch of them all, less
    what cannot be shared out evenly.

    Raises:
        TrainingError: `batch_too_small`, with fewer samples than parts of a batch.
    """
    if num_samples >= spec.batch_size:
        return spec.batch_size
    num_parts = spec.accumulate_steps * spec.resources.num_processes
    unit = 1 if num_parts == 1 else num_parts * spec.part_unit
    if num_samples < unit:
        raise TrainingError(
            "batch_too_small",
            f"{num_samples} images cannot be shared out to {num_parts} parts of a batch",
            "Lower accumulate_steps or resources.num_processes",
        )
    return num_samples // unit * unit


def rank_part(order: Rows, start: int, length: int, ranks: Ranks) -> Rows:
    """This rank's samples of the batch of `length` that begins at `start` of the order."""
    share = length // ranks.size
    return order[start + ranks.rank * share :][:share]
