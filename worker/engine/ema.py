"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class AveragedModel:
    """A copy of a network whose weights trail behind: `decay` of the average is kept each step.

    Batch-norm statistics are averaged too: those of the live network belong to other weights. The
    decay of step t is at most (1 + t) / (10 + t), so that the first weights, which are noise, are
    soon forgotten (as TensorFlow's ExponentialMovingAverage does with `num_updates`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        ours, theirs = self.model.state_dict(), model.state_dict()
        moving = [name for name in ours if ours[name].is_floating_point()]
        self._ours = [ours[name] for name in moving]
        self._theirs = [theirs[name] for name in moving]
        counters = [name for name in ours if not ours[name].is_floating_point()]
        self._our_counters = [ours[name] for name in counters]
        self._their_counters = [theirs[name] for name in counters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._ours, self._theirs, 1 - decay)
        if self._our_counters:
            torch._foreach_copy_(self._our_counters, self._their_counters)
