from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from shared.errors import TrainingError
from skipline.specs import TrainSpec
from tests.worker.engine.tiny import (
    PREPROCESSING,
    RUNTIME,
    Hungry,
    Recorder,
    ReleaseAt,
    Run,
    assert_same_run,
    colored,
    plain_model,
    run_fit,
    through_files,
    tiny_spec,
)
from worker.engine.data import Batch
from worker.engine.distributed import ALONE
from worker.engine.events import Released
from worker.engine.learner import Learner

PLAIN_SGD = {"name": "sgd", "lr": 1.0, "momentum": 0, "nesterov": False, "weight_decay": 0}
"""The weights change by minus the gradient."""


def learner_of(spec: TrainSpec, model: nn.Module, num_images: int) -> Learner:
    return Learner(spec, model, PREPROCESSING, RUNTIME, ALONE, num_images)


def flat(model: nn.Module) -> torch.Tensor:
    """A copy of all weights in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def one_step(num_images: int, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of all weights in one row, and the sums of loss and right answers."""
    spec = tiny_spec(optimizer=PLAIN_SGD, augment=[], **options)
    model = plain_model(spec)
    learner = learner_of(spec, model, num_images)
    before = flat(model)
    data = colored(num_images, seed=1)
    batch = Batch(
        torch.from_numpy(data.images), torch.from_numpy(data.labels), torch.arange(num_images)
    )
    draws = learner.augment.draw(seed=0, epoch=1, num_samples=num_images)
    sums = learner.step(batch, draws, 1.0, 0, 1)
    return before - flat(model), sums


@pytest.mark.parametrize(("num_images", "accumulate_steps"), [(8, 2), (8, 8), (7, 2), (9, 4)])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(
    num_images: int, accumulate_steps: int
) -> None:
    whole, whole_sums = one_step(num_images)
    parts, parts_sums = one_step(num_images, accumulate_steps=accumulate_steps)
    assert whole.norm() > 0.1
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts_sums, whole_sums)


