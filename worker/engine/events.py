"""What training says to the outside, and what the outside may ask of it.

The trainer talks to a `Sink` and looks at a `Control`. It knows neither databases nor files nor
signals; whoever runs it brings those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from shared.vision.bundle import Weights
from skipline.schemas import Progress


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A state from which training goes on bit by bit, and whose weights can be served.

    `weights` and `resume` refer to the live model and optimizer: they hold until the sink returns.
    Within one call of `fit` no two checkpoints have the same `step`.
    """

    epoch: int
    """The epoch that `step` belongs to, from 1."""
    step: int
    """Optimizer steps done over the whole job."""
    metrics: Mapping[str, float]
    """Validation of these weights (`val_loss`, `val_top1`, `val_top5`); empty within an epoch."""
    is_best: bool
    """The monitored metric is the best of all checkpoints so far; never so within an epoch."""
    is_kept: bool
    """It stands at the end of an epoch whose checkpoint is kept for good."""
    weights: Weights
    """For `shared.vision.bundle.write_bundle`."""
    resume: Mapping[str, Any]
    """For `worker.engine.resume.save_resume`: all that resuming needs beside the weights."""


class Sink(Protocol):
    """Where training reports. Calls come from one thread, in the order of what happened.

    An exception of a sink ends training and passes through `fit`.
    """

    def metrics(self, values: Mapping[str, float], *, step: int, epoch: int) -> None:
        """Values by the contract's metric names, all finite, measured after `step`."""

    def progress(self, progress: Progress) -> None:
        """How far training is: once a second at most, during validation too."""

    def event(
        self, level: Literal["info", "warning"], kind: str, message: str, data: Mapping[str, Any]
    ) -> None:
        """Something worth telling; `kind` is a stable word (an event's `type`), `data` JSON."""

    def save_checkpoint(self, checkpoint: TrainingCheckpoint) -> None:
        """Stores a checkpoint durably before it returns. The metrics up to its step came before."""


class Interrupted(Exception):
    """Training ended early because it was asked to."""


class Cancelled(Interrupted):
    """The result is given up; nothing was written."""


class Released(Interrupted):
    """Another process shall go on. `fit` wrote a checkpoint before it let this pass, unless the
    last one says it all."""


Request = Literal["cancel", "release", "stop"]
"""`cancel` and `release` interrupt whatever is done. `stop` asks a training to do no more steps and
to come to its result."""


class Control:
    """A flag that another thread sets and training looks at before every batch.

    Attributes:
        request: what is asked for now.
        was_stopped: an attempt before this one was asked to stop already.
    """

    request: Request | None = None
    was_stopped: bool = False

    def look(self) -> Request | None:
        """What is asked for now."""
        return self.request or ("stop" if self.was_stopped else None)

    def interrupts(self) -> bool:
        """Whether the work shall be left as it is."""
        return self.look() in ("cancel", "release")

    def check(self) -> None:
        """Raises `Cancelled` or `Released` once asked to."""
        request = self.look()
        if request == "cancel":
            raise Cancelled
        if request == "release":
            raise Released
