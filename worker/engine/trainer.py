"""The training loop.

It reports to a `Sink` and looks at a `Control`; it knows nothing of databases, files, signals or
processes. Within an epoch the host never waits for the device, except to write the means of a log
window. Whatever is random derives from the seed and the place in the run, and a checkpoint holds
all else, so that a resumed run ends with the bits of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shared.errors import TrainingError
from shared.vision.architectures import build_model
from shared.vision.bundle import Weights
from shared.vision.preprocessing import Normalizer, Preprocessing
from skipline.schemas import Progress
from skipline.specs import TrainSpec
from worker.engine.augment import Augmentation
from worker.engine.data import (
    ArrayData,
    Batch,
    DeviceData,
    Purpose,
    epoch_generator,
    epoch_order,
    steps_per_epoch,
)
from worker.engine.evaluate import Evaluation, evaluate
from worker.engine.events import Control, Released, Sink, TrainingCheckpoint
from worker.engine.optim import Schedule, build_optimizer, set_lr
from worker.engine.runtime import Runtime, typed_failures

PROGRESS_SECONDS = 1.0
"""Progress is told no more often than this."""
RATE_SECONDS = 20.0
"""Images per second are measured over about this long."""


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
    """A training that came to its end; `metrics` are those of the last validation."""

    epoch: int
    step: int
    metrics: Mapping[str, float]
    best: BestCheckpoint


def new_model(spec: TrainSpec, num_classes: int) -> nn.Module:
    """The network that a training starts from; its weights derive from the spec's seed."""
    assert spec.image_size is not None, "the spec is not resolved"
    torch.manual_seed(spec.seed)
    return build_model(spec.model, num_classes, spec.image_size)


def fit(
    spec: TrainSpec,
    model: nn.Module,
    train: ArrayData,
    val: ArrayData,
    preprocessing: Preprocessing,
    runtime: Runtime,
    sink: Sink,
    control: Control,
    resume: Resume | None = None,
) -> FitResult:
    """Trains `model` in place by a resolved spec and validates it after each epoch.

    `runtime` is active already. `images_per_second` is written with each `train_loss`, over the
    same steps and without validation and checkpoints; `epoch_seconds` includes validation.

    Raises:
        Cancelled: as asked by `control`.
        Released: as asked by `control`, after a checkpoint of what was done since the last.
        TrainingError: `nan_loss`, `cuda_out_of_memory`, `batch_too_small`, `not_deterministic`.
    """
    with typed_failures():
        trainer = _Trainer(spec, model, train, val, preprocessing, runtime, sink, control)
        if resume is not None:
            trainer.load(resume)
        return trainer.run()


