from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shared.errors import TrainingError
from skipline.schemas import Progress
from skipline.specs import TrainSpec
from tests.worker.engine.tiny import (
    NUM_CLASSES,
    NUM_TRAIN,
    NUM_VAL,
    RUNTIME,
    Recorder,
    ReleaseAt,
    Run,
    assert_same_run,
    run_fit,
    through_files,
    tiny_model,
    tiny_spec,
)
from worker.engine import trainer
from worker.engine.events import Cancelled, Control, Released
from worker.engine.runtime import Runtime
from worker.engine.trainer import new_model

STEPS_PER_EPOCH = NUM_TRAIN // 4
LOOKS_PER_EPOCH = STEPS_PER_EPOCH + math.ceil(NUM_VAL / 4)
"""Training looks at its control before every batch of training and validation."""

Build = Callable[[TrainSpec], nn.Module]

COSINE = {
    "model": {"dropout": 0.3},
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "scheduler": {"name": "cosine", "warmup_epochs": 0.5},
}
PLATEAU = {
    "model": {"dropout": 0.3},
    "optimizer": {"name": "adamw", "lr": 1.0},
    "scheduler": {"name": "plateau", "factor": 0.5, "patience": 0},
}


EVERYTHING = {
    "model": {"dropout": 0.3},
    "augment": [
        {"name": "random_crop", "padding": 1},
        "horizontal_flip",
        "rand_augment",
        {"name": "cutout", "size": 2},
        "mixup",
        "cutmix",
    ],
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "decay_norm_and_bias": False},
    "scheduler": {"name": "one_cycle", "pct_start": 0.4},
    "loss": {"label_smoothing": 0.1},
    "ema_decay": 0.9,
    "gradient_clip_norm": 0.5,
    "accumulate_steps": 2,
    "early_stopping": {"patience": 2, "min_delta": 1000},
    "epochs": 9,
}


def release_and_go_on(
    spec: TrainSpec, looks: list[int], folder: Path, build: Build = tiny_model
) -> Run:
    """One run in the pieces of several processes, each released after so many looks; its sink
    has the points of all pieces."""
    sink, resume = Recorder(), None
    for piece, num_looks in enumerate(looks):
        torch.manual_seed(piece + 100)  # a new process knows nothing of the old one's generator
        control = ReleaseAt(num_looks)
        with pytest.raises(Released):
            run_fit(spec, model=build(spec), sink=sink, control=control, resume=resume)
        resume = through_files(sink.checkpoints[-1], spec, folder / str(piece))
    return run_fit(spec, model=build(spec), sink=sink, resume=resume)


@pytest.fixture(scope="module")
def cosine_run() -> Run:
    return run_fit(tiny_spec(**COSINE))


@pytest.fixture(scope="module")
def plateau_run() -> Run:
    return run_fit(tiny_spec(**PLATEAU))


def test_two_runs_give_the_same_bits(cosine_run: Run) -> None:
    assert_same_run(run_fit(tiny_spec(**COSINE)), cosine_run)


@pytest.mark.parametrize(
    "looks",
    [
        [4],
        [STEPS_PER_EPOCH + 1],
        [LOOKS_PER_EPOCH - 1],
        [LOOKS_PER_EPOCH + 1],
        [LOOKS_PER_EPOCH + 3],
        [3, 2, 1, 5],
    ],
    ids=[
        "within a log window",
        "before validation",
        "within validation",
        "right after an epoch's checkpoint",
        "within the second epoch",
        "many times",
    ],
)
def test_a_released_run_ends_as_an_uninterrupted_one(
    looks: list[int], cosine_run: Run, tmp_path: Path
) -> None:
    assert_same_run(release_and_go_on(tiny_spec(**COSINE), looks, tmp_path), cosine_run)


@pytest.mark.parametrize("settings", [COSINE, PLATEAU], ids=["cosine", "plateau"])
def test_a_released_resnet_ends_with_the_bits_of_an_uninterrupted_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    def build(spec: TrainSpec) -> nn.Module:
        return new_model(spec, NUM_CLASSES)

    spec = tiny_spec(**settings, epochs=1, batch_size=11)  # of two steps: one before, one after
    expected = run_fit(spec, model=build(spec), num_val=3)
    sink = Recorder()
    with pytest.raises(Released):
        run_fit(spec, model=build(spec), sink=sink, control=ReleaseAt(2), num_val=3)
    torch.manual_seed(100)
    resume = through_files(sink.checkpoints[-1], spec, tmp_path / "0")
    again = run_fit(spec, model=build(spec), sink=sink, resume=resume, num_val=3)
    assert_same_run(again, expected)


