"""What a training would take, from a few real steps of it."""

from __future__ import annotations

import io
import resource
import sys
import time
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import nn

from shared.vision.preprocessing import Preprocessing
from skipline.specs import TrainSpec
from worker.engine.data import DeviceData, SplitData
from worker.engine.distributed import ALONE, Ranks
from worker.engine.events import Control, Sink
from worker.engine.runtime import Runtime, typed_failures
from worker.engine.trainer import Trainer

MIN_STEPS, MAX_STEPS = 3, 50
SECONDS = 5.0
"""Steps are timed for about so long."""


@dataclass(frozen=True)
class Measurement:
    """`seconds_per_epoch` holds training and validation, without checkpoints. `peak_memory_bytes`:
    of one GPU, or of one process where there is none. `checkpoint_bytes`: weights and what
    resuming needs."""

    images_per_second: float
    seconds_per_epoch: float
    peak_memory_bytes: int
    checkpoint_bytes: int
    accumulate_steps: int


def measure(
    spec: TrainSpec,
    model: nn.Module,
    train: SplitData,
    val: SplitData,
    preprocessing: Preprocessing,
    runtime: Runtime,
    sink: Sink,
    control: Control,
    ranks: Ranks = ALONE,
    seconds: float = SECONDS,
) -> Measurement:
    """Trains for a few steps, validates a batch, and writes no metrics. `model` is changed.

    Raises:
        As `worker.engine.trainer.fit`.
    """
    with typed_failures():
        trainer = Trainer(spec, model, train, val, preprocessing, runtime, sink, control, ranks)
        if runtime.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step_seconds = _time_steps(trainer, seconds)
        sample = val.first(trainer.val_batch_size * ranks.size)
        data = DeviceData(sample, runtime.torch_device, runtime.data_path)
        trainer.validate_on(data)  # chooses kernels, and starts what reads files
        start = time.perf_counter()
        trainer.validate_on(data)
        validation_seconds = (time.perf_counter() - start) * len(val) / len(sample)
        return Measurement(
            images_per_second=trainer.batch_size / step_seconds,
            seconds_per_epoch=trainer.steps_per_epoch * step_seconds + validation_seconds,
            peak_memory_bytes=_peak_memory_bytes(runtime),
            checkpoint_bytes=_checkpoint_bytes(trainer),
            accumulate_steps=trainer.learner.accumulate_steps,
        )


def _time_steps(trainer: Trainer, seconds: float) -> float:
    """Mean seconds of a step. The first one, which chooses kernels, does not count where there is
    another."""
    begun = time.perf_counter()
    marks = [begun]
    for epoch in range(1, MAX_STEPS + 1):
        for batch, draws, seed in trainer.epoch_batches(epoch, 0):
            trainer.decide()
            trainer.train_step(batch, draws, seed)
            _wait_for(trainer.runtime)
            marks.append(time.perf_counter())
            num_steps = len(marks) - 1
            is_over = trainer.ranks.agree(marks[-1] - begun > seconds)
            if num_steps >= MAX_STEPS or (is_over and num_steps >= MIN_STEPS):
                return (marks[-1] - marks[1]) / (num_steps - 1)
    raise AssertionError("an epoch has at least one step")


def _wait_for(runtime: Runtime) -> None:
    if runtime.device == "cuda":
        torch.cuda.synchronize()


def _peak_memory_bytes(runtime: Runtime) -> int:
    if runtime.device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in other units there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _checkpoint_bytes(trainer: Trainer) -> int:
    weights = {name: w.cpu().contiguous() for name, w in trainer.learner.weights().items()}
    state = io.BytesIO()
    torch.save(trainer.state_dict(), state)
    return len(safetensors.torch.save(weights)) + state.tell()
