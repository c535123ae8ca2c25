from __future__ import annotations

from io import StringIO

from rich.console import Console

from skipline.cli.watch import Curves, LiveView, Update
from skipline.schemas import Job, MetricPoint
from tests.skipline.replay import job_document, point


def metric(step: int, value: float, epoch: int) -> MetricPoint:
    return MetricPoint.model_validate(point(step, value, epoch))


def test_an_epoch_is_validated_once_both_its_values_are_there() -> None:
    curves = Curves()
    assert curves.add("val_top1", metric(10, 0.5, 1)) is None
    assert curves.add("lr", metric(10, 0.1, 1)) is None
    assert curves.add("val_loss", metric(10, 1.0, 1)) == 1
    assert curves.add("val_loss", metric(20, 0.9, 2)) is None


def test_the_best_epoch_is_the_first_with_the_highest_top1() -> None:
    curves = Curves()
    assert curves.best is None
    for epoch, value in ((1, 0.5), (2, 0.75), (3, 0.75)):
        curves.add("val_top1", metric(epoch, value, epoch))
    assert curves.best == (0.75, 2)


def test_what_a_new_attempt_measures_again_replaces_what_is_void() -> None:
    """The first attempt came to epoch 3; the second goes on from the end of epoch 1."""
    curves = Curves()
    for epoch, value in ((1, 0.5), (2, 0.9), (3, 0.8)):
        curves.add("lr", metric(epoch * 10 - 5, 0.1, epoch))
        curves.add("val_top1", metric(epoch * 10, value, epoch))
        curves.add("val_loss", metric(epoch * 10, 1.0, epoch))
    assert curves.best == (0.9, 2)
    curves.add("lr", metric(15, 0.1, 2))
    assert curves.best == (0.5, 1)
    assert curves.add("val_top1", metric(20, 0.7, 2)) is None
    assert curves.add("val_loss", metric(20, 1.0, 2)) == 2
    assert curves.best == (0.7, 2)
    assert sorted(curves.epochs) == [1, 2]


def test_a_training_stopped_before_its_first_step_is_validated_once() -> None:
    curves = Curves()
    assert curves.add("val_loss", metric(0, 2.3, 0)) is None
    assert curves.add("val_top1", metric(0, 0.1, 0)) == 0
    assert curves.best == (0.1, 0)


def test_the_live_view_of_a_waiting_job_says_when_it_starts() -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    job = job_document(queue_position=2, estimated_start_at="2026-11-01T12:00:00.000Z")
    with LiveView(console) as view:
        view.show(Update(Job.model_validate(job)))
    assert "queued, no. 2 in the queue" in screen.getvalue()
    assert "starts any moment" in screen.getvalue()


def test_the_live_view_shows_a_row_an_epoch_above_the_bar() -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    progress = {
        "step": 20, "num_steps": 40, "epoch": 2, "num_epochs": 2, "eta_seconds": 75,
        "images_per_second": 812.0,
    }  # fmt: skip
    job = Job.model_validate(job_document(status="running", attempt=2, progress=progress))
    points = [
        ("train_loss", metric(20, 0.5, 1)),
        ("train_top1", metric(20, 0.9, 1)),
        ("val_loss", metric(20, 0.7, 1)),
        ("val_top1", metric(20, 0.8, 1)),
    ]
    with LiveView(console) as view:
        view.show(Update(job, points))
        view.show(Update(job, away="connection refused"))
    shown = screen.getvalue()
    assert "      1/2      0.5000    90.0 %     0.7000    80.0 %" in shown
    assert "resnet18 attempt 2 epoch 2/2" in shown
    assert "50%" in shown
    assert "ETA 1 min 15 s" in shown
    assert "step 20/40   loss 0.5000   top-1 90.0 %   812 images/s" in shown
    assert "the server is away (connection refused); trying again" in shown