@pytest.fixture(scope="module")
def everything_run() -> Run:
    return run_fit(tiny_spec(**EVERYTHING))


@pytest.mark.parametrize(
    "looks",
    [[4], [LOOKS_PER_EPOCH + 1], [2 * LOOKS_PER_EPOCH + 4], [3, 2, 1, 5, 8, 2]],
    ids=["within a log window", "between epochs", "within the last epoch", "many times"],
)
def test_a_released_run_with_all_there_is_ends_as_an_uninterrupted_one(
    looks: list[int], everything_run: Run, tmp_path: Path
) -> None:
    assert (everything_run.result.epoch, everything_run.result.stop_reason) == (3, "early_stopping")
    assert_same_run(release_and_go_on(tiny_spec(**EVERYTHING), looks, tmp_path), everything_run)


def test_a_released_run_keeps_its_plateau(plateau_run: Run, tmp_path: Path) -> None:
    looks = [LOOKS_PER_EPOCH + 2, LOOKS_PER_EPOCH]
    assert_same_run(release_and_go_on(tiny_spec(**PLATEAU), looks, tmp_path), plateau_run)


def test_a_released_run_in_bf16_and_deterministic_mode_keeps_its_bits(tmp_path: Path) -> None:
    spec = tiny_spec(**COSINE, epochs=1, precision="bf16", deterministic=True)
    runtime = Runtime("cpu", "bf16", RUNTIME.num_threads)
    runtime.activate(deterministic=True)
    expected = run_fit(spec, runtime=runtime)
    sink = Recorder()
    with pytest.raises(Released):
        run_fit(spec, sink=sink, control=ReleaseAt(3), runtime=runtime)
    resume = through_files(sink.checkpoints[-1], spec, tmp_path / "0")
    assert_same_run(run_fit(spec, sink=sink, resume=resume, runtime=runtime), expected)


def test_a_crashed_run_goes_on_from_its_last_checkpoint(cosine_run: Run, tmp_path: Path) -> None:
    sink = Recorder()
    crash_at = ReleaseAt(LOOKS_PER_EPOCH + 4, request="cancel")  # nothing is written, as in a crash
    with pytest.raises(Cancelled):
        run_fit(tiny_spec(**COSINE), sink=sink, control=crash_at)
    (checkpoint,) = sink.checkpoints
    assert checkpoint.step == STEPS_PER_EPOCH
    sink.points = [point for point in sink.points if point[1] <= checkpoint.step]  # rewind
    resume = through_files(checkpoint, tiny_spec(**COSINE), tmp_path / "0")
    assert_same_run(run_fit(tiny_spec(**COSINE), sink=sink, resume=resume), cosine_run)


def test_a_finished_run_resumes_to_its_result(cosine_run: Run, tmp_path: Path) -> None:
    resume = through_files(cosine_run.sink.checkpoints[-1], tiny_spec(**COSINE), tmp_path / "0")
    again = run_fit(tiny_spec(**COSINE), resume=resume)
    assert again.result == cosine_run.result
    assert again.sink.checkpoints == []


def test_a_seed_changes_the_run(cosine_run: Run) -> None:
    other = run_fit(tiny_spec(**COSINE, seed=1, epochs=1))
    assert other.sink.values("train_loss")[0] != cosine_run.sink.values("train_loss")[0]


def test_training_learns() -> None:
    run = run_fit(tiny_spec(epochs=20, optimizer={"name": "adam", "lr": 0.03}))
    losses = run.sink.values("train_loss")
    assert losses[-1] < losses[0] / 2
    assert run.result.metrics["val_top1"] >= 0.9


def test_metrics_come_every_so_many_steps_and_at_each_epochs_end(cosine_run: Run) -> None:
    def places(name: str) -> list[tuple[int, int]]:
        return [(step, epoch) for n, step, epoch, _ in cosine_run.sink.points if n == name]

    assert STEPS_PER_EPOCH == 5
    for name in ("train_loss", "train_top1", "lr", "images_per_second"):
        assert places(name) == [(3, 1), (5, 1), (6, 2), (9, 2), (10, 2), (12, 3), (15, 3)]
    for name in ("val_loss", "val_top1", "val_top5", "epoch_seconds"):
        assert places(name) == [(5, 1), (10, 2), (15, 3)]
    assert {point[0] for point in cosine_run.sink.points} == {
        *("train_loss", "train_top1", "lr", "images_per_second"),
        *("val_loss", "val_top1", "val_top5", "epoch_seconds"),
    }
    assert all(math.isfinite(value) for *_, value in cosine_run.sink.points)


