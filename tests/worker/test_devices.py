"""What a worker says its machine has, and which GPUs its trainers see."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shared import settings as settings_module
from shared.settings import MEBIBYTE
from skipline.schemas import WorkerDevice
from skipline.server_commands import num_slots
from tests.conftest import make_settings
from worker import devices
from worker.devices import claimable_devices, list_devices, see_only, visible_gpus


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with three GPUs and without the driver's tool, until a test writes one into the
    folder."""
    for number in range(3):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.setattr(settings_module, "DEVICE_FILES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return tmp_path


def write_tool(folder: Path, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


ANSWER = """
cat <<'END'
0, GPU-aaaa-1, NVIDIA A, 40960
1, GPU-bbbb-2, NVIDIA B, 81920
2, GPU-bbcc-3, NVIDIA C, [N/A]
END
"""


def gpus() -> list[tuple[int, str, int | None]]:
    found = [WorkerDevice(**device) for device in list_devices(make_settings())]
    assert found[0].type == "cpu"
    assert {device.type for device in found[1:]} <= {"cuda"}
    return [(device.index, device.name, device.memory_bytes) for device in found[1:]]


def test_the_processor_has_a_name_and_the_machines_memory() -> None:
    [cpu] = list_devices(make_settings(device="cpu"))
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    assert cpu["memory_bytes"] == total
    assert (cpu["type"], cpu["index"]) == ("cpu", 0)
    assert cpu["name"]


def test_gpus_are_named_with_their_memory_as_far_as_the_driver_knows(machine: Path) -> None:
    write_tool(machine, ANSWER)
    assert gpus() == [
        (0, "NVIDIA A", 40960 * MEBIBYTE),
        (1, "NVIDIA B", 81920 * MEBIBYTE),
        (2, "NVIDIA C", None),
    ]


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("2,0", ["NVIDIA C", "NVIDIA A"]),
        ("GPU-bbbb-2", ["NVIDIA B"]),
        ("GPU-bbcc,GPU-a", ["NVIDIA C", "NVIDIA A"]),
        ("GPU-bb", ["GPU 0"]),
        ("GPU-zz", ["GPU 0"]),
        ("", []),
    ],
)
def test_gpus_have_the_workers_own_numbers(
    visible: str, names: list[str], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tool(machine, ANSWER)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [(number, name) for number, name, _ in gpus()] == list(enumerate(names))


@pytest.mark.parametrize(
    "script", ["exit 9", "echo 'No devices were found'", "printf '0, \\377\\n,,,\\n'", "sleep 60"]
)
def test_a_tool_that_is_of_no_use_leaves_gpus_without_a_name(
    script: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "LOOK_UP_SECONDS", 0.3)
    write_tool(machine, f"exec {script}" if script.startswith("sleep") else script)
    began = time.monotonic()
    assert gpus() == [(number, f"GPU {number}", None) for number in range(3)]
    assert time.monotonic() - began < 10


def test_a_machine_without_the_tool_still_has_its_gpus(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(machine))
    assert gpus() == [(number, f"GPU {number}", None) for number in range(3)]


@pytest.mark.parametrize(
    ("assigned", "own", "visible"),
    [
        ([0, 2], None, "0,2"),
        ([], None, ""),
        ([1], "3,5", "5"),
        ([0, 1], "GPU-aa, GPU-bb,GPU-cc", "GPU-aa,GPU-bb"),
        ([], "3,5", ""),
    ],
)
def test_a_trainer_sees_the_gpus_that_its_job_has_and_no_others(
    assigned: list[int], own: str | None, visible: str
) -> None:
    assert visible_gpus(assigned, own) == visible


def test_a_trainer_without_a_gpu_sees_none_and_keeps_the_order_that_was_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    see_only([1])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    see_only([])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.usefixtures("machine")
def test_a_worker_takes_what_it_has_a_device_for() -> None:
    assert claimable_devices(make_settings()) == ("any", "auto", "cpu", "cuda")
    assert claimable_devices(make_settings(device="cuda")) == ("any", "auto", "cuda")
    assert claimable_devices(make_settings(device="cpu")) == ("any", "auto", "cpu")


@pytest.mark.usefixtures("machine")
def test_a_worker_has_a_slot_for_each_gpu_unless_told_otherwise() -> None:
    assert num_slots(None, make_settings()) == 3
    assert num_slots(2, make_settings()) == 2
    assert num_slots(None, make_settings(device="cpu")) == 1


def test_a_worker_without_a_gpu_takes_no_job_for_one(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert claimable_devices(make_settings()) == ("any", "auto", "cpu")
