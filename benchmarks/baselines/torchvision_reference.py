"""torchvision's reference for classification (`references/classification`), written anew: it is no
part of the installed package.

Its preset for training (a random resized crop, a flip, then tensors), a DataLoader that pins
memory, float32, and at each step loss, top-1, top-5 and rate read into windows of smoothed values;
the medians are made every 10 steps, as for a printed line. Learning rate and batch are the spec's.
"""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.baselines.problem import Problem, Turn, set_backends, timed, torch_optimizer

PRINT_EVERY_STEPS = 10
WINDOW_STEPS = 20
TOP_K = 5


class SmoothedValue:
    """The median of the last values and the mean of all."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._total, self._count = 0.0, 0

    def update(self, value: float, num_images: int) -> None:
        self._window.append(value)
        self._total += value * num_images
        self._count += num_images

    def __str__(self) -> str:
        return f"{median(self._window):.4f} ({self._total / self._count:.4f})"


def loader(problem: Problem) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    preset = transforms.Compose(
        [
            transforms.RandomResizedCrop(problem.preprocessing.image_size, antialias=True),
            transforms.RandomHorizontalFlip(0.5),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(
                problem.preprocessing.channel_mean, problem.preprocessing.channel_std
            ),
        ]
    )
    return DataLoader(
        ImageFolder(str(problem.folder / "train"), preset),
        batch_size=problem.spec.batch_size,
        shuffle=True,
        num_workers=problem.num_workers,
        pin_memory=problem.device.type == "cuda",
    )


def accuracies(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Percentages of answers that are right, and right among the best five."""
    with torch.no_grad():
        best = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices
        hits = best.eq(targets[:, None])
        scale = 100 / len(targets)
        return hits[:, :1].sum(dtype=torch.float32) * scale, hits.sum(dtype=torch.float32) * scale


def run(problem: Problem) -> Turn:
    """An epoch, its loader's processes included."""
    set_backends(tf32=True, benchmark=True)
    torch.manual_seed(problem.spec.seed)
    model = problem.new_model().to(problem.device).train()
    criterion, optimizer = nn.CrossEntropyLoss(), torch_optimizer(problem.spec, model)
    batches = loader(problem)

    def train_epoch() -> int:
        meters = {name: SmoothedValue() for name in ("loss", "acc1", "acc5", "img/s")}
        num_images, lines = 0, []
        for step, (x, targets) in enumerate(batches):
            start = time.time()
            x, targets = x.to(problem.device), targets.to(problem.device)
            logits = model(x)
            loss = criterion(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            acc1, acc5 = accuracies(logits, targets)
            size = len(targets)
            meters["loss"].update(loss.item(), size)
            meters["acc1"].update(acc1.item(), size)
            meters["acc5"].update(acc5.item(), size)
            meters["img/s"].update(size / (time.time() - start), size)
            if step % PRINT_EVERY_STEPS == 0:
                lines.append("  ".join(f"{name}: {meter}" for name, meter in meters.items()))
            num_images += size
        return num_images

    return timed(problem, train_epoch)
