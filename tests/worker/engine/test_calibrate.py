from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from worker.engine import calibrate
from worker.engine.calibrate import MAX_ROUNDS, candidates, measure_precisions
from worker.engine.events import Cancelled
from worker.engine.runtime import Precision, Runtime

RUNTIME = Runtime("cpu", "fp32", 1)
BOTH: tuple[Precision, ...] = ("fp32", "bf16")
HUGE = 10**12
"""Multiply-adds of an image that a step takes no more of than it must."""


class Counted(nn.Module):
    """A network that notes the precision of each step, also of its copies."""

    dtypes: list[torch.dtype] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        Counted.dtypes = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.conv(x)
        Counted.dtypes.append(features.dtype)
        answer: torch.Tensor = self.head(self.dropout(self.norm(features).mean(dim=(2, 3))))
        return answer


def measured(model: nn.Module, **options: float) -> dict[Precision, float]:
    return measure_precisions(model, 8, HUGE, RUNTIME, BOTH, channels_last=True, **options)


def tick(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Each look at the clock finds it so much later."""
    ticks = itertools.count()
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(ticks) * seconds)


def test_every_candidate_is_measured() -> None:
    speeds = measured(Counted())
    assert list(speeds) == ["fp32", "bf16"]
    assert all(speed > 0 for speed in speeds.values())
    assert {torch.float32, torch.bfloat16} == set(Counted.dtypes)


def test_it_ends_before_a_step_when_told() -> None:
    looks = iter([None, None, Cancelled()])

    def before_step() -> None:
        if error := next(looks):
            raise error

    with pytest.raises(Cancelled):
        measure_precisions(
            Counted(), 8, HUGE, RUNTIME, BOTH, channels_last=True, before_step=before_step
        )
    assert len(Counted.dtypes) == 2


def test_candidates_are_what_the_device_has() -> None:
    assert candidates("cpu") == ("fp32", "bf16")
    assert candidates("cuda") == ("tf32", "bf16")


def test_the_network_and_the_process_are_left_as_they_were() -> None:
    model = Counted().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        measured(model)
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_each_is_tried_once_even_when_the_budget_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tick(monkeypatch, seconds=4)
    assert measured(Counted(), budget_seconds=0.0) == {"fp32": 2 / 4, "bf16": 2 / 4}
    assert Counted.dtypes == [torch.float32, torch.bfloat16]


def test_a_second_look_that_not_all_got_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # The clock is looked at once at the start, twice a step, and before each repeated step.
    times = iter([0.0, 0.0, 8.0, 8.0, 9.0, 9.0, 9.0, 10.0, 99.0])
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(times))
    assert measured(Counted(), budget_seconds=20.0) == {"fp32": 2 / 8, "bf16": 2 / 1}
    assert len(Counted.dtypes) == 3


def test_the_first_step_does_not_count_where_there_are_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = [0.0, 0.0, 8.0, 8.0, 9.0]
    # Look, start and end of fp32's and bf16's second steps, and then the budget is over.
    again = [9.0, 9.0, 13.0, 13.0, 13.0, 18.0, 99.0]
    times = iter(first + again)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(times))
    assert measured(Counted(), budget_seconds=20.0) == {"fp32": 2 / 4, "bf16": 2 / 5}


def test_there_are_so_many_rounds_however_quick_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tick(monkeypatch, seconds=1e-6)
    measured(Counted())
    assert len(Counted.dtypes) == 2 * (1 + MAX_ROUNDS)


@pytest.mark.parametrize(("multiply_adds", "num_images"), [(100, 2), (1, 16), (10, 5)])
def test_a_step_has_as_many_images_as_it_has_time_for(
    monkeypatch: pytest.MonkeyPatch, multiply_adds: int, num_images: int
) -> None:
    # Six operations a multiply-add: forward, and twice that backward.
    monkeypatch.setattr(calibrate, "STEP_OPERATIONS", {"cpu": 300.0})
    monkeypatch.setattr(calibrate, "NUM_IMAGES", {"cpu": (2, 16)})
    sizes: list[int] = []
    model = Counted()
    model.conv.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    measure_precisions(
        model, 8, multiply_adds, RUNTIME, ("fp32",), channels_last=False, budget_seconds=0.0
    )
    assert set(sizes) == {num_images}