def test_the_sums_are_of_losses_and_right_answers() -> None:
    _, (loss, num_right) = one_step(6)
    spec = tiny_spec()
    model = plain_model(spec)
    learner = learner_of(spec, model, 6)
    data = colored(6, seed=1)
    with torch.no_grad():
        logits = model(learner.normalize(torch.from_numpy(data.images)))
    labels = torch.from_numpy(data.labels)
    assert loss == pytest.approx(6 * float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert num_right == int((logits.argmax(dim=1) == labels).sum())


def test_a_long_gradient_is_clipped_to_the_norm_and_keeps_its_direction() -> None:
    whole, _ = one_step(8)
    length = float(whole.norm())
    clipped, _ = one_step(8, gradient_clip_norm=length / 4)
    assert float(clipped.norm()) == pytest.approx(length / 4, rel=1e-3)
    torch.testing.assert_close(clipped * 4, whole, rtol=1e-3, atol=1e-5)


def test_a_short_gradient_is_left_as_it_is() -> None:
    whole, _ = one_step(8)
    left, _ = one_step(8, gradient_clip_norm=float(whole.norm()) * 2)
    torch.testing.assert_close(left, whole)


def test_the_norm_that_is_clipped_is_that_of_all_parts_together() -> None:
    whole, _ = one_step(8, gradient_clip_norm=0.05)
    parts, _ = one_step(8, gradient_clip_norm=0.05, accumulate_steps=4)
    assert float(whole.norm()) == pytest.approx(0.05, rel=1e-3)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_dropout_draws_anew_for_each_part() -> None:
    """Were each part seeded alike, parts of equal images would give equal losses."""
    spec = tiny_spec(model={"dropout": 0.5}, augment=[], accumulate_steps=2)
    learner = learner_of(spec, plain_model(spec), 2)
    masks: list[torch.Tensor] = []
    learner.model[4].register_forward_hook(  # type: ignore[index,operator,union-attr]
        lambda module, inputs, output: masks.append(output.detach() == 0)
    )
    images = torch.from_numpy(colored(1, seed=1).images).repeat(2, 1, 1, 1)
    batch = Batch(images, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    learner.step(batch, learner.augment.draw(0, 1, 2), 1.0, 7, 1)
    assert len(masks) == 2
    assert not torch.equal(masks[0], masks[1])


# Out of memory


def hungry(capacity: int) -> Callable[[TrainSpec], Hungry]:
    return lambda spec: Hungry(plain_model(spec), capacity)


HUNGRY_SPEC = {"batch_size": 8, "model": {"dropout": 0.3}, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def cut_from_the_start() -> Run:
    """What a run whose memory holds two images at once should come to."""
    spec = tiny_spec(**HUNGRY_SPEC, accumulate_steps=4)
    return run_fit(spec, model=Hungry(plain_model(spec), 2))


def test_out_of_memory_the_parts_of_a_batch_are_halved_until_they_fit(
    cut_from_the_start: Run,
) -> None:
    spec = tiny_spec(**HUNGRY_SPEC)
    model = Hungry(plain_model(spec), 2)
    run = run_fit(spec, model=model)
    assert cut_from_the_start.sink.events == []
    assert run.sink.events == ["micro_batch_halved", "micro_batch_halved"]
    assert run.sink.event_data == [
        {"accumulate_steps": 2, "micro_batch_size": 4},
        {"accumulate_steps": 4, "micro_batch_size": 2},
    ]
    assert model.sizes == [2] * len(model.sizes)
    assert_same_run(run, cut_from_the_start)


def test_a_step_that_ran_out_half_way_begins_anew(cut_from_the_start: Run) -> None:
    class OnceHalfWay(Hungry):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(self.sizes) == 1 and len(x) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    spec = tiny_spec(**HUNGRY_SPEC, accumulate_steps=2)
    run = run_fit(spec, model=OnceHalfWay(plain_model(spec), 8))
    assert run.sink.event_data == [{"accumulate_steps": 4, "micro_batch_size": 2}]
    losses = run.sink.values("train_loss")
    assert losses == cut_from_the_start.sink.values("train_loss")


def test_what_was_halved_stays_so_after_a_release(cut_from_the_start: Run, tmp_path: Path) -> None:
    spec = tiny_spec(**HUNGRY_SPEC)
    sink = Recorder()
    with pytest.raises(Released):
        run_fit(spec, model=hungry(2)(spec), sink=sink, control=ReleaseAt(2))
    resume = through_files(sink.checkpoints[-1], spec, tmp_path / "0")
    run = run_fit(spec, model=hungry(2)(spec), sink=sink, resume=resume)
    assert run.sink.events == ["micro_batch_halved", "micro_batch_halved", "resumed"]
    assert_same_run(run, cut_from_the_start)


def test_who_goes_on_with_smaller_parts_than_were_stored_keeps_them(tmp_path: Path) -> None:
    spec = tiny_spec(batch_size=8)
    sink = Recorder()
    with pytest.raises(Released):
        run_fit(spec, model=hungry(8)(spec), sink=sink, control=ReleaseAt(2))
    resume = through_files(sink.checkpoints[-1], spec, tmp_path / "0")
    smaller = tiny_spec(batch_size=8, accumulate_steps=4)
    run = run_fit(smaller, model=hungry(2)(smaller), sink=sink, resume=resume)
    assert run.sink.events == ["resumed"]


def test_parts_that_do_not_halve_evenly_give_the_same_step() -> None:
    """A batch of 6 in parts of 3, then of 2 (there are at most four, so the last is spared)."""
    spec = tiny_spec(batch_size=6)
    sink = Recorder()
    halved = run_fit(spec, model=hungry(2)(spec), sink=sink)
    assert [data["micro_batch_size"] for data in sink.event_data] == [3, 2]
    whole = run_fit(spec, model=hungry(6)(spec))
    assert halved.sink.values("val_loss") == pytest.approx(whole.sink.values("val_loss"), rel=1e-4)


@pytest.mark.parametrize(
    ("batch_size", "augment", "capacity", "num_halved"),
    [(8, [], 0, 3), (6, [], 0, 3), (8, ["mixup"], 1, 2)],
    ids=["a single image", "parts of 3, 2 and 1", "a pair that is mixed"],
)
def test_when_no_part_fits_training_fails_with_a_hint(
    batch_size: int, augment: list[str], capacity: int, num_halved: int
) -> None:
    spec = tiny_spec(batch_size=batch_size, augment=augment)
    sink = Recorder()
    with pytest.raises(TrainingError) as caught:
        run_fit(spec, model=hungry(capacity)(spec), sink=sink)
    assert caught.value.code == "cuda_out_of_memory"
    assert "image_size" in caught.value.hint
    assert sink.events == ["micro_batch_halved"] * num_halved
    assert sink.checkpoints == []