def test_windows_hold_the_mean_of_their_steps(cosine_run: Run) -> None:
    each = run_fit(tiny_spec(**COSINE, log_every_steps=1, epochs=3)).sink
    for name in ("train_loss", "train_top1"):
        singles = each.values(name)
        bounds = itertools.pairwise([0, 3, 5, 6, 9, 10, 12, 15])
        expected = [np.mean(singles[first:last]) for first, last in bounds]
        assert cosine_run.sink.values(name) == pytest.approx(expected, rel=1e-5)


def test_the_rate_that_is_written_is_that_of_the_step() -> None:
    spec = tiny_spec(
        epochs=2,
        log_every_steps=1,
        optimizer={"name": "sgd", "lr": 0.08},
        scheduler={"name": "step", "milestones": [1], "gamma": 0.5, "warmup_epochs": 0.8},
    )
    lrs = run_fit(spec).sink.values("lr")
    assert lrs == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.08, *[0.04] * 5])


def test_a_reduced_rate_is_told(plateau_run: Run) -> None:
    assert "lr_reduced" in plateau_run.sink.events
    assert plateau_run.sink.values("lr")[-1] < 1


def test_every_epoch_ends_with_a_checkpoint_after_its_metrics(cosine_run: Run) -> None:
    checkpoints = cosine_run.sink.checkpoints
    assert [(c.epoch, c.step) for c in checkpoints] == [(1, 5), (2, 10), (3, 15)]
    losses = cosine_run.sink.values("val_loss")
    assert [c.metrics["val_loss"] for c in checkpoints] == losses
    assert [c.is_best for c in checkpoints] == [
        loss < min(losses[:index], default=math.inf) for index, loss in enumerate(losses)
    ]
    best = min(range(3), key=losses.__getitem__)
    assert cosine_run.result.best.step == checkpoints[best].step
    assert cosine_run.result.best.value == losses[best]


def test_resume_states_are_plain_values_and_tensors(cosine_run: Run) -> None:
    def is_plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(is_plain, value.values()))
        if isinstance(value, (list, tuple)):
            return all(map(is_plain, value))
        return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))

    resume = cosine_run.sink.checkpoints[0].resume
    assert is_plain(dict(resume))
    assert "weights" not in resume
    json.dumps({name: value for name, value in resume.items() if name in ("best", "metrics")})


def test_checkpoints_come_every_so_many_epochs_and_at_the_end() -> None:
    spec = tiny_spec(epochs=5, checkpoint={"every_epochs": 2})
    assert [c.epoch for c in run_fit(spec).sink.checkpoints] == [2, 4, 5]


def test_each_epoch_whose_checkpoint_is_kept_gets_one() -> None:
    spec = tiny_spec(epochs=7, checkpoint={"every_epochs": 4, "keep_every_epochs": 3})
    checkpoints = run_fit(spec).sink.checkpoints
    assert [(c.epoch, c.is_kept) for c in checkpoints] == [
        (3, True),
        (4, False),
        (6, True),
        (7, False),
    ]


def test_what_is_written_within_an_epoch_is_not_kept_for_good() -> None:
    sink = Recorder()
    spec = tiny_spec(checkpoint={"keep_every_epochs": 1})
    with pytest.raises(Released):
        run_fit(spec, sink=sink, control=ReleaseAt(STEPS_PER_EPOCH + 2))  # while it validates
    run = run_fit(spec, control=ReleaseAt(3, "stop"))
    assert [(c.step, c.is_kept) for c in sink.checkpoints] == [(5, False)]
    assert [(c.step, c.is_kept) for c in run.sink.checkpoints] == [(2, False)]


def test_the_best_is_chosen_by_the_monitored_metric() -> None:
    spec = tiny_spec(epochs=4, checkpoint={"monitor": "val_top1"})
    run = run_fit(spec)
    accuracies = run.sink.values("val_top1")
    assert run.result.best.epoch == accuracies.index(max(accuracies)) + 1  # the first of equals
    assert [c.epoch for c in run.sink.checkpoints if c.is_best][-1] == run.result.best.epoch


