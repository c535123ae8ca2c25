from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from api import drawing
from api.drawing import Drawing
from shared.errors import TooBusy
from shared.repository import NewPoint
from skipline import plots, schemas

REPORT = schemas.Report(
    dataset="digits",
    dataset_id="d",
    split="test",
    selected_on="test",
    checkpoint_id="c",
    num_samples=4,
    loss=0.5,
    top1=0.75,
    top5=1.0,
    mean_class_accuracy=0.75,
    per_class=[
        schemas.ClassReport(
            label=label, num_samples=2, accuracy=0.5, precision=0.5, recall=0.5, f1=0.5
        )
        for label in ("cat", "dog")
    ],
    confusion=[[2, 0], [1, 1]],
)


def size_of(response: Any) -> tuple[int, int]:
    """The size of the picture that `response` must be."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-content-type-options"] == "nosniff"
    return Image.open(BytesIO(response.content)).size


def test_curves_are_drawn_from_the_points_so_far(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    job = api.submit()
    attempt = worker.claim()
    for name in plots.CURVES:
        refused = api.get(f"/jobs/{job['id']}/plots/{name}.png")
        assert_problem(refused, 404, "picture_not_ready")
    points = [
        NewPoint(name, step, 1, 1 / step)
        for name in ("train_loss", "val_loss", "train_top1", "lr")
        for step in (1, 2, 3)
    ]
    attempt.write(*points)
    for name in plots.CURVES:
        assert size_of(api.get(f"/jobs/{job['id']}/plots/{name}.png")) == (960, 600)


def test_a_long_series_is_read_in_parts_and_drawn_with_few_points(
    settings: Any, start_server: Any, api: Any, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = api.submit()
    values = [1.0] * 1200
    values[700] = 9.0
    worker.claim().write(*(NewPoint("lr", n, 1, value) for n, value in enumerate(values)))
    drawn: list[schemas.Metrics] = []

    def draw(name: str, metrics: schemas.Metrics, title: str) -> bytes:
        drawn.append(metrics)
        return title.encode()

    monkeypatch.setattr(plots, "draw_plot", draw)
    small = start_server(settings.model_copy(update={"max_metric_points": 500}))
    assert small.get(f"/jobs/{job['id']}/plots/lr.png").content == b"resnet18 on digits"
    [points] = drawn[0].series.values()
    assert len(points) <= 1000
    assert (points[0].step, points[-1].step) == (0, 1199)
    assert max(point.value for point in points) == 9.0


def test_the_confusion_is_drawn_once_there_is_a_report(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    job = api.submit()
    attempt = worker.claim()
    url = f"/jobs/{job['id']}/plots/confusion.png"
    assert_problem(api.get(url), 404, "report_not_ready")
    attempt.report(REPORT)
    assert size_of(api.get(url)) == (720, 750)


def test_samples_are_what_the_worker_stored(
    api: Any, worker: Any, png: Callable[..., bytes], assert_problem: Callable[..., Any]
) -> None:
    job = api.submit()
    attempt = worker.claim()
    url = f"/jobs/{job['id']}/plots/samples.png"
    assert_problem(api.get(url), 404, "picture_not_ready")
    attempt.picture("samples", png(12, 9))
    response = api.get(url)
    assert size_of(response) == (12, 9)
    assert response.content == png(12, 9)


def test_only_known_plots_of_known_jobs_are_found(
    api: Any, assert_problem: Callable[..., Any]
) -> None:
    job = api.submit()
    for name in ("nothing", "%00", "..%2F..", "loss.svg"):
        assert_problem(api.get(f"/jobs/{job['id']}/plots/{name}.png"), 404, "not_found")
    assert_problem(api.get(f"/jobs/{job['id']}/plots/loss"), 404, "not_found")
    for name in ("loss", "confusion", "samples"):
        assert_problem(api.get(f"/jobs/nothing/plots/{name}.png"), 404, "job_not_found")


def test_pictures_are_drawn_one_at_a_time_and_few_may_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drawing, "MAX_WAITING", 2)
    may_go_on = threading.Event()
    threads: list[str] = []

    def draw() -> bytes:
        assert may_go_on.wait(10)
        threads.append(threading.current_thread().name)
        return b"png"

    async def ask() -> list[bytes]:
        one, other = (asyncio.create_task(artist.run(draw)) for _ in range(2))
        await asyncio.sleep(0)  # Both have begun to wait.
        with pytest.raises(TooBusy):
            await artist.run(draw)
        may_go_on.set()
        found = [await one, await other]
        return [*found, await artist.run(draw)]

    artist = Drawing()
    assert asyncio.run(ask()) == [b"png"] * 3
    assert len(set(threads)) == 1
    artist.close()
