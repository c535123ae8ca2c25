"""Trainings that end before their last epoch, and those that only try themselves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.worker.engine.tiny import (
    NUM_TRAIN,
    NUM_VAL,
    Recorder,
    ReleaseAt,
    RequestAt,
    Run,
    Ticking,
    assert_same_run,
    run_fit,
    through_files,
    tiny_model,
    tiny_spec,
)
from worker.engine import trainer
from worker.engine.events import Cancelled, Control, Interrupted, Released, Request
from worker.engine.trainer import Patience

STEPS_PER_EPOCH = NUM_TRAIN // 4
VAL_LOOKS = 3
"""Batches of a validation: ten images in fours."""
NEVER_BETTER = {"patience": 2, "min_delta": 1000}
"""No loss falls by so much: training ends with the third validation."""


def judge(patience: Patience, name: str, values: list[float]) -> list[bool]:
    return [patience.is_over({"val_loss": 0.5, "val_top1": 0.5, name: value}) for value in values]


@pytest.mark.parametrize(
    ("monitor", "values"),
    [
        # 0.95 is not better by more than 0.1, 0.85 is, and after it two in a row are not.
        ("val_loss", [1.0, 0.95, 0.85, 0.9, 0.8]),
        ("val_top1", [0.5, 0.55, 0.65, 0.6, 0.7]),
    ],
)
def test_patience_counts_validations_that_are_not_better_by_enough(
    monitor: str, values: list[float]
) -> None:
    spec = tiny_spec(
        early_stopping={"patience": 2, "min_delta": 0.1}, checkpoint={"monitor": monitor}
    )
    assert judge(Patience(spec), monitor, values) == [False, False, False, False, True]


def test_an_equal_value_is_not_better() -> None:
    assert judge(Patience(tiny_spec(early_stopping={"patience": 1})), "val_loss", [1, 1]) == [
        False,
        True,
    ]


def test_nobody_loses_patience_unless_asked_to() -> None:
    assert not any(judge(Patience(tiny_spec()), "val_loss", [1.0] * 50))


def test_patience_goes_on_where_it_was() -> None:
    spec = tiny_spec(early_stopping={"patience": 3})
    first = Patience(spec)
    assert not any(judge(first, "val_loss", [1.0, 2.0, 2.0]))
    second = Patience(spec)
    second.load_state_dict(first.state_dict())
    assert judge(second, "val_loss", [1.5]) == [True]


def test_early_stopping_ends_training_with_a_checkpoint() -> None:
    spec = tiny_spec(epochs=9, early_stopping=NEVER_BETTER, checkpoint={"every_epochs": 2})
    run = run_fit(spec)
    assert (run.result.epoch, run.result.step) == (3, 3 * STEPS_PER_EPOCH)
    assert run.result.stop_reason == "early_stopping"
    assert [(c.epoch, bool(c.metrics)) for c in run.sink.checkpoints] == [(2, True), (3, True)]
    assert run.sink.progresses[-1].eta_seconds == 0


def test_who_reaches_the_last_epoch_did_not_end_early() -> None:
    run = run_fit(tiny_spec(epochs=3, early_stopping=NEVER_BETTER))
    assert (run.result.epoch, run.result.stop_reason) == (3, None)


def test_patience_survives_a_release(tmp_path: Path) -> None:
    spec = tiny_spec(epochs=9, early_stopping=NEVER_BETTER)
    sink = Recorder()
    with pytest.raises(Released):
        run_fit(spec, sink=sink, control=ReleaseAt(2 * (STEPS_PER_EPOCH + VAL_LOOKS) + 3))
    resume = through_files(sink.checkpoints[-1], spec, tmp_path / "0")
    assert_same_run(run_fit(spec, sink=sink, resume=resume), run_fit(spec))


def test_a_run_that_ended_early_resumes_to_its_result(tmp_path: Path) -> None:
    spec = tiny_spec(epochs=9, early_stopping=NEVER_BETTER)
    run = run_fit(spec)
    resume = through_files(run.sink.checkpoints[-1], spec, tmp_path / "0")
    again = run_fit(spec, resume=resume)
    assert again.result == run.result
    assert again.sink.checkpoints == []


# Time budgets. Each look, of which there is one before every batch, takes a second.


class ReleaseAtSecond(Ticking):
    def __init__(self, second: float) -> None:
        self._second = second

    def look(self) -> Request | None:
        super().look()
        return "release" if self.now == self._second else None


@pytest.fixture
def run_timed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(control: Ticking | None = None, **arguments: Any) -> Run:
        clock = control or Ticking()
        monkeypatch.setattr(trainer.time, "monotonic", lambda: clock.now)
        return run_fit(arguments.pop("spec"), control=clock, **arguments)

    return run


def test_time_that_is_over_ends_training_within_the_epoch(run_timed: Any) -> None:
    # Eight looks are the first epoch; the eleventh, before the third batch of the second, is late.
    run = run_timed(spec=tiny_spec(epochs=9, time_budget_seconds=10.5, log_every_steps=99))
    result, sink = run.result, run.sink
    assert (result.epoch, result.step, result.stop_reason) == (2, 7, "time_budget")
    places = [(name, step, epoch) for name, step, epoch, _ in sink.points]
    assert [p for p in places if p[0] == "train_loss"] == [
        ("train_loss", 5, 1),
        ("train_loss", 7, 2),
    ]
    assert [p for p in places if p[0] == "val_loss"] == [("val_loss", 5, 1), ("val_loss", 7, 2)]
    assert [(c.step, c.epoch, bool(c.metrics)) for c in sink.checkpoints] == [
        (5, 1, True),
        (7, 2, True),
    ]
    assert result.metrics == sink.checkpoints[-1].metrics
    losses = sink.values("val_loss")
    assert result.best.step == (7 if losses[1] < losses[0] else 5)
    assert result.best.value == min(losses)


def test_time_that_is_over_after_a_validation_ends_training_there(run_timed: Any) -> None:
    run = run_timed(spec=tiny_spec(epochs=9, time_budget_seconds=8.5))
    assert (run.result.epoch, run.result.step) == (1, STEPS_PER_EPOCH)
    assert run.result.stop_reason == "time_budget"
    assert [c.step for c in run.sink.checkpoints] == [STEPS_PER_EPOCH]


def test_time_that_suffices_for_all_epochs_is_no_early_end(run_timed: Any) -> None:
    run = run_timed(spec=tiny_spec(epochs=2, time_budget_seconds=16))
    assert (run.result.epoch, run.result.stop_reason) == (2, None)


def test_at_least_one_step_is_done(run_timed: Any) -> None:
    run = run_timed(spec=tiny_spec(time_budget_seconds=0.5))
    assert (run.result.epoch, run.result.step, run.result.best.step) == (1, 1, 1)
    assert run.result.stop_reason == "time_budget"


def test_the_time_of_all_attempts_counts(run_timed: Any, tmp_path: Path) -> None:
    spec = tiny_spec(epochs=9, time_budget_seconds=10.5)
    sink = Recorder()
    with pytest.raises(Released):
        run_timed(ReleaseAtSecond(5), spec=spec, sink=sink)
    assert sink.checkpoints[-1].step == 4
    resume = through_files(sink.checkpoints[-1], spec, tmp_path / "0")
    # 5.5 s are left: the fifth batch, three of validation, one of the next epoch.
    run = run_timed(spec=spec, sink=sink, resume=resume)
    assert (run.result.epoch, run.result.step) == (2, 6)
    assert run.result.stop_reason == "time_budget"


def test_a_validation_that_was_not_stored_is_stored_when_time_is_over(
    run_timed: Any, tmp_path: Path
) -> None:
    spec = tiny_spec(epochs=9, time_budget_seconds=8.5, checkpoint={"every_epochs": 2})
    sink = Recorder()
    with pytest.raises(Released):  # Right after the first epoch, of which no checkpoint is kept.
        run_timed(ReleaseAtSecond(9), spec=spec, sink=sink)
    assert [(c.step, dict(c.metrics)) for c in sink.checkpoints] == [(5, {})]
    resume = through_files(sink.checkpoints[-1], spec, tmp_path / "0")
    run = run_timed(spec=spec, sink=sink, resume=resume)
    assert (run.result.step, run.result.best.step) == (5, 5)
    assert sink.checkpoints[-1].metrics == run.result.metrics
    assert run.result.metrics["val_loss"] == sink.values("val_loss")[-1]


def test_who_is_released_while_validating_the_last_weights_validates_them_next(
    run_timed: Any, tmp_path: Path
) -> None:
    spec = tiny_spec(epochs=9, time_budget_seconds=2.5)
    sink = Recorder()
    with pytest.raises(Released):  # Two steps, then the time is over; the second batch of images.
        run_timed(ReleaseAtSecond(5), spec=spec, sink=sink)
    assert [(c.step, dict(c.metrics)) for c in sink.checkpoints] == [(2, {})]
    resume = through_files(sink.checkpoints[-1], spec, tmp_path / "0")
    run = run_timed(spec=spec, sink=sink, resume=resume)
    assert (run.result.step, run.result.stop_reason) == (2, "time_budget")
    assert [(n, step) for n, step, _, _ in sink.points if n == "val_loss"] == [("val_loss", 2)]
    assert run.result.best.value == sink.values("val_loss")[0]


# Stops


def stopped(looks: int, sink: Recorder | None = None, **keys: Any) -> Run:
    return run_fit(tiny_spec(epochs=9, **keys), sink=sink, control=ReleaseAt(looks, "stop"))


def again(run: Recorder, folder: Path, control: Control | None = None, **keys: Any) -> Run:
    """The next attempt, after the last checkpoint of the one before; by default told at once that
    it was stopped."""
    if control is None:
        control = Control()
        control.was_stopped = True
    spec = tiny_spec(epochs=9, **keys)
    resume = through_files(run.checkpoints[-1], spec, folder)
    return run_fit(spec, sink=run, control=control, resume=resume)


def places(run: Run) -> list[tuple[int, int, bool]]:
    """Of the checkpoints: step, epoch, and whether these weights were validated."""
    return [(c.step, c.epoch, bool(c.metrics)) for c in run.sink.checkpoints]


def steps_validated(run: Run) -> list[int]:
    return [step for name, step, _, _ in run.sink.points if name == "val_loss"]


FIRST_EPOCH = STEPS_PER_EPOCH + VAL_LOOKS
"""Looks of the first epoch."""


@pytest.mark.parametrize(
    ("looks", "expected", "validated"),
    [
        (1, [(0, 1, True)], [0]),
        (3, [(2, 1, True)], [2]),
        (STEPS_PER_EPOCH + 2, [(5, 1, True)], [5]),  # while it validates
        (FIRST_EPOCH + 1, [(5, 1, True)], [5]),
        (FIRST_EPOCH + 3, [(5, 1, True), (7, 2, True)], [5, 7]),
    ],
    ids=["before the first step", "within", "validating", "between", "within the second"],
)
def test_who_is_asked_to_stop_does_no_more_steps_and_validates_what_there_is(
    looks: int, expected: list[tuple[int, int, bool]], validated: list[int]
) -> None:
    run = stopped(looks)
    assert run.result.stop_reason == "user"
    assert places(run) == expected
    assert steps_validated(run) == validated
    assert (run.result.epoch, run.result.step) == (expected[-1][1], expected[-1][0])
    assert run.result.metrics == run.sink.checkpoints[-1].metrics
    assert run.sink.progresses[-1].eta_seconds in (0, None)


def test_a_stopped_run_keeps_an_older_best_checkpoint() -> None:
    # A rate at which the second epoch's first steps make the network worse.
    run = stopped(
        FIRST_EPOCH + 3, optimizer={"name": "sgd", "lr": 2.0}, loss={"name": "cross_entropy"}
    )
    before, at_the_end = run.sink.values("val_loss")
    assert at_the_end > before
    assert [c.is_best for c in run.sink.checkpoints] == [True, False]
    assert (run.result.best.step, run.result.best.value) == (5, before)


def test_asked_while_the_last_epoch_is_validated_it_simply_ends() -> None:
    spec = tiny_spec(epochs=2)
    control = ReleaseAt(2 * FIRST_EPOCH - 1, "stop")
    assert_same_run(run_fit(spec, control=control), run_fit(spec))


def test_patience_that_ends_with_a_stop_does_not_take_its_reason() -> None:
    early = {"patience": 1, "min_delta": 1000}
    run = stopped(2, early_stopping=early)
    assert run.result.stop_reason == "user"
    run = stopped(FIRST_EPOCH + 2, early_stopping=early)
    assert run.result.stop_reason == "user"


@pytest.mark.parametrize("every_epochs", [1, 2])
def test_after_a_crash_a_stopped_run_comes_to_the_result_of_its_last_checkpoint(
    tmp_path: Path, every_epochs: int
) -> None:
    keys = {"checkpoint": {"every_epochs": every_epochs}}
    sink = Recorder()
    with pytest.raises(Cancelled):  # as a crash, which writes nothing
        run_fit(
            tiny_spec(epochs=9, **keys),
            sink=sink,
            control=RequestAt({2 * FIRST_EPOCH + 3: "stop", 2 * FIRST_EPOCH + 4: "cancel"}),
        )
    run = again(sink, tmp_path / "0", **keys)
    assert (run.result.step, run.result.stop_reason) == (10, "user")
    assert places(run)[-1] == (10, 2, True)
    assert steps_validated(run) == [5, 10]  # The one of the stop itself was lost with the crash.


def test_a_checkpoint_that_was_not_validated_is_validated_by_the_next_attempt(
    tmp_path: Path,
) -> None:
    sink = Recorder()
    with pytest.raises(Released):  # Asked to stop after two steps, then to leave: a full drain.
        run_fit(tiny_spec(epochs=9), sink=sink, control=RequestAt({3: "stop", 5: "release"}))
    assert [(c.step, dict(c.metrics)) for c in sink.checkpoints] == [(2, {})]
    run = again(sink, tmp_path / "0")
    assert places(run) == [(2, 1, False), (2, 1, True)]
    assert (run.result.step, run.result.stop_reason) == (2, "user")
    assert run.result == stopped(3).result


def test_once_more_after_its_end_a_stopped_run_does_nothing(tmp_path: Path) -> None:
    first = stopped(FIRST_EPOCH + 3)
    num_checkpoints, num_points = len(first.sink.checkpoints), len(first.sink.points)
    run = again(first.sink, tmp_path / "0")
    assert run.result == first.result
    assert (len(run.sink.checkpoints), len(run.sink.points)) == (num_checkpoints, num_points)


@pytest.mark.parametrize("request_", ["cancel", "release"])
def test_a_stop_can_be_followed_by_an_interruption(request_: Request) -> None:
    control = RequestAt({3: "stop", 4: request_})
    sink = Recorder()
    with pytest.raises(Interrupted) as caught:
        run_fit(tiny_spec(), sink=sink, control=control)
    assert isinstance(caught.value, Cancelled if request_ == "cancel" else Released)
    assert [c.step for c in sink.checkpoints] == ([] if request_ == "cancel" else [2])


@pytest.mark.parametrize("looks", [1, 3, FIRST_EPOCH + 3])
def test_who_goes_on_after_a_stop_trains_to_the_end_with_the_weights_of_who_never_stopped(
    tmp_path: Path, looks: int
) -> None:
    first = stopped(looks)
    run = again(first.sink, tmp_path / "0", control=Control())
    twin = run_fit(tiny_spec(epochs=9))
    assert (run.result.step, run.result.stop_reason) == (9 * STEPS_PER_EPOCH, None)
    for name, weight in twin.weights.items():
        assert (run.weights[name] == weight).all(), name


# Sanity checks


def test_a_sanity_check_runs_one_batch_of_each_an_epoch() -> None:
    spec = tiny_spec(epochs=3, sanity_check=True, log_every_steps=1)
    control = Ticking()
    model = tiny_model(spec)
    run = run_fit(spec, model=model, control=control)
    assert (run.result.epoch, run.result.step) == (3, 3)
    assert control.now == 3 * 2
    assert NUM_VAL > 4
    assert all(4 * top1 % 1 == 0 for top1 in run.sink.values("val_top1"))
    assert run.weights["1.num_batches_tracked"] == 3
