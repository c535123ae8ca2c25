"""Optimizers, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from skipline.specs import (
    SGD,
    AdamW,
    Constant,
    Cosine,
    OneCycle,
    OptimizerSpec,
    Plateau,
    SchedulerSpec,
    Step,
)


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all parameters that are trained, in torch's fused form: one pass over
    memory, and the same bits whether it was resumed or not."""
    groups = _groups(spec, model)
    if isinstance(spec, SGD):
        return torch.optim.SGD(
            groups,
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
            fused=True,
        )
    adam = torch.optim.AdamW if isinstance(spec, AdamW) else torch.optim.Adam
    return adam(
        groups,
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=True,
    )


def _groups(spec: OptimizerSpec, model: nn.Module) -> list[dict[str, Any]]:
    """Biases and the scales and shifts of norms are the parameters of one dimension."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if spec.decay_norm_and_bias:
        return [{"params": trained}]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    spared = [parameter for parameter in trained if parameter.ndim <= 1]
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Schedule:
    """The learning rate as a function of the step.

    A linear warm-up ends at the full rate with its last step; then a cosine runs as torch's
    CosineAnnealingLR does. Milestones of `step` count epochs of the whole job, warm-up included.
    `plateau` follows torch's ReduceLROnPlateau in mode min and is told the validation loss by
    `observe`; it starts to count after the warm-up, when a rate has been held. `one_cycle` is
    torch's OneCycleLR over all steps of the run.
    """

    _THRESHOLD = 1e-4
    """Share by which a loss must fall below the best one to count as better; torch's default."""
    _EPS = 1e-8
    """Reductions by no more than this are not made; torch's default."""

    def __init__(
        self, spec: SchedulerSpec, lr: float, *, steps_per_epoch: int, num_epochs: int
    ) -> None:
        self._spec = spec
        self._lr = lr
        self._steps_per_epoch = steps_per_epoch
        warmup_epochs = 0.0 if isinstance(spec, OneCycle) else spec.warmup_epochs
        self._warmup_steps = round(warmup_epochs * steps_per_epoch)
        self._num_steps = num_epochs * steps_per_epoch
        self._level = lr
        self._best = math.inf
        self._num_bad_epochs = 0

    def lr(self, step: int) -> float:
        """The rate that optimizer step `step` takes; steps count from 1."""
        if step <= self._warmup_steps:
            return self._full_rate(step) * step / self._warmup_steps
        return self._full_rate(step)

    def _full_rate(self, step: int) -> float:
        spec, steps_before = self._spec, step - 1
        match spec:
            case Constant():
                return self._lr
            case Cosine():
                length = max(1, self._num_steps - self._warmup_steps)
                position = max(0, steps_before - self._warmup_steps) / length
                return (
                    spec.min_lr + (self._lr - spec.min_lr) * (1 + math.cos(math.pi * position)) / 2
                )
            case Step():
                epochs_before = steps_before // self._steps_per_epoch
                passed = sum(milestone <= epochs_before for milestone in spec.milestones or ())
                return self._lr * spec.gamma**passed
            case Plateau():
                return self._level
            case OneCycle():
                return self._one_cycle(spec, steps_before)

    def _one_cycle(self, spec: OneCycle, steps_before: int) -> float:
        """The first step has lr / div_factor, the last the lowest rate of all."""
        first = self._lr / spec.div_factor
        peak_at = max(1.0, spec.pct_start * self._num_steps - 1)
        if steps_before <= peak_at:
            start, end, position = first, self._lr, steps_before / peak_at
        else:
            start, end = self._lr, first / spec.final_div_factor
            length = max(1.0, self._num_steps - 1 - peak_at)
            position = min(1.0, (steps_before - peak_at) / length)
        if spec.anneal == "linear":
            return start + (end - start) * position
        return end + (start - end) * (1 + math.cos(math.pi * position)) / 2

    def observe(self, val_loss: float, step: int) -> bool:
        """Takes note of the validation after `step`; true if the rate was reduced."""
        spec = self._spec
        if not isinstance(spec, Plateau) or step <= self._warmup_steps:
            return False
        if val_loss < self._best * (1 - self._THRESHOLD):
            self._best, self._num_bad_epochs = val_loss, 0
        else:
            self._num_bad_epochs += 1
        if self._num_bad_epochs <= spec.patience:
            return False
        self._num_bad_epochs = 0
        reduced = max(self._level * spec.factor, spec.min_lr)
        if self._level - reduced <= self._EPS:
            return False
        self._level = reduced
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "level": self._level,
            "best": self._best,
            "num_bad_epochs": self._num_bad_epochs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._level = state["level"]
        self._best = state["best"]
        self._num_bad_epochs = state["num_bad_epochs"]
