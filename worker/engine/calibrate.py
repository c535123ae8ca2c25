"""How fast this machine trains a network in each precision, from a few steps of each.

On some CPUs convolutions in bf16 are slower than in fp32, on others twice as fast: it has to be
tried. Knows nothing of where results are kept.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from worker.engine.runtime import Device, Precision, Runtime

BUDGET_SECONDS = 2.0
MAX_ROUNDS = 5
STEP_OPERATIONS = {"cpu": 30e9, "cuda": 3e12}
"""Floating-point operations of one timed step: about a fifth of a second on a slow machine."""
NUM_IMAGES = {"cpu": (2, 32), "cuda": (16, 256)}
"""Fewest and most images of a timed step."""


def candidates(device: Device) -> tuple[Precision, ...]:
    """The precisions that `auto` chooses from. fp16 is as fast as bf16 where there is both, and can
    overflow: it is for who asks for it."""
    return ("tf32", "bf16") if device == "cuda" else ("fp32", "bf16")


def measure_precisions(
    model: nn.Module,
    image_size: int,
    multiply_adds: int,
    runtime: Runtime,
    precisions: Sequence[Precision],
    *,
    channels_last: bool,
    budget_seconds: float = BUDGET_SECONDS,
    before_step: Callable[[], None] = lambda: None,
) -> dict[Precision, float]:
    """Images per second of training steps in each precision, on noise, the model left alone. Where
    memory is short, of fewer images at a time.

    Args:
        multiply_adds: of one image, forward.
        runtime: of which all but the precision is taken.
        budget_seconds: no step begins after that, but that each precision gets one.
        before_step: called before each; may raise to end early.
    """
    num_images = _num_images(runtime.device, multiply_adds)
    while True:
        try:
            return _measure(
                model,
                image_size,
                num_images,
                runtime,
                precisions,
                channels_last,
                budget_seconds,
                before_step,
            )
        except torch.OutOfMemoryError:
            if num_images <= NUM_IMAGES[runtime.device][0]:
                raise
        finally:
            if runtime.device == "cuda":  # Others need what the allocator would keep.
                torch.cuda.empty_cache()
        num_images //= 2


def _measure(
    model: nn.Module,
    image_size: int,
    num_images: int,
    runtime: Runtime,
    precisions: Sequence[Precision],
    channels_last: bool,
    budget_seconds: float,
    before_step: Callable[[], None],
) -> dict[Precision, float]:
    begun = time.perf_counter()
    device = runtime.torch_device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = copy.deepcopy(model).to(device).to(memory_format=memory_format).train()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_images, 3, image_size, image_size, generator=generator)
    x = x.to(device, memory_format=memory_format)

    def step(precision: Precision) -> float:
        before_step()
        start = time.perf_counter()
        with replace(runtime, precision=precision).autocast():
            logits = model(x).float()
        labels = torch.zeros(num_images, dtype=torch.int64, device=device)
        functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    state = torch.random.get_rng_state()
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        # The first step of each chooses kernels, and counts only where there is no second.
        seconds = {precision: step(precision) for precision in precisions}
        again: dict[Precision, list[float]] = {precision: [] for precision in precisions}
        for _, precision in itertools.product(range(MAX_ROUNDS), precisions):
            if time.perf_counter() - begun > budget_seconds:
                break
            again[precision].append(step(precision))
        if all(again.values()):
            seconds = {precision: min(times) for precision, times in again.items()}
    finally:
        torch.random.set_rng_state(state)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
    return {precision: num_images / taken for precision, taken in seconds.items()}


def _num_images(device: Device, multiply_adds: int) -> int:
    fewest, most = NUM_IMAGES[device]
    # Two operations a multiply-add, forward once and backward twice.
    return max(fewest, min(most, int(STEP_OPERATIONS[device] / (6 * max(1, multiply_adds)))))
