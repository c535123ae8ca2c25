"""What `precision: auto` and `compile: auto` come to on this machine. Measurements are kept in a
file of the cache, so that the second job of a kind does not wait for them."""

from __future__ import annotations

import json
import os
import platform
import time
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
CROWDED_SHARE = 0.2
"""Of the cores that training wants: what other processes may take of them before a measurement
says more about them than about the machine."""


@dataclass(frozen=True)
class Speeds:
    """Images per second of training steps, by precision; `is_new` when measured just now, and
    `is_kept` unless other processes took the cores meanwhile."""

    images_per_second: dict[Precision, float]
    is_new: bool
    is_kept: bool = True

    @property
    def fastest(self) -> Precision:
        return max(self.images_per_second, key=self.images_per_second.__getitem__)


def measured_speeds(
    spec: TrainSpec,
    build: Callable[[], nn.Module],
    multiply_adds: int,
    runtime: Runtime,
    cache: Path,
    before_step: Callable[[], None] = lambda: None,
) -> Speeds:
    """The speeds of the precisions that `auto` chooses from, from the cache if they are there.

    Args:
        build: makes the network, where it has to be tried.
        multiply_adds: of one image, forward.
        runtime: active already.
        before_step: called before each step of a measurement; may raise to end it.
    """
    assert spec.image_size is not None, "stored specs are resolved"
    key = _key(spec, runtime)
    known = _read(cache)
    if key in known:
        return Speeds(known[key], is_new=False)
    model, neighbours = build(), _Neighbours()
    speeds = measure_precisions(
        model,
        spec.image_size,
        multiply_adds,
        runtime,
        candidates(runtime.device),
        channels_last=spec.channels_last,
        before_step=before_step,
    )
    is_kept = runtime.device == "cuda" or not neighbours.crowd(runtime.num_threads)
    if is_kept:
        _write(cache, _read(cache) | {key: speeds})
    return Speeds(speeds, is_new=True, is_kept=is_kept)


def compile_pays(training_seconds: float) -> bool:
    """Whether a training that takes so long on a GPU is long enough to be compiled first."""
    return training_seconds * COMPILE_GAIN > COMPILE_SECONDS


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


class _Neighbours:
    """What other processes compute from now on. On two busy cores bf16 was found six times slower
    than on idle ones, and fp32 hardly at all: threads that wait for each other by spinning."""

    def __init__(self) -> None:
        self._start = _cpu_seconds(), time.monotonic()

    def crowd(self, num_threads: int) -> bool:
        """Whether they took cores that `num_threads` threads would have used. False where the
        system does not tell."""
        (all_before, own_before), begun = self._start
        all_seconds, own_seconds = _cpu_seconds()
        elapsed = max(time.monotonic() - begun, 1e-3)
        others = (all_seconds - all_before - (own_seconds - own_before)) / elapsed
        num_free = (os.cpu_count() or 1) - num_threads
        return others > num_free + CROWDED_SHARE * num_threads


def _cpu_seconds() -> tuple[float, float]:
    """Seconds that all processes together, and this one, have computed. What a hypervisor gave to
    other machines counts as computed by others."""
    own = time.process_time()
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return own, own
    user, nice, system, _idle, _iowait, *interrupts_and_steal = map(int, first.split()[1:9])
    ticks = user + nice + system + sum(interrupts_and_steal)
    return ticks / os.sysconf("SC_CLK_TCK"), own