def test_an_old_checkpoint_is_renewed_within_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(trainer.time, "monotonic", lambda: float(next(ticks)))
    run = run_fit(tiny_spec(epochs=1, checkpoint={"every_minutes": 0.01}))
    assert [(c.step, dict(c.metrics) == {}) for c in run.sink.checkpoints] == [
        *((step, True) for step in (1, 2, 3, 4)),
        (5, False),
    ]
    assert not any(c.is_best for c in run.sink.checkpoints[:-1])


def test_checkpoints_of_one_run_never_share_a_step() -> None:
    sink, control = Recorder(), Control()
    sink.on_checkpoint = lambda: setattr(control, "request", "release")
    with pytest.raises(Released):
        run_fit(tiny_spec(), sink=sink, control=control)
    assert [c.step for c in sink.checkpoints] == [STEPS_PER_EPOCH]


def test_a_release_before_the_first_step_writes_nothing() -> None:
    sink = Recorder()
    with pytest.raises(Released):
        run_fit(tiny_spec(), sink=sink, control=ReleaseAt(1))
    assert sink.checkpoints == []


def test_a_cancelled_run_writes_nothing() -> None:
    sink = Recorder()
    with pytest.raises(Cancelled):
        run_fit(tiny_spec(), sink=sink, control=ReleaseAt(3, request="cancel"))
    assert sink.checkpoints == []


class Exploding(nn.Module):
    """A network whose n-th answer in training, or first in validation, is infinite."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.network = tiny_model(tiny_spec())
        self.answers_left = at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.network(x)
        if self.answers_left is None:
            return answer if self.training else answer + math.inf
        self.answers_left -= 1
        return answer + math.inf if self.answers_left == 0 else answer


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (2, r"training loss is nan at step 3 with lr 0.03; .* finite training loss was none"),
        (5, r"training loss is nan at step 5 with lr 0.05; .* finite training loss was \d"),
        (None, r"validation loss is nan at step 5 with lr 0.05; .* finite training loss was \d"),
    ],
)
def test_a_loss_that_is_not_a_number_fails_with_a_hint(at: int | None, message: str) -> None:
    sink = Recorder()
    with pytest.raises(TrainingError, match=message) as caught:
        run_fit(tiny_spec(), model=Exploding(at), sink=sink)
    assert caught.value.code == "nan_loss"
    assert "optimizer.lr" in caught.value.hint
    assert sink.checkpoints == []
    assert all(math.isfinite(value) for *_, value in sink.points)


def test_weights_that_went_wrong_are_not_stored_on_release() -> None:
    sink = Recorder()
    with pytest.raises(TrainingError, match="at step 2"):
        run_fit(tiny_spec(), model=Exploding(2), sink=sink, control=ReleaseAt(3))
    assert sink.checkpoints == []


def test_a_dataset_smaller_than_a_batch_is_one_batch() -> None:
    run = run_fit(tiny_spec(epochs=2, batch_size=64))
    assert run.result.step == 2
    assert [step for name, step, _, _ in run.sink.points if name == "train_loss"] == [1, 2]


def test_a_single_value_a_channel_is_a_typed_failure() -> None:
    spec = tiny_spec(batch_size=1)
    with pytest.raises(TrainingError) as caught:
        run_fit(spec, model=new_model(spec, NUM_CLASSES))
    assert caught.value.code == "batch_too_small"


def test_progress_is_told_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(ticks) / 8)
    run = run_fit(tiny_spec(epochs=2))
    told = run.sink.progresses
    assert 3 < len(told) < 2 * LOOKS_PER_EPOCH / 2
    assert told[0] == Progress(step=0, num_steps=10, epoch=1, num_epochs=2)
    assert (told[-1].step, told[-1].epoch, told[-1].eta_seconds) == (10, 2, 0)
    assert [p.step for p in told] == sorted(p.step for p in told)
    assert all(p.images_per_second and p.eta_seconds for p in told[1:-1])


def test_memory_is_channels_last_unless_told_otherwise() -> None:
    for channels_last in (True, False):
        weights = run_fit(tiny_spec(epochs=1, channels_last=channels_last)).weights
        assert weights["0.weight"].is_contiguous() != channels_last
