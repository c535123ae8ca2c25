"""timm's training script with `--amp --amp-dtype bfloat16 --channels-last`, from timm itself.

Dataset, loader, transforms (random resized crop with a random filter, flip, colour jitter of 0.4),
optimizer and smoothed loss are the package's own, with the script's defaults; the script is no part
of the package, so its loop is written anew. Learning rate, batch and network are the spec's.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from benchmarks.baselines.problem import Problem, Turn, channels_last_model, set_backends, timed
from skipline.specs import SGD, OptimizerSpec

LABEL_SMOOTHING = 0.1
COLOUR_JITTER = 0.4
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def is_installed() -> bool:
    return importlib.util.find_spec("timm") is not None


def optimizer_options(spec: OptimizerSpec) -> dict[str, Any]:
    """The spec in timm's words."""
    options = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    if isinstance(spec, SGD):
        name = "nesterov" if spec.nesterov else "momentum"
        return {**options, "opt": name, "momentum": spec.momentum}
    return {**options, "opt": spec.name}


def run(problem: Problem) -> Turn:
    """An epoch, its loader's processes included."""
    import timm.data  # type: ignore[import-not-found]
    import timm.loss  # type: ignore[import-not-found]
    import timm.optim  # type: ignore[import-not-found]
    import timm.utils  # type: ignore[import-not-found]

    set_backends(tf32=True, benchmark=True)
    torch.manual_seed(problem.spec.seed)
    device, model = problem.device, channels_last_model(problem)
    optimizer = timm.optim.create_optimizer_v2(model, **optimizer_options(problem.spec.optimizer))
    size = problem.preprocessing.image_size
    batches = timm.data.create_loader(
        timm.data.create_dataset("", root=str(problem.folder / "train"), is_training=True),
        input_size=(3, size, size),
        batch_size=problem.spec.batch_size,
        is_training=True,
        scale=SCALE,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=COLOUR_JITTER,
        interpolation="random",
        mean=problem.preprocessing.channel_mean,
        std=problem.preprocessing.channel_std,
        num_workers=problem.num_workers,
        persistent_workers=False,
        device=device,
    )
    criterion = timm.loss.LabelSmoothingCrossEntropy(LABEL_SMOOTHING)
    losses = timm.utils.AverageMeter()
    autocast = torch.autocast(device.type, torch.bfloat16)

    def train_epoch() -> int:
        num_images = 0
        for x, targets in batches:
            x = x.contiguous(memory_format=torch.channels_last)
            with autocast:
                loss = criterion(model(x), targets)
            losses.update(loss.item(), len(targets))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            num_images += len(targets)
        return num_images

    return timed(problem, train_epoch)
