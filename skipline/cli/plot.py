"""A job's curves as a picture. Needs matplotlib, which the base install leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipline.client import SkiplineError
from skipline.schemas import MetricPoint, Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, VAL, VAL_TOP5 = "#8da0b3", "#d1495b", "#e9a23b"
INK, FAINT = "#2b2d42", "#e6e8ec"
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b8bcc6",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": "#6b7080",
    "ytick.color": "#6b7080",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.hashsalt": "skipline",
}


def plot_metrics(metrics: Metrics, path: Path, title: str) -> None:
    """Draws loss, accuracy and lr over the steps to `path`, in the format that its name ends in.

    Raises:
        SkiplineError: matplotlib is missing, there is nothing to draw, or the file cannot be
            written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise SkiplineError(
            "Drawing needs matplotlib: pip install 'skipline[plot]'", code="missing_matplotlib"
        ) from None
    if not any(metrics.series.values()):
        raise SkiplineError("The job has no metrics to draw yet", code="no_metrics")
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(11, 3.6), dpi=150, layout=layout)
        loss, accuracy, lr = figure.subplots(1, 3, width_ratios=(1, 1, 0.72))
        _draw_loss(loss, metrics)
        _draw_accuracy(accuracy, metrics)
        _draw_lr(lr, metrics)
        figure.suptitle(title, x=0.011, ha="left", fontsize=13, fontweight="bold")
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise SkiplineError(f"{path} cannot be written: {error}", code="not_written") from None


def _draw_loss(axes: Axes, metrics: Metrics) -> None:
    axes.set_title("Loss")
    _draw(axes, metrics.series.get("train_loss"), "train", TRAIN)
    _draw(axes, metrics.series.get("val_loss"), "validation", VAL, marker=True)
    axes.set_ylim(bottom=0)
    _finish(axes)


def _draw_accuracy(axes: Axes, metrics: Metrics) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title("Accuracy")
    _draw(axes, metrics.series.get("train_top1"), "train top-1", TRAIN)
    _draw(axes, metrics.series.get("val_top5"), "validation top-5", VAL_TOP5, marker=True)
    top1 = metrics.series.get("val_top1")
    _draw(axes, top1, "validation top-1", VAL, marker=True)
    if top1:
        best = max(top1, key=lambda point: point.value)
        axes.annotate(
            f"{best.value:.1%}",
            (best.step, best.value),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            color=VAL,
            fontweight="bold",
        )
    axes.set_ylim(top=1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(axes)


def _draw_lr(axes: Axes, metrics: Metrics) -> None:
    axes.set_title("Learning rate")
    _draw(axes, metrics.series.get("lr"), "lr", INK)
    axes.set_ylim(bottom=0)
    _finish(axes, legend=False)


def _draw(
    axes: Axes, points: list[MetricPoint] | None, label: str, colour: str, marker: bool = False
) -> None:
    if not points:
        return
    axes.plot(
        [point.step for point in points],
        [point.value for point in points],
        color=colour,
        label=label,
        marker="o" if marker or len(points) == 1 else "",
        markersize=4,
        markevery=max(1, len(points) // 20),
    )


def _finish(axes: Axes, legend: bool = True) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.tick_params(length=0)
    if legend and axes.get_lines():
        axes.legend(fontsize=9)
