from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from skipline.specs import TrainSpec
from tests.worker.engine.tiny import (
    IMAGE_SIZE,
    NUM_CLASSES,
    NUM_TRAIN,
    NUM_VAL,
    PREPROCESSING,
    RUNTIME,
    Hungry,
    Recorder,
    colored,
    plain_model,
    run_fit,
    through_files,
    tiny_model,
    tiny_spec,
)
from worker.engine import measure as measuring
from worker.engine.events import Cancelled, Control
from worker.engine.measure import MIN_STEPS, Measurement, measure


def measured(
    spec: TrainSpec,
    model: nn.Module | None = None,
    sink: Recorder | None = None,
    control: Control | None = None,
    seconds: float = 0.05,
) -> Measurement:
    return measure(
        spec,
        model or tiny_model(spec),
        colored(NUM_TRAIN, seed=1),
        colored(NUM_VAL, seed=2),
        PREPROCESSING,
        RUNTIME,
        sink or Recorder(),
        control or Control(),
        seconds=seconds,
    )


def test_an_epoch_takes_its_steps_and_its_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(ticks)))
    # A second a step; a second for a batch of four, of which ten images are two and a half.
    measurement = measured(tiny_spec(), seconds=5)
    assert measurement.images_per_second == 4
    assert measurement.seconds_per_epoch == NUM_TRAIN // 4 + 2.5


@pytest.mark.parametrize(("seconds", "num_steps"), [(0, MIN_STEPS), (8.5, 9), (1e9, 50)])
def test_steps_are_made_for_the_time_given(
    monkeypatch: pytest.MonkeyPatch, seconds: float, num_steps: int
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(ticks)))
    model = tiny_model(tiny_spec())
    measured(tiny_spec(), model, seconds=seconds)
    assert model.state_dict()["1.num_batches_tracked"] == num_steps


def test_what_is_measured_is_positive_and_nothing_is_written() -> None:
    sink = Recorder()
    measurement = measured(tiny_spec(), sink=sink)
    assert measurement.images_per_second > 0
    assert measurement.seconds_per_epoch > 0
    assert measurement.peak_memory_bytes > 50 * 2**20  # torch alone takes more
    assert measurement.accumulate_steps == 1
    assert (sink.points, sink.checkpoints, sink.events) == ([], [], [])


def test_a_checkpoint_takes_what_was_measured(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(3 * IMAGE_SIZE**2, 500), nn.Linear(500, NUM_CLASSES)
        )

    spec = tiny_spec(epochs=1, ema_decay=0.9, optimizer={"name": "adam"})
    run = run_fit(spec, model=build())
    through_files(run.sink.checkpoints[-1], spec, tmp_path / "0")
    written = sum(path.stat().st_size for path in (tmp_path / "0").iterdir())
    assert written > 4 * 4 * 500 * 3 * IMAGE_SIZE**2  # weights, average, and Adam's two moments
    assert measured(spec, build()).checkpoint_bytes == pytest.approx(written, rel=0.05)


def test_parts_that_had_to_be_halved_are_told() -> None:
    spec = tiny_spec()
    sink = Recorder()
    assert measured(spec, Hungry(plain_model(spec), 1), sink).accumulate_steps == 4
    assert sink.events == ["micro_batch_halved"] * 2


def test_a_measurement_can_be_cancelled() -> None:
    control = Control()
    control.request = "cancel"
    with pytest.raises(Cancelled):
        measured(tiny_spec(), control=control)
