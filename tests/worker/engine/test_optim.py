from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import nn

from skipline.specs import (
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    OneCycle,
    OptimizerSpec,
    Plateau,
    Step,
)
from worker.engine.optim import Schedule, build_optimizer, set_lr


def rates(schedule: Schedule, num_steps: int) -> list[float]:
    return [schedule.lr(step) for step in range(1, num_steps + 1)]


def test_cosine_falls_from_lr_to_min_lr() -> None:
    schedule = Schedule(Cosine(warmup_epochs=0, min_lr=0.2), 1.0, steps_per_epoch=2, num_epochs=2)
    half = 0.4 * math.sqrt(0.5)
    assert rates(schedule, 4) == pytest.approx([1.0, 0.6 + half, 0.6, 0.6 - half])


def test_warm_up_is_linear_and_ends_at_the_full_rate() -> None:
    schedule = Schedule(Cosine(warmup_epochs=2), 0.8, steps_per_epoch=2, num_epochs=4)
    expected = [
        0.2,
        0.4,
        0.6,
        0.8,
        0.8,
        0.4 + 0.4 * math.sqrt(0.5),
        0.4,
        0.4 - 0.4 * math.sqrt(0.5),
    ]
    assert rates(schedule, 8) == pytest.approx(expected)


def test_warm_up_may_last_a_part_of_an_epoch() -> None:
    schedule = Schedule(Constant(warmup_epochs=0.5), 1.0, steps_per_epoch=4, num_epochs=1)
    assert rates(schedule, 4) == [0.5, 1.0, 1.0, 1.0]


def test_cosine_equals_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.01)
    ours = Schedule(Cosine(warmup_epochs=0, min_lr=0.01), 0.3, steps_per_epoch=10, num_epochs=3)
    for step in range(1, 31):
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_step_multiplies_after_each_milestone() -> None:
    schedule = Schedule(Step(milestones=(1, 3), gamma=0.1), 1.0, steps_per_epoch=2, num_epochs=4)
    assert rates(schedule, 8) == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_milestones_count_epochs_of_the_whole_job() -> None:
    schedule = Schedule(
        Step(milestones=(1,), gamma=0.5, warmup_epochs=2), 1.0, steps_per_epoch=2, num_epochs=3
    )
    assert rates(schedule, 6) == pytest.approx([0.25, 0.5, 0.375, 0.5, 0.5, 0.5])


def test_plateau_follows_torchs() -> None:
    losses = [1.0, 0.9, 0.95, 0.91, 0.9, 0.89995, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7, 0.9, 0.9, 0.9, 0.9]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="min", factor=0.3, patience=1, min_lr=0.01
    )
    ours = Schedule(
        Plateau(factor=0.3, patience=1, min_lr=0.01), 0.5, steps_per_epoch=1, num_epochs=99
    )
    followed = set()
    for step, loss in enumerate(losses * 2, start=1):
        before = optimizer.param_groups[0]["lr"]
        theirs.step(loss)
        reduced = ours.observe(loss, step)
        assert ours.lr(step + 1) == optimizer.param_groups[0]["lr"]
        assert reduced == (optimizer.param_groups[0]["lr"] < before)
        followed.add(ours.lr(step + 1))
    assert len(followed) > 3
    assert min(followed) == 0.01


def test_plateau_counts_after_the_warm_up() -> None:
    spec = Plateau(factor=0.5, patience=0, warmup_epochs=2)
    schedule = Schedule(spec, 1.0, steps_per_epoch=1, num_epochs=9)
    assert [schedule.observe(loss, step) for step, loss in enumerate([1.0, 5.0], 1)] == [False] * 2
    assert rates(schedule, 3) == [0.5, 1.0, 1.0]
    assert not schedule.observe(5.0, 3)
    assert schedule.observe(5.0, 4)
    assert schedule.lr(5) == 0.5


