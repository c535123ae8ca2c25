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
