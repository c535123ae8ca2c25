"""Milliseconds per batch of each augmentation, beside torchvision's, on the CPU.

torchvision's transforms draw once per call, so that a draw per image takes a call per image; its
mixup and CutMix are called once, with one share for the whole batch. The two take turns, so that
both see the same machine; printed are the medians.

    python -m benchmarks.augmentation [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torchvision.transforms import v2

from shared.settings import num_cores
from skipline.specs import (
    AugmentSpec,
    CutMix,
    Cutout,
    HorizontalFlip,
    Mixup,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    TrivialAugment,
)
from worker.engine.augment import Augmentation

BATCHES = ((128, 32), (32, 224))
"""Number of images and their side in pixels."""
MEAN = (0.5, 0.5, 0.5)
NUM_CLASSES = 10
NUM_ROUNDS = 15
NUM_DRAWN = 1_200_000

Transform = Callable[..., object]


def of_images(size: int) -> dict[str, tuple[tuple[AugmentSpec, ...], Transform]]:
    flip, half = v2.RandomHorizontalFlip(), (0.25, 0.25)
    return {
        "crop, flip": (
            (RandomCrop(), HorizontalFlip()),
            v2.Compose([v2.RandomCrop(size, padding=size // 8), flip]),
        ),
        "resized crop, flip": (
            (RandomResizedCrop(), HorizontalFlip()),
            v2.Compose([v2.RandomResizedCrop(size, scale=(0.35, 1), antialias=False), flip]),
        ),
        "rand_augment": ((RandAugment(),), v2.RandAugment(fill=0)),
        "trivial_augment": ((TrivialAugment(),), v2.TrivialAugmentWide(fill=0)),
        "cutout": ((Cutout(),), v2.RandomErasing(p=1, scale=half, ratio=(1, 1), value=127)),
    }


def of_batches() -> dict[str, tuple[tuple[AugmentSpec, ...], Transform]]:
    return {
        "mixup": ((Mixup(),), v2.MixUp(alpha=0.2, num_classes=NUM_CLASSES)),
        "cutmix": ((CutMix(),), v2.CutMix(num_classes=NUM_CLASSES)),
    }


def milliseconds(*calls: Callable[[], object]) -> list[float]:
    """The median of each call; the first round does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(NUM_ROUNDS + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    own, other = milliseconds(ours, theirs)
    print(f"{name:20} {own:9.2f} {other:12.2f}")


def compare_all(batch_size: int, size: int) -> None:
    print(f"\n{batch_size} x {size} px".ljust(21), f"{'ours':>9} {'torchvision':>12}   ms a batch")
    images = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8)
    planes = images.permute(0, 3, 1, 2).contiguous()
    for name, (specs, transform) in of_images(size).items():
        augment = Augmentation(specs, size, MEAN)
        draws = augment.draw(0, 1, batch_size)

        def call_ours(augment: Augmentation = augment, draws: torch.Tensor = draws) -> object:
            return augment(images, draws)

        def call_theirs(transform: Transform = transform) -> object:
            return [transform(image) for image in planes]

        compare(name, call_ours, call_theirs)
    x = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,))
    for name, (specs, transform) in of_batches().items():
        augment = Augmentation(specs, size, MEAN)
        draws = augment.draw(0, 1, batch_size)

        def mix_ours(augment: Augmentation = augment, draws: torch.Tensor = draws) -> object:
            return augment.mix(x, labels, draws)

        def mix_theirs(transform: Transform = transform) -> object:
            return transform(x, labels)

        compare(name, mix_ours, mix_theirs)


def time_draws() -> None:
    print(f"\ndraws of {NUM_DRAWN:,} samples".ljust(40), f"{'columns':>7} {'seconds':>8}")
    for name, (specs, _) in (of_images(32) | of_batches()).items():
        augment = Augmentation(specs, 32, MEAN)
        start = time.perf_counter()
        num_columns = augment.draw(0, 1, NUM_DRAWN).shape[1]
        print(f"{name:39} {num_columns:7} {time.perf_counter() - start:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Augmentation beside torchvision's, on the CPU.")
    parser.add_argument("--threads", type=int, default=num_cores())
    torch.set_num_threads(parser.parse_args().threads)
    for batch_size, size in BATCHES:
        compare_all(batch_size, size)
    time_draws()


if __name__ == "__main__":
    main()
