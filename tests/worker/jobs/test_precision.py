from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from skipline.specs import TrainSpec
from worker.engine.runtime import Runtime
from worker.jobs import precision
from worker.jobs.precision import Speeds, compile_pays, measured_speeds

RUNTIME = Runtime("cpu", "fp32", 1)
FOUND = {"fp32": 10.0, "bf16": 20.0}


def spec_of(arch: str = "resnet18", image_size: int = 8, **options: Any) -> TrainSpec:
    model = {"arch": arch} | options.pop("model", {})
    return TrainSpec.model_validate(
        {"dataset": "tiny", "model": model, "image_size": image_size, **options}
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without a file yet; measuring takes no time and finds `FOUND`, on a machine that
    nobody else uses."""
    monkeypatch.setattr(precision, "measure_precisions", lambda *args, **options: dict(FOUND))
    monkeypatch.setattr(precision, "_cpu_seconds", lambda: (7.0, 7.0))
    return tmp_path / "cache" / "precision.json"


def speeds_of(cache: Path, spec: TrainSpec | None = None, runtime: Runtime = RUNTIME) -> Speeds:
    return measured_speeds(spec or spec_of(), lambda: nn.Linear(1, 1), 1000, runtime, cache)


def build_nothing() -> NoReturn:
    pytest.fail("it was measured although it is known")


def test_the_second_job_of_a_kind_finds_what_the_first_one_measured(cache: Path) -> None:
    first = speeds_of(cache)
    assert first == Speeds(FOUND, is_new=True)  # type: ignore[arg-type]
    second = measured_speeds(spec_of(seed=5, epochs=3), build_nothing, 1000, RUNTIME, cache)
    assert second == replace(first, is_new=False)


@pytest.mark.parametrize(
    ("others", "num_threads", "is_kept"),
    # Four cores. Two threads leave two of them to others, and four threads none.
    [(0.0, 4, True), (0.7, 4, True), (0.9, 4, False), (2.3, 2, True), (2.5, 2, False)],
)
def test_what_a_crowded_machine_says_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, others: float, num_threads: int, is_kept: bool
) -> None:
    """In the ten seconds of the measurement this process computed for three, and others for
    `others` cores times ten."""
    times = iter([100.0, 110.0])
    seconds = iter([(50.0, 20.0), (50.0 + 3 + others * 10, 23.0)])
    monkeypatch.setattr(precision.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(precision, "_cpu_seconds", lambda: next(seconds))
    monkeypatch.setattr(precision.os, "cpu_count", lambda: 4)
    runtime = replace(RUNTIME, num_threads=num_threads)
    assert speeds_of(cache, runtime=runtime) == Speeds(FOUND, is_new=True, is_kept=is_kept)  # type: ignore[arg-type]
    assert cache.exists() == is_kept


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell")
def test_all_processes_together_compute_no_less_than_this_one() -> None:
    all_before, own_before = precision._cpu_seconds()
    sum(number * number for number in range(2_000_000))
    all_after, own_after = precision._cpu_seconds()
    assert own_after > own_before
    # The system counts in hundredths of a second.
    assert all_after - all_before >= own_after - own_before - 0.03


def test_the_fastest_is_taken(cache: Path) -> None:
    assert speeds_of(cache).fastest == "bf16"
    assert Speeds({"fp32": 3.0, "bf16": 2.0}, is_new=True).fastest == "fp32"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b"12"])
def test_a_damaged_file_is_measured_anew(cache: Path, damage: bytes) -> None:
    cache.parent.mkdir()
    cache.write_bytes(damage)
    assert speeds_of(cache).is_new
    assert not speeds_of(cache).is_new
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_the_key_says_all_that_the_speed_depends_on(cache: Path) -> None:
    speeds_of(cache)
    (key,) = json.loads(cache.read_text())
    for part in ("resnet18", "small", "8 px", "1 threads", f"torch {torch.__version__}", "last"):
        assert part in key


@pytest.mark.parametrize(
    ("spec", "runtime"),
    [
        (spec_of("resnet34"), RUNTIME),
        (spec_of(image_size=16), RUNTIME),
        (spec_of(image_size=8, model={"stem": "imagenet"}), RUNTIME),
        (spec_of(channels_last=False), RUNTIME),
        (spec_of(), Runtime("cpu", "fp32", 2)),
    ],
    ids=["network", "size", "stem", "memory format", "threads"],
)
def test_what_differs_is_measured_by_itself(cache: Path, spec: TrainSpec, runtime: Runtime) -> None:
    speeds_of(cache)
    assert speeds_of(cache, spec, runtime).is_new
    assert not speeds_of(cache).is_new  # and nothing was forgotten over it
    assert len(json.loads(cache.read_text())) == 2


def test_a_real_network_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_seconds", lambda: (7.0, 7.0))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    speeds = measured_speeds(spec_of(), lambda: model, 10**12, RUNTIME, tmp_path / "precision.json")
    assert speeds.images_per_second.keys() == FOUND.keys()
    assert all(speed > 0 for speed in speeds.images_per_second.values())
    assert json.loads((tmp_path / "precision.json").read_text()).popitem()[1] == (
        speeds.images_per_second
    )


def test_compiling_pays_when_it_saves_more_than_it_costs() -> None:
    # 15 % saved and a minute to compile: from 400 s of training on.
    assert not compile_pays(399)
    assert compile_pays(401)