def test_plateau_goes_on_where_it_was() -> None:
    spec = Plateau(factor=0.5, patience=1)
    schedule = Schedule(spec, 1.0, steps_per_epoch=1, num_epochs=9)
    for step, loss in enumerate([1.0, 1.0, 1.0, 1.0], start=1):
        schedule.observe(loss, step)
    resumed = Schedule(spec, 1.0, steps_per_epoch=1, num_epochs=9)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.lr(5) == schedule.lr(5) == 0.5
    assert resumed.observe(1.0, 5)
    assert resumed.lr(6) == 0.25


@pytest.mark.parametrize(
    ("spec", "theirs"),
    [
        (
            SGD(lr=0.1, momentum=0.8, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, 0.1, 0.8, nesterov=True, weight_decay=0.01),
        ),
        (
            SGD(lr=0.1, momentum=0, nesterov=False, weight_decay=0),
            lambda p: torch.optim.SGD(p, 0.1),
        ),
        (
            Adam(lr=0.1, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.01),
            lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.95), 1e-3, 0.01),
        ),
        (
            AdamW(lr=0.1, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.01),
            lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.95), 1e-3, 0.01),
        ),
    ],
    ids=["sgd", "plain sgd", "adam", "adamw"],
)
def test_optimizers_update_as_torchs_plain_loops_do(spec: OptimizerSpec, theirs: object) -> None:
    torch.manual_seed(0)
    ours_model, their_model = nn.Linear(5, 3), nn.Linear(5, 3)
    their_model.load_state_dict(ours_model.state_dict())
    ours = build_optimizer(spec, ours_model)
    reference = theirs(their_model.parameters())  # type: ignore[operator]
    for step in range(5):
        x = torch.randn(4, 5)
        for model, optimizer in ((ours_model, ours), (their_model, reference)):
            set_lr(optimizer, 0.1 / (step + 1))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for mine, other in zip(ours_model.parameters(), their_model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize(("num_epochs", "pct_start"), [(3, 0.3), (1, 0.25), (2, 0.9)])
def test_one_cycle_equals_torchs(
    anneal: Literal["cos", "linear"], num_epochs: int, pct_start: float
) -> None:
    num_steps = 10 * num_epochs
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.3,
        total_steps=num_steps,
        pct_start=pct_start,
        anneal_strategy=anneal,
        cycle_momentum=False,
        div_factor=10,
        final_div_factor=100,
    )
    spec = OneCycle(pct_start=pct_start, div_factor=10, final_div_factor=100, anneal=anneal)
    ours = Schedule(spec, 0.3, steps_per_epoch=10, num_epochs=num_epochs)
    for step in range(1, num_steps + 1):
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < num_steps:
            theirs.step()


def test_one_cycle_of_very_few_steps_is_finite_and_ends_low() -> None:
    for num_steps in (1, 2, 3):
        schedule = Schedule(OneCycle(), 1.0, steps_per_epoch=num_steps, num_epochs=1)
        assert rates(schedule, num_steps)[0] == pytest.approx(1 / 25)
        assert all(0 < rate <= 1 for rate in rates(schedule, num_steps))
    assert rates(schedule, 3) == pytest.approx([1 / 25, 1, 1 / 25 / 1e4])


def test_norms_and_biases_can_be_spared_the_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spec = SGD(weight_decay=0.01, decay_norm_and_bias=False)
    groups = [
        ([names[id(parameter)] for parameter in group["params"]], group["weight_decay"])
        for group in build_optimizer(spec, model).param_groups
    ]
    assert groups == [
        (["0.weight", "3.weight"], 0.01),
        (["0.bias", "1.weight", "1.bias", "3.bias"], 0.0),
    ]
    (whole,) = build_optimizer(SGD(weight_decay=0.01), model).param_groups
    assert (len(whole["params"]), whole["weight_decay"]) == (6, 0.01)


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_what_is_frozen_is_not_in_the_optimizer(decay_norm_and_bias: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(Adam(decay_norm_and_bias=decay_norm_and_bias), model)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert held == [id(model[1].weight), id(model[1].bias)]