class _Window:
    """Sums over the steps since metrics were last written: loss and share of right answers. They
    stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)
        self.num_steps = 0

    def add(self, loss: torch.Tensor, top1: torch.Tensor) -> None:
        self.sums += torch.stack((loss, top1))
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


class _Trainer:
    """A run in progress. `step` counts the optimizer steps done, `epoch` the epochs that are
    trained and validated: the two say where in the run it stands."""

    def __init__(
        self,
        spec: TrainSpec,
        model: nn.Module,
        train: ArrayData,
        val: ArrayData,
        preprocessing: Preprocessing,
        runtime: Runtime,
        sink: Sink,
        control: Control,
    ) -> None:
        device = runtime.torch_device
        self.spec, self.runtime, self.sink, self.control = spec, runtime, sink, control
        self.model = model.to(device).train()
        if spec.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.train_data, self.val_data = DeviceData(train, device), DeviceData(val, device)
        self.batch_size = min(spec.batch_size, len(train))
        self.steps_per_epoch = steps_per_epoch(len(train), spec.batch_size)
        self.num_steps = spec.epochs * self.steps_per_epoch
        self.augment = Augmentation(spec.augment, preprocessing.image_size)
        self.normalize = Normalizer(preprocessing, device, spec.channels_last)
        self.optimizer = build_optimizer(spec.optimizer, self.model)
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
        self.last_finite_loss: float | None = None
        self.epoch_seconds = 0.0
        self.saved_at = (0, 0)

        # Clocks of this process, of no consequence to the result.
        self.clock = _Clock()
        self.between_epochs_seconds = 0.0
        self.checkpoint_time = time.monotonic()
        self.progress_time = -math.inf
        self.window_start = (0.0, 0)

    # The run

    def run(self) -> FitResult:
        try:
            while self.epoch < self.spec.epochs:
                self.run_epoch()
        except Released:
            if self.saved_at != (self.step, self.epoch):
                self.save_checkpoint({})
            raise
        self.tell_progress()
        assert self.best is not None, "the last epoch always writes a checkpoint"
        return FitResult(self.epoch, self.step, self.metrics, self.best)

    def run_epoch(self) -> None:
        """The rest of the epoch that the run stands in: steps, validation, metrics, checkpoint."""
        start = time.perf_counter() - self.epoch_seconds
        self.train_epoch(start)
        trained = time.perf_counter()
        evaluation = self.validate()
        self.epoch_seconds = time.perf_counter() - start
        self.finish_epoch(evaluation)
        self.between_epochs_seconds = time.perf_counter() - trained

    def train_epoch(self, start: float) -> None:
        """Its augmentation and dropout are drawn for the epoch at once, wherever it starts."""
        seed, epoch, size = self.spec.seed, self.epoch + 1, len(self.train_data)
        device = self.runtime.torch_device
        order = epoch_order(seed, epoch, size)[: self.steps_per_epoch * self.batch_size]
        draws = self.augment.draw(seed, epoch, size).to(device)
        dropout_seeds = epoch_generator(seed, epoch, Purpose.dropout).integers(
            2**32, size=self.steps_per_epoch
        )
        first = self.step - self.epoch * self.steps_per_epoch
        batches = self.train_data.batches(order, self.batch_size, first)
        self.restart_clocks()
        for index, batch in enumerate(batches, start=first):
            self.look_outside()
            if self.spec.model.dropout:
                _seed_device(device, int(dropout_seeds[index]))
            self.train_step(batch, draws[batch.indices])
            self.clock.mark(self.step)
            is_last = index + 1 == self.steps_per_epoch
            if is_last or self.step % self.spec.log_every_steps == 0:
                self.write_window()
            self.epoch_seconds = time.perf_counter() - start
            if not is_last and self.is_checkpoint_old():
                self.save_checkpoint({})
                self.restart_clocks()

    def train_step(self, batch: Batch, draws: torch.Tensor) -> None:
        set_lr(self.optimizer, self.schedule.lr(self.step + 1))
        x = self.normalize(self.augment(batch.images, draws))
        with self.runtime.autocast():
            logits = self.model(x).float()
        loss = functional.cross_entropy(
            logits, batch.labels, label_smoothing=self.spec.loss.label_smoothing
        )
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            top1 = (logits.argmax(dim=1) == batch.labels).float().mean()
            self.window.add(loss.detach(), top1)

    def validate(self) -> Evaluation:
        evaluation = evaluate(
            self.model,
            self.val_data,
            self.normalize,
            self.runtime,
            batch_size=self.spec.batch_size,
            before_batch=lambda done, total: self.look_outside(),
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
        if self.epoch % self.spec.checkpoint.every_epochs == 0 or self.epoch == self.spec.epochs:
            self.save_checkpoint(self.metrics)

    # What is told

    @property
    def current_epoch(self) -> int:
        """The epoch that `step` belongs to, from 1."""
        return max(1, -(-self.step // self.steps_per_epoch))

    def look_outside(self) -> None:
        """Before every batch: obeys the control, and tells progress once a second."""
        self.control.check()
        now = time.monotonic()
        if now - self.progress_time >= PROGRESS_SECONDS:
            self.progress_time = now
            self.tell_progress()

    def tell_progress(self) -> None:
        rate = self.clock.steps_per_second
        eta_seconds = None
        if rate is not None:
            num_validations = self.spec.epochs - self.epoch
            eta_seconds = (self.num_steps - self.step) / rate
            eta_seconds += num_validations * self.between_epochs_seconds
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

    def restart_clocks(self) -> None:
        """Training goes on after something else."""
        self.clock.restart()
        self.clock.mark(self.step)
        self.window_start = (time.perf_counter(), self.step)

    def write_window(self) -> None:
        """Writes the means since the last time. Here the host waits for the device."""
        loss, top1 = self.read_window()
        start, first_step = self.window_start
        now = time.perf_counter()
        images = (self.step - first_step) * self.batch_size
        values = {
            "train_loss": loss,
            "train_top1": top1,
            "lr": self.schedule.lr(self.step),
            "images_per_second": images / (now - start),
        }
        self.sink.metrics(values, step=self.step, epoch=self.current_epoch)
        self.last_finite_loss = loss
        self.window.clear()
        self.window_start = (now, self.step)

    def read_window(self) -> tuple[float, float]:
        """Mean loss and top-1 of the window, of at least one step."""
        loss, top1 = (self.window.sums / self.window.num_steps).tolist()
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
            "Lower optimizer.lr (try a tenth) or lengthen scheduler.warmup_epochs",
        )

    # Checkpoints

    def is_checkpoint_old(self) -> bool:
        age_seconds = time.monotonic() - self.checkpoint_time
        return age_seconds > 60 * self.spec.checkpoint.every_minutes

    def save_checkpoint(self, metrics: Mapping[str, float]) -> None:
        """`metrics` are of these weights, and empty before they were validated."""
        if self.window.num_steps:  # never store weights that went wrong within the window
            self.read_window()
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
                weights=self.model.state_dict(),
                resume=self.state_dict(),
            )
        )
        self.saved_at = (self.step, self.epoch)
        self.checkpoint_time = time.monotonic()

    def is_best(self, value: float) -> bool:
        """The first of equals stays the best."""
        if self.best is None:
            return True
        if self.spec.checkpoint.mode == "min":
            return value < self.best.value
        return value > self.best.value

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "window_sums": self.window.sums,
            "window_num_steps": self.window.num_steps,
            "metrics": self.metrics,
            "best": None if self.best is None else asdict(self.best),
            "last_finite_loss": self.last_finite_loss,
            "epoch_seconds": self.epoch_seconds,
        }

    def load(self, resume: Resume) -> None:
        state = resume.state
        self.model.load_state_dict(resume.weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.window.sums.copy_(state["window_sums"])
        self.window.num_steps = state["window_num_steps"]
        self.metrics = state["metrics"]
        self.best = None if state["best"] is None else BestCheckpoint(**state["best"])
        self.last_finite_loss = state["last_finite_loss"]
        self.epoch_seconds = state["epoch_seconds"]
        self.saved_at = (self.step, self.epoch)
        self.sink.event(
            "info",
            "resumed",
            f"Goes on after step {self.step} of {self.num_steps}",
            {"step": self.step, "num_steps": self.num_steps},
        )


def _seed_device(device: torch.device, seed: int) -> None:
    """Seeds what dropout draws from. `torch.manual_seed` seeds all there is, which takes 0.1 ms."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
