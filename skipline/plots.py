"""Pictures of a job and of a dataset: curves, what was mistaken for what, classes, images.

Every function returns a file's bytes; this module knows neither files nor HTTP. It needs
matplotlib, which the base install leaves out: each function raises `ImportError` without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from skipline.schemas import Dataset, Job, JudgedImage, MetricPoint, Metrics, Report

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CurveName = Literal["loss", "accuracy", "lr"]
CURVES: Mapping[CurveName, tuple[str, ...]] = {
    "loss": ("train_loss", "val_loss"),
    "accuracy": ("train_top1", "val_top5", "val_top1"),
    "lr": ("lr",),
}
"""The pictures that `draw_plot` makes, each with the series that it shows."""

TRAIN, VAL, VAL_TOP5 = "#8da0b3", "#d1495b", "#e9a23b"
INK, FAINT, QUIET = "#2b2d42", "#e6e8ec", "#6b7080"
RIGHT, WRONG = ("#ffffff", "#c3d0dc", "#4f6d8c", "#22344a"), ("#ffffff", "#f6c9ce", VAL, "#8f2236")
"""From no image of a class to all, on the diagonal; beside it, to half of them and more."""
SPLIT_COLOURS = {"train": TRAIN, "val": VAL, "test": VAL_TOP5}
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
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.hashsalt": "skipline",
}
DPI = 150
TITLE_SIZE = 13

MAX_CLASSES_WITH_NUMBERS = 20
"""Up to so many classes, the cells of a confusion matrix hold their numbers."""
MAX_CLASS_LABELS = 40
MAX_LABEL_LENGTH = 20
MAX_SAMPLES, SAMPLES_PER_ROW = 32, 8
SAMPLE_PIXELS = 160
"""The side of a sample in the picture, about: small images are scaled by a whole number."""

_style_lock = threading.Lock()
"""The style is the process's, so that one picture is drawn at a time."""


class NothingToDraw(ValueError):
    """The job has none of the points that the picture shows."""


def title_of(job: Job) -> str:
    """What a picture of the job says on top: its name, its network and its dataset."""
    model = job.spec.get("model")  # of an evaluation, an id
    what = model["arch"] if isinstance(model, dict) else job.kind.value
    subject = f"{what} on {job.spec.get('dataset')}"
    return f"{job.name}: {subject}" if job.name else subject


def draw_curves(metrics: Metrics, title: str, format: str = "png") -> bytes:
    """Loss, accuracy and lr over the steps, side by side. `format` is one of matplotlib's.

    Raises:
        NothingToDraw: no series has a point.
        ValueError: matplotlib does not know the format.
    """
    if not any(metrics.series.values()):
        raise NothingToDraw("The job has no metrics to draw yet")

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 3, width_ratios=(1, 1, 0.72))
        for axes, name in zip(panels, CURVES, strict=True):
            _DRAW[name](axes, metrics)

    return _draw(11, 3.6, title, fill, format)


def draw_plot(name: CurveName, metrics: Metrics, title: str) -> bytes:
    """One of `CURVES` over the steps, as a PNG.

    Raises:
        NothingToDraw: none of its series has a point.
    """
    if not any(metrics.series.get(series) for series in CURVES[name]):
        raise NothingToDraw(f"The job has no {name} to draw yet")
    return _draw(6.4, 4, title, lambda figure: _DRAW[name](figure.subplots(), metrics))


def _draw(
    width: float,
    height: float,
    title: str,
    fill: Callable[[Figure], None],
    format: str = "png",
) -> bytes:
    """A picture of `width` by `height` inches that `fill` has drawn into."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with _style_lock, rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
        fill(figure)
        figure.suptitle(
            _shortened(title, _title_length(width)),
            x=0.12 / width,
            ha="left",
            fontsize=TITLE_SIZE,
            fontweight="bold",
            parse_math=False,
        )
        return _file(figure, format)


def _file(figure: Figure, format: str) -> bytes:
    file = BytesIO()
    figure.savefig(file, format=format)
    return file.getvalue()


def _title_length(width: float) -> int:
    """How many characters of a title fit `width` inches: the wide ones do, the usual ones well."""
    return int(width * 72 / (0.72 * TITLE_SIZE))


def _in_font(text: str) -> str:
    """The text with a box for each character that the font does not have."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(mark if font.get_char_index(ord(mark)) else "□" for mark in text)


def _shortened(text: str, max_length: int) -> str:
    text = _in_font(text)
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


# Curves.


def _draw_loss(axes: Axes, metrics: Metrics) -> None:
    axes.set_title("Loss")
    _draw_line(axes, metrics.series.get("train_loss"), "train", TRAIN)
    _draw_line(axes, metrics.series.get("val_loss"), "validation", VAL, marker=True)
    axes.set_ylim(bottom=0)
    _finish(axes)


