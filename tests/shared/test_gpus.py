"""How many GPUs there are, without asking torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import settings
from shared.settings import Settings, cuda_is_present, num_gpus


@pytest.fixture(autouse=True)
def _machine_with_two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(settings, "DEVICE_FILES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def own(device: str = "auto") -> Settings:
    return Settings(_env_file=None, device=device)  # type: ignore[call-arg, arg-type]


def test_each_device_file_with_a_number_is_a_gpu() -> None:
    assert num_gpus(own()) == num_gpus(own("cuda")) == 2
    assert cuda_is_present()


def test_a_service_kept_to_the_cpu_has_none() -> None:
    assert num_gpus(own("cpu")) == 0


@pytest.mark.parametrize(
    ("visible", "number"),
    [
        ("", 0),
        ("-1", 0),
        ("1", 1),
        ("0,1", 2),
        ("0,-1,1", 1),
        ("GPU-8f1b", 1),
        ("0,1,2,3", 2),
    ],
)
def test_only_visible_devices_count(
    visible: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_gpus(own()) == number
    assert cuda_is_present() == (number > 0)


def test_a_machine_without_device_files_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "DEVICE_FILES", tmp_path / "nothing")
    assert num_gpus(own()) == 0
    assert not cuda_is_present()
