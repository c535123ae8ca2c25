"""The arithmetic alone: forward, backward and fused step over normalized batches in memory.

What no training loop can beat that computes the same; nothing is read, augmented or counted.
"""

from __future__ import annotations

from itertools import cycle, islice

import torch
from torch.nn import functional

from benchmarks.baselines.problem import (
    Problem,
    Turn,
    channels_last_model,
    set_backends,
    timed,
    torch_optimizer,
)
from shared.vision.preprocessing import Normalizer
from worker.engine.runtime import Precision

MAX_RESIDENT_BATCHES = 16
"""An epoch of more batches goes round: whole datasets as float32 would fill the memory."""

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def resident_batches(problem: Problem, images: torch.Tensor, labels: torch.Tensor) -> Batches:
    """Full batches float32 [B, 3, S, S], channels last, of images uint8 [N, S, S, 3]; on the
    device."""
    size = problem.spec.batch_size
    normalize = Normalizer(problem.preprocessing, problem.device)
    starts = range(0, len(labels) - size + 1, size)[:MAX_RESIDENT_BATCHES]
    return [
        (
            normalize(images[start : start + size].to(problem.device)),
            labels[start : start + size].to(problem.device),
        )
        for start in starts
    ]


def run(
    problem: Problem,
    precision: Precision,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> Turn:
    """An epoch over images uint8 [N, S, S, 3] with their labels int64 [N]."""
    set_backends(tf32=precision == "tf32", benchmark=True)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    batches = resident_batches(problem, images, labels)
    num_steps = len(labels) // problem.spec.batch_size
    model = channels_last_model(problem)
    optimizer = torch_optimizer(problem.spec, model, fused=True)
    autocast = torch.autocast(problem.device.type, torch.bfloat16, enabled=precision == "bf16")

    def train_epoch() -> int:
        for x, targets in islice(cycle(batches), num_steps):
            with autocast:
                logits = model(x)
            loss = functional.cross_entropy(logits.float(), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return num_steps * problem.spec.batch_size

    return timed(problem, train_epoch)
