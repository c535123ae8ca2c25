"""What every contender trains, and how a turn of one is timed. Knows no contender."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from shared.vision.preprocessing import Preprocessing
from skipline.specs import SGD, TrainSpec


class WrongUsage(Exception):
    """Told to the user as argparse tells its own."""


@dataclass(frozen=True)
class Problem:
    """One system at one size.

    `folder` holds `train/<class>/<image>` and `val/<class>/<image>`. `new_model` makes the network
    of `spec` with the same weights each time. Of a turn's `num_epochs` only the last is timed: on a
    GPU the first one compiles and chooses kernels. `num_workers`: processes of a DataLoader.
    """

    spec: TrainSpec
    preprocessing: Preprocessing
    folder: Path
    num_classes: int
    new_model: Callable[[], nn.Module]
    device: torch.device
    num_workers: int
    num_epochs: int = 1

    @property
    def augmentations(self) -> frozenset[str]:
        return frozenset(item.name for item in self.spec.augment)


@dataclass(frozen=True)
class Turn:
    """An epoch of one contender, from its first file to its last metric."""

    num_images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.seconds


def channels_last_model(problem: Problem) -> nn.Module:
    """The initial network in training mode on the device, in channels-last memory."""
    model = problem.new_model().to(problem.device)
    return model.to(memory_format=torch.channels_last).train()


def synchronized_time(device: torch.device) -> float:
    """Seconds by the host's clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(problem: Problem, train_epoch: Callable[[], int]) -> Turn:
    """`train_epoch` returns how many images it trained on."""
    for _ in range(problem.num_epochs):
        start = synchronized_time(problem.device)
        num_images = train_epoch()
        turn = Turn(num_images, synchronized_time(problem.device) - start)
    return turn


def set_backends(*, tf32: bool, benchmark: bool) -> None:
    """What a script of that contender would find or set; without effect on the CPU. `tf32` is
    that of convolutions: torch's default for them is true, for matrix products false."""
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = benchmark


def torch_optimizer(
    spec: TrainSpec, model: nn.Module, *, fused: bool | None = None
) -> torch.optim.Optimizer:
    """The spec's SGD or Adam with the form that torch takes by itself, or the fused one."""
    options = spec.optimizer
    if isinstance(options, SGD):
        return torch.optim.SGD(
            model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
            fused=fused,
        )
    assert options.name == "adam", "no system here trains with another"
    return torch.optim.Adam(model.parameters(), lr=options.lr, fused=fused)


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
