"""What `precision: auto` and `compile: auto` come to on this machine. Measurements are kept in a
file of the cache, so that the second job of a kind does not wait for them."""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipline.catalog import resolve_stem
from skipline.specs import TrainSpec
from worker.engine.calibrate import candidates, measure_precisions
from worker.engine.runtime import Precision, Runtime

COMPILE_SECONDS = 60.0
COMPILE_GAIN = 0.15
"""What compiling costs on a GPU, and the share of a training's time that it then saves, both by
experience. On the CPU it was found to gain nothing."""


@dataclass(frozen=True)
class Speeds:
    """Images per second of training steps, by precision; `is_new` when measured just now."""

    images_per_second: dict[Precision, float]
    is_new: bool

    @property
    def fastest(self) -> Precision:
        return max(self.images_per_second, key=self.images_per_second.__getitem__)


def measured_speeds(
    spec: TrainSpec,
    build: Callable[[], nn.Module],
    multiply_adds: int,
    runtime: Runtime,
    cache: Path,
) -> Speeds:
    """The speeds of the precisions that `auto` chooses from, from the cache if they are there.

    Args:
        build: makes the network, where it has to be tried.
        multiply_adds: of one image, forward.
        runtime: active already.
    """
    assert spec.image_size is not None, "stored specs are resolved"
    key = _key(spec, runtime)
    known = _read(cache)
    if key in known:
        return Speeds(known[key], is_new=False)
    speeds = measure_precisions(
        build(),
        spec.image_size,
        multiply_adds,
        runtime,
        candidates(runtime.device),
        channels_last=spec.channels_last,
    )
    _write(cache, _read(cache) | {key: speeds})
    return Speeds(speeds, is_new=True)


def compile_pays(num_images: int, images_per_second: float) -> bool:
    """Whether a training of so many images on a GPU is long enough to be compiled first."""
    return num_images / images_per_second * COMPILE_GAIN > COMPILE_SECONDS


def _key(spec: TrainSpec, runtime: Runtime) -> str:
    """Machine, torch, network and size: all that the speeds depend on."""
    assert spec.image_size is not None
    parts = (
        torch.cuda.get_device_name() if runtime.device == "cuda" else _cpu_name(),
        f"{runtime.num_threads} threads",
        f"torch {torch.__version__}",
        spec.model.arch,
        resolve_stem(spec.model.stem, spec.image_size),
        f"{spec.image_size} px",
        "channels last" if spec.channels_last else "channels first",
    )
    return ", ".join(parts)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                return f"{name} with {torch.backends.cpu.get_cpu_capability()}"
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _read(cache: Path) -> dict[str, Any]:
    try:
        document = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _write(cache: Path, document: dict[str, Any]) -> None:
    """Jobs that write at the same time may lose each other's line, which is then measured again."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f".{cache.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, cache)