def _draw_accuracy(axes: Axes, metrics: Metrics) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title("Accuracy")
    _draw_line(axes, metrics.series.get("train_top1"), "train top-1", TRAIN)
    _draw_line(axes, metrics.series.get("val_top5"), "validation top-5", VAL_TOP5, marker=True)
    top1 = metrics.series.get("val_top1")
    _draw_line(axes, top1, "validation top-1", VAL, marker=True)
    axes.set_ylim(top=1.02)
    if top1:
        best = max(top1, key=lambda point: point.value)
        is_low = best.value < sum(axes.get_ylim()) / 2
        axes.annotate(
            f"{best.value:.1%}",
            (best.step, best.value),
            xytext=(0, 8 if is_low else -14),
            textcoords="offset points",
            ha="right",
            color=VAL,
            fontweight="bold",
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(axes)


def _draw_lr(axes: Axes, metrics: Metrics) -> None:
    axes.set_title("Learning rate")
    _draw_line(axes, metrics.series.get("lr"), "lr", INK)
    axes.set_ylim(bottom=0)
    _finish(axes, legend=False)


_DRAW: Mapping[CurveName, Callable[[Axes, Metrics], None]] = {
    "loss": _draw_loss,
    "accuracy": _draw_accuracy,
    "lr": _draw_lr,
}


def _draw_line(
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


# The confusion matrix.


def draw_confusion(report: Report, title: str) -> bytes:
    """Which class was called what, as a PNG: a row a true class, its images shared out over the
    columns. What is right is blue, what is wrong red; weak mistakes are drawn stronger than they
    are, or nobody would see them."""
    labels = [row.label for row in report.per_class]
    side = min(9.0, max(4.2, 1.6 + 0.42 * len(labels)))

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        _draw_shares(axes, report)
        if len(labels) <= MAX_CLASSES_WITH_NUMBERS:
            _write_numbers(axes, report)
        _label_classes(axes, labels)

    return _draw(side + 0.6, side + 0.8, title, fill)


def _draw_shares(axes: Axes, report: Report) -> None:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    counts = np.array(report.confusion, dtype=np.float32)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    is_right = np.eye(len(counts), dtype=bool)
    for colours, highest, hidden in ((RIGHT, 1.0, ~is_right), (WRONG, 0.5, is_right)):
        axes.imshow(
            np.ma.array(shares, mask=hidden),
            cmap=LinearSegmentedColormap.from_list("shares", colours),
            norm=PowerNorm(0.5, vmin=0, vmax=highest),
            interpolation="nearest",
        )
    axes.grid(visible=False)
    if len(counts) <= MAX_CLASS_LABELS:  # Thin lines between the cells.
        between = np.arange(len(counts) + 1) - 0.5
        axes.set_xticks(between, minor=True)
        axes.set_yticks(between, minor=True)
        axes.grid(which="minor", color=FAINT, linewidth=0.8)
        axes.tick_params(which="minor", length=0)


def _write_numbers(axes: Axes, report: Report) -> None:
    longest = max(len(f"{count:,}") for row in report.confusion for count in row)
    for true, row in enumerate(report.confusion):
        for called, count in enumerate(row):
            if count:
                is_dark = count > 0.25 * sum(row)
                axes.text(
                    called,
                    true,
                    f"{count:,}",
                    ha="center",
                    va="center",
                    fontsize=9 if longest <= 4 else 7,
                    color="white" if is_dark else INK,
                    fontweight="bold" if true == called else "normal",
                )


def _label_classes(axes: Axes, labels: Sequence[str]) -> None:
    every = -(-len(labels) // MAX_CLASS_LABELS)
    places = range(0, len(labels), every)
    shown = [_shortened(labels[place], MAX_LABEL_LENGTH) for place in places]
    is_upright = len(shown) > MAX_CLASSES_WITH_NUMBERS or max(map(len, shown)) > 4
    size = 9 if len(shown) <= MAX_CLASSES_WITH_NUMBERS else 7
    axes.set_xticks(
        places, shown, fontsize=size, rotation=90 if is_upright else 0, parse_math=False
    )
    axes.set_yticks(places, shown, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines[:].set_visible(False)


# Classes of a dataset.


def draw_classes(dataset: Dataset) -> bytes:
    """How many images each class has in each split, as a PNG. Up to 40 classes by name; of more,
    their sizes in order."""
    title = f"{dataset.name}: images of {len(dataset.classes)} classes"
    counts = {split: info.per_class for split, info in dataset.splits.items()}
    if len(dataset.classes) <= MAX_CLASS_LABELS:
        height = 1.6 + 0.26 * len(dataset.classes)
        return _draw(7.0, height, title, lambda figure: _draw_bars(figure, dataset, counts))
    return _draw(7.0, 4.2, title, lambda figure: _draw_sizes(figure, counts))


def _draw_bars(figure: Figure, dataset: Dataset, counts: Mapping[str, Sequence[int]]) -> None:
    axes = figure.subplots()
    places = range(len(dataset.classes))
    lefts = [0] * len(dataset.classes)
    for split, own in counts.items():
        axes.barh(places, own, left=lefts, color=SPLIT_COLOURS[split], label=split, height=0.75)
        lefts = [left + count for left, count in zip(lefts, own, strict=True)]
    names = [_shortened(label, MAX_LABEL_LENGTH) for label in dataset.classes]
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.set_ylim(len(dataset.classes) - 0.4, -0.6)
    axes.set_xlabel("images")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.legend(fontsize=9, ncols=len(counts), loc="lower right", bbox_to_anchor=(1, 1))


def _draw_sizes(figure: Figure, counts: Mapping[str, Sequence[int]]) -> None:
    axes = figure.subplots()
    for split, own in counts.items():
        axes.step(
            range(1, len(own) + 1),
            sorted(own, reverse=True),
            color=SPLIT_COLOURS[split],
            label=split,
            where="mid",
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("classes, the largest first")
    axes.set_ylabel("images")
    axes.legend(fontsize=9)


# Calibration.


def draw_calibration(report: Report, title: str) -> bytes:
    """A reliability diagram as a PNG: how often the network was right over how sure it was, and
    below it how many images that concerns. Raises `NothingToDraw` for an old report."""
    calibration = report.calibration
    if calibration is None:
        raise NothingToDraw("The report is of a version that did not measure calibration")
    bins = calibration.bins
    lefts = [part.lower for part in bins]
    widths = [part.upper - part.lower for part in bins]
    accuracies = [part.accuracy for part in bins]
    confidences = [part.confidence for part in bins]

    def fill(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.bar(lefts, accuracies, widths, align="edge", color=RIGHT[2], edgecolor="white")
        upper.vlines(confidences, accuracies, confidences, color=VAL, linewidth=2)
        upper.scatter(confidences, confidences, color=VAL, s=14, label="how sure it was")
        upper.plot((0, 1), (0, 1), color=QUIET, linewidth=1, linestyle="--")
        upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="right answers")
        upper.legend(loc="upper left", fontsize=9)
        gap, after = f"{calibration.ece:.4f}", f"{calibration.calibrated_ece:.4f}"
        upper.set_title(
            f"calibration error {gap}; at temperature {calibration.temperature:.2f}: {after}",
            fontsize=9,
            fontweight="normal",
            color=QUIET,
        )
        lower.bar(lefts, [part.num_images for part in bins], widths, align="edge", color=RIGHT[1])
        lower.set(xlabel="probability of the answer", ylabel="images")

    return _draw(6.4, 6.0, title, fill)


# Samples.


def draw_hardest(images: npt.NDArray[np.uint8], judged: Sequence[JudgedImage], title: str) -> bytes:
    """A grid of the images with the highest loss, as a PNG: what each one is, and what it was
    called.

    Args:
        images: uint8 [N, S, S, 3], N at least 1.
        judged: one for each image.
    """
    labels = [
        image.label if image.label == image.predicted else f"{image.label}, not {image.predicted}"
        for image in judged
    ]
    return draw_samples(images, labels, title)


def draw_samples(images: npt.NDArray[np.uint8], labels: Sequence[str], title: str) -> bytes:
    """A grid of the first 32 images with their labels, as a PNG.

    Args:
        images: uint8 [N, S, S, 3], N at least 1.
        labels: one for each image.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels, images = labels[: len(images)][:MAX_SAMPLES], images[:MAX_SAMPLES]
    num_columns = min(SAMPLES_PER_ROW, len(images))
    num_rows = -(-len(images) // num_columns)
    side = _sample_side(images.shape[1])
    gap, top, below, margin = 14, 62, 34, 24
    width = max(2 * margin + num_columns * (side + gap) - gap, 480)
    height = top + num_rows * (side + below) + margin // 2
    with _style_lock, rc_context(STYLE):
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for place, (image, label) in enumerate(zip(images, labels, strict=True)):
            row, column = divmod(place, num_columns)
            left, upper = margin + column * (side + gap), top + row * (side + below)
            _draw_sample(axes, image, label, left, upper, side)
        axes.text(
            margin,
            top / 2,
            _shortened(title, _title_length(width / DPI)),
            va="center",
            fontsize=TITLE_SIZE,
            fontweight="bold",
            parse_math=False,
        )
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")  # one unit a pixel
        return _file(figure, "png")


def _sample_side(image_size: int) -> int:
    """The side of a drawn image, in pixels."""
    return image_size * max(1, round(SAMPLE_PIXELS / image_size)) if image_size < 320 else 160


def _draw_sample(
    axes: Axes, image: npt.NDArray[np.uint8], label: str, left: int, upper: int, side: int
) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(
        image,
        extent=(left, left + side, upper + side, upper),
        interpolation="nearest" if side >= len(image) else "hanning",
    )
    axes.add_patch(Rectangle((left, upper), side, side, fill=False, edgecolor=FAINT, linewidth=0.8))
    axes.text(
        left + side / 2,
        upper + side + 5,
        _shortened(label, side // 10),
        ha="center",
        va="top",
        fontsize=8,
        color=QUIET,
        parse_math=False,
    )
