from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skipline.cli.plot import plot_metrics
from skipline.client import SkiplineError
from skipline.schemas import Metrics
from tests.skipline.replay import point


@pytest.fixture
def metrics() -> Metrics:
    steps = range(1, 41)
    series = {
        "train_loss": [point(step, 2 / step) for step in steps],
        "train_top1": [point(step, 1 - 1 / step) for step in steps],
        "val_loss": [point(20, 0.3), point(40, 0.2)],
        "val_top1": [point(20, 0.8), point(40, 0.9)],
        "val_top5": [point(40, 0.99)],
        "lr": [point(step, 0.1) for step in steps],
    }
    return Metrics.model_validate(
        {"job_id": "job-1", "status": "running", "series": series, "next": "40"}
    )


def test_the_picture_shows_the_curves_in_their_colours(metrics: Metrics, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_metrics(metrics, path, title="resnet18 on digits")
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape == (540, 1650, 3)
    for colour in ((0x8D, 0xA0, 0xB3), (0xD1, 0x49, 0x5B), (0xE9, 0xA2, 0x3B)):
        assert (pixels == colour).all(axis=-1).sum() > 20


def test_a_job_that_has_only_begun_can_be_drawn(metrics: Metrics, tmp_path: Path) -> None:
    begun = metrics.model_copy(update={"series": {"lr": metrics.series["lr"][:1]}})
    plot_metrics(begun, tmp_path / "begun.svg", title="begun")
    assert b"<svg" in (tmp_path / "begun.svg").read_bytes()


def test_no_metrics_are_no_picture(metrics: Metrics, tmp_path: Path) -> None:
    nothing = metrics.model_copy(update={"series": {}})
    with pytest.raises(SkiplineError, match="no metrics to draw yet"):
        plot_metrics(nothing, tmp_path / "x.png", title="x")


@pytest.mark.parametrize("name", ["missing/x.png", "x.nonsense"])
def test_a_file_that_cannot_be_written_is_named(
    metrics: Metrics, tmp_path: Path, name: str
) -> None:
    with pytest.raises(SkiplineError, match="cannot be written"):
        plot_metrics(metrics, tmp_path / name, title="x")


def test_without_matplotlib_the_error_says_how_to_install_it(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SkiplineError, match=r"pip install 'skipline\[plot\]'"):
        plot_metrics(metrics, tmp_path / "x.png", title="x")
