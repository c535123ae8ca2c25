from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.vision.preprocessing import Normalizer
from tests.worker.engine.tiny import (
    NUM_VAL,
    PREPROCESSING,
    RUNTIME,
    colored,
    run_fit,
    tiny_model,
    tiny_spec,
)
from worker.engine.data import DeviceData
from worker.engine.ema import AveragedModel
from worker.engine.evaluate import evaluate


def set_all(model: nn.Module, value: float) -> None:
    """Every weight and every batch-norm statistic; the counter of batches too."""
    for tensor in model.state_dict().values():
        tensor.fill_(value)


def levels(model: nn.Module) -> set[float]:
    """The values that occur in weights and statistics, of single precision."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return {round(value, 5) for tensor in tensors for value in tensor.flatten().tolist()}


def test_the_average_of_weights_and_statistics_is_as_worked_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    set_all(model, 0)
    average = AveragedModel(model, decay=0.9)
    set_all(model, 11)
    average.update(step=1)  # keeps (1 + 1) / (10 + 1) of the old
    assert levels(average.model) == {9.0}
    set_all(model, 1)
    average.update(step=2)  # keeps 3 / 12
    assert levels(average.model) == {3.0}
    set_all(model, 13)
    average.update(step=80)  # keeps 81 / 90 = 0.9, as it does from here on
    assert levels(average.model) == {4.0}
    set_all(model, 14)
    average.update(step=1000)
    assert levels(average.model) == {5.0}


def test_counters_are_copied() -> None:
    model = nn.BatchNorm2d(2)
    average = AveragedModel(model, decay=0.5)
    set_all(model, 7)
    average.update(step=1)
    assert average.model.state_dict()["num_batches_tracked"] == 7


def test_the_average_takes_no_gradients_and_leaves_the_network_alone() -> None:
    model = nn.Linear(2, 2)
    average = AveragedModel(model, decay=0.5)
    before = model.weight.detach().clone()
    set_all(average.model, 1)
    assert torch.equal(model.weight, before)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_average_is_what_is_validated_and_stored() -> None:
    spec = tiny_spec(ema_decay=0.9)
    run = run_fit(spec)
    checkpoint = run.sink.checkpoints[-1]
    stored = tiny_model(spec)
    stored.load_state_dict(checkpoint.weights)
    evaluation = evaluate(
        stored,
        DeviceData(colored(NUM_VAL, seed=2), torch.device("cpu")),
        Normalizer(PREPROCESSING, torch.device("cpu"), spec.channels_last),
        RUNTIME,
        batch_size=4,
        before_batch=lambda done, total: None,
    )
    assert evaluation.loss == pytest.approx(run.result.metrics["val_loss"], rel=1e-6)
    live = checkpoint.resume["learner"]["live_weights"]
    assert all(torch.equal(live[name], run.weights[name]) for name in run.weights)
    assert not torch.equal(checkpoint.weights["6.weight"], live["6.weight"])
    assert checkpoint.weights["1.num_batches_tracked"] == 15


def test_the_average_trails_behind_by_the_steps_weights() -> None:
    """One step of SGD at a time: the stored average is made of what each step left."""
    spec = tiny_spec(ema_decay=0.9, checkpoint={"every_minutes": 1e-9})
    checkpoints = run_fit(spec).sink.checkpoints[:5]
    assert [checkpoint.step for checkpoint in checkpoints] == [1, 2, 3, 4, 5]
    average = tiny_model(spec).state_dict()["6.weight"]
    for checkpoint in checkpoints:
        keep = (1 + checkpoint.step) / (10 + checkpoint.step)
        live = checkpoint.resume["learner"]["live_weights"]["6.weight"]
        average = keep * average + (1 - keep) * live
        torch.testing.assert_close(checkpoint.weights["6.weight"], average)
