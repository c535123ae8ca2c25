"""What a worker's machine has to compute with, and what of it a trainer sees. Knows nothing of
torch, which a worker's main process does not import."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from shared.settings import MEBIBYTE, Settings, cuda_is_present, num_gpus
from skipline.schemas import WorkerDevice

log = structlog.get_logger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOK_UP_SECONDS = 10.0
_COMMAND = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total",
    "--format=csv,noheader,nounits",
)
_CPU_FACTS = Path("/proc/cpuinfo")


def claimable_devices(settings: Settings) -> tuple[str, ...]:
    """The values of `Job.device` that this worker takes on."""
    if settings.device == "cpu" or not cuda_is_present():
        return ("any", "auto", "cpu")
    if settings.device == "auto":
        return ("any", "auto", "cpu", "cuda")
    return ("any", "auto", "cuda")


def visible_gpus(gpus: Sequence[int], own: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for a trainer that has these of the worker's GPUs. `own` is the
    worker's, by which they are numbered; it may hold ids in place of numbers."""
    if own is None:
        return ",".join(map(str, gpus))
    names = [name.strip() for name in own.split(",")]
    return ",".join(names[gpu] for gpu in gpus)


def see_only(gpus: Sequence[int]) -> None:
    """Leaves this process, and those that it starts, these of the worker's GPUs. CUDA reads the
    variables when it is first used, not when torch is imported."""
    os.environ[VISIBLE] = visible_gpus(gpus, os.environ.get(VISIBLE))
    # The numbers are those of the driver's tools, also where GPUs differ in speed.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def list_devices(settings: Settings) -> list[dict[str, Any]]:
    """The processor, then each GPU under the worker's own number, as `schemas.WorkerDevice`. A
    worker asks once: where there are GPUs it takes a second."""
    found = [
        WorkerDevice(type="cpu", index=0, name=_cpu_name(), memory_bytes=_memory_bytes()),
        *_list_gpus(num_gpus(settings), os.environ.get(VISIBLE)),
    ]
    return [device.model_dump(exclude={"job_id"}) for device in found]


def _list_gpus(count: int, own: str | None) -> list[WorkerDevice]:
    known = _ask_driver() if count else {}
    devices = []
    for gpu in range(count):
        unknown = (f"GPU {gpu}", None)
        name, memory_bytes = _find(known, visible_gpus([gpu], own)) or unknown
        devices.append(WorkerDevice(type="cuda", index=gpu, name=name, memory_bytes=memory_bytes))
    return devices


_Known = Mapping[str, tuple[str, int | None]]
"""Name and memory by the driver's number, and by its id."""


def _find(known: _Known, wanted: str) -> tuple[str, int | None] | None:
    """An id may be given by its beginning alone."""
    if wanted in known:
        return known[wanted]
    matches = [known[key] for key in known if not key.isdigit() and key.startswith(wanted)]
    return matches[0] if wanted and len(matches) == 1 else None


def _ask_driver() -> _Known:
    """Empty where the driver's tool is not there, hangs, or says something else than expected."""
    try:
        done = subprocess.run(
            _COMMAND,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LOOK_UP_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the GPUs' names could not be read", error=type(error).__name__)
        return {}
    known: dict[str, tuple[str, int | None]] = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4 or not fields[2]:
            continue
        number, uuid, name, mebibytes = fields
        memory_bytes = int(mebibytes) * MEBIBYTE if mebibytes.isdecimal() else None
        known[number] = known[uuid] = (name, memory_bytes)
    return known


def _cpu_name() -> str:
    try:
        lines = _CPU_FACTS.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "CPU"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
