"""What the training loop costs beside the arithmetic: `fit` against a bare loop, on the CPU.

    python benchmarks/loop_overhead.py [--quick] [--threads N]

Both train the same ResNet-18 (small stem, 32 px, batch 128, float32, channels last) with the same
optimizer. The bare loop does forward, backward and step over one normalized batch in memory, and
nothing else. `fit` gathers, augments and normalizes batches, sets the learning rate, counts, and
reports; its figure is the `images_per_second` that it writes itself. The two take turns, so that
both see the same machine. Exit code 1 if `fit` has less than 0.95 of the bare loop's speed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared.settings import num_cores
from shared.vision.preprocessing import Normalizer, Preprocessing
from skipline.schemas import Progress
from skipline.specs import TrainSpec
from worker.engine.data import ArrayData
from worker.engine.events import Control, TrainingCheckpoint
from worker.engine.optim import build_optimizer
from worker.engine.runtime import Runtime, choose_runtime
from worker.engine.trainer import fit, new_model

BATCH_SIZE = 128
IMAGE_SIZE = 32
NUM_CLASSES = 10
LEAST_RATIO = 0.95

SPEC = TrainSpec(
    dataset="noise", image_size=IMAGE_SIZE, batch_size=BATCH_SIZE, epochs=1, log_every_steps=1000
)
PREPROCESSING = Preprocessing(
    image_size=IMAGE_SIZE, channel_mean=(0.5, 0.5, 0.5), channel_std=(0.25, 0.25, 0.25)
)


class RateSink:
    """Keeps `images_per_second`."""

    def __init__(self) -> None:
        self.images_per_second = 0.0

    def metrics(self, values: Mapping[str, float], *, step: int, epoch: int) -> None:
        self.images_per_second = values.get("images_per_second", self.images_per_second)

    def progress(self, progress: Progress) -> None:
        pass

    def event(self, level: str, kind: str, message: str, data: Mapping[str, object]) -> None:
        pass

    def save_checkpoint(self, checkpoint: TrainingCheckpoint) -> None:
        pass


def noise(num_samples: int) -> ArrayData:
    generator = np.random.default_rng(0)
    shape = (num_samples, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    return ArrayData(images, generator.integers(0, NUM_CLASSES, num_samples))


def bare_rate(model: nn.Module, num_steps: int) -> float:
    """Images per second of forward, backward and step."""
    data = noise(BATCH_SIZE)
    x = Normalizer(PREPROCESSING, torch.device("cpu"))(torch.from_numpy(data.images))
    labels = torch.from_numpy(data.labels)
    model.train().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(SPEC.optimizer, model)
    start = time.perf_counter()
    for _ in range(num_steps):
        functional.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return num_steps * BATCH_SIZE / (time.perf_counter() - start)


def fit_rate(model: nn.Module, num_steps: int, runtime: Runtime) -> float:
    """Images per second of `fit`, as it says itself."""
    sink, val = RateSink(), noise(8)
    fit(SPEC, model, noise(num_steps * BATCH_SIZE), val, PREPROCESSING, runtime, sink, Control())
    return sink.images_per_second


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--threads", type=int, default=num_cores())
    arguments = parser.parse_args()
    num_rounds, num_steps = (3, 2) if arguments.quick else (7, 3)

    runtime = choose_runtime("fp32", "cpu", arguments.threads)
    runtime.activate()
    model = new_model(SPEC, NUM_CLASSES)
    bare_rate(model, 1)  # kernels are chosen and memory is taken at the first step
    bare, ours = [], []
    for _ in range(num_rounds):
        bare.append(bare_rate(model, num_steps))
        ours.append(fit_rate(model, num_steps, runtime))
        print(f"bare {bare[-1]:6.1f}  fit {ours[-1]:6.1f} images/s", flush=True)
    ratio = statistics.median(ours) / statistics.median(bare)
    print(
        f"median: bare {statistics.median(bare):.1f}, fit {statistics.median(ours):.1f} images/s, "
        f"ratio {ratio:.3f} (at least {LEAST_RATIO}); "
        f"{arguments.threads} threads, torch {torch.__version__}"
    )
    return 0 if ratio >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
