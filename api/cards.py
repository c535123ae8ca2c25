"""A model's card, after Mitchell et al., "Model Cards for Model Reporting" (2019): what it is, what
it learnt from, how good it is and where it fails, in Markdown and from the record alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from skipline import schemas
from skipline.specs import TrainSpec, dump_spec

NUM_WEAKEST = 10
NUM_PAIRS = 5
NUM_CLASSES = 50
"""Named of a dataset with more."""
MIN_SAMPLES = 30
"""Of a class: below that an accuracy says little, which the card points out."""

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~]|^[#+\-=])")


def write_card(
    model: schemas.Model,
    spec: TrainSpec,
    dataset: schemas.Dataset | None,
    report: schemas.Report | None,
) -> str:
    """Markdown. `dataset`: what it was trained on, if that is known; `report`: on this very
    checkpoint, if there is one."""
    parts = [
        f"# {_text(model.alias)}",
        _sentence(model),
        *([_text(model.notes)] if model.notes else []),
        "## Model",
        _table(("what", "value"), _model_rows(model, spec)),
        "## Data",
        *_data(model, dataset),
        "## Training",
        "Every value, the defaults written out:",
        _table(("setting", "value"), _settings(dump_spec(spec))),
        "## How good it is",
        *_quality(report),
        "## Limits",
        *_limits(report, dataset),
    ]
    return "\n\n".join(parts) + "\n"


def _sentence(model: schemas.Model) -> str:
    arch, dataset = _text(model.arch), _text(model.dataset)
    return f"An image classifier: {arch}, trained on {dataset}, as of epoch {model.epoch}."


def _model_rows(model: schemas.Model, spec: TrainSpec) -> Iterator[tuple[str, str]]:
    yield "checkpoint", _code(model.checkpoint_id)
    yield "job", _code(model.job_id)
    yield "tags", ", ".join(_text(tag) for tag in model.tags) or "none"
    yield "image size", f"{spec.image_size} px"
    yield "epoch, step", f"{model.epoch}, {model.step}"
    yield "size", f"{model.num_bytes / 1e6:.1f} MB"
    yield "served since", f"{model.moved_at:%Y-%m-%d %H:%M} UTC"


def _data(model: schemas.Model, dataset: schemas.Dataset | None) -> Iterator[str]:
    if dataset is None:
        yield f"{_text(model.dataset)}; its record is not stored here."
        return
    splits = ", ".join(f"{name} {split.num_images:,}" for name, split in dataset.splits.items())
    rows = [
        ("name", _text(dataset.name)),
        ("id", _code(dataset.id)),
        ("hash", _code(dataset.hash)),
        ("images", splits),
        ("classes", str(dataset.num_classes)),
    ]
    if dataset.dropped_at is not None:
        rows.append(("deleted", f"{dataset.dropped_at:%Y-%m-%d}"))
    yield _table(("what", "value"), rows)
    named = ", ".join(_text(label) for label in dataset.classes[:NUM_CLASSES])
    more = dataset.num_classes - NUM_CLASSES
    yield f"Classes: {named}{f', and {more} more' if more > 0 else ''}."


def _settings(document: dict[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            told = value if isinstance(value, str) else json.dumps(value)
            yield _code(f"{prefix}{key}"), _text(told)


def _quality(report: schemas.Report | None) -> Iterator[str]:
    if report is None:
        yield "Not known: no report is on this checkpoint. An evaluation of its id makes one."
        return
    chosen = f"; {report.selected_on} also chose the checkpoint" if report.selected_on else ""
    where = f"{_text(report.dataset)}/{report.split}"
    yield f"Measured on the {report.num_samples:,} images of {where}{chosen}."
    low, high = report.top1_interval or (None, None)
    between = "" if low is None or high is None else f" (95 %: {low:.4f} to {high:.4f})"
    rows = [
        ("top-1", f"{report.top1:.4f}{between}"),
        ("top-5", f"{report.top5:.4f}"),
        ("mean class accuracy", f"{report.mean_class_accuracy:.4f}"),
        ("loss", f"{report.loss:.4f}"),
    ]
    if report.calibration is not None:
        rows.append(("calibration error", f"{report.calibration.ece:.4f}"))
        rows.append(("temperature", f"{report.calibration.temperature:.3f}"))
    yield _table(("figure", "value"), rows)


def _limits(report: schemas.Report | None, dataset: schemas.Dataset | None) -> Iterator[str]:
    yield (
        "It names one of its classes for every image, whatever the image shows. On images of "
        "another kind than it learnt from, no figure above holds."
    )
    if report is not None:
        yield from _weaknesses(report)
    if dataset is not None and dataset.problems:
        found = [f"- {_text(problem.message)}" for problem in dataset.problems]
        yield "Found in the data when it was brought in:\n\n" + "\n".join(found)


def _weaknesses(report: schemas.Report) -> Iterator[str]:
    judged = [row for row in report.per_class if row.num_samples]
    weakest = sorted(judged, key=lambda row: row.accuracy)[:NUM_WEAKEST]
    rows = [
        (_text(r.label), f"{r.accuracy:.4f}", f"{r.precision:.4f}", str(r.num_samples))
        for r in weakest
    ]
    yield "The classes that it knows least:"
    yield _table(("class", "accuracy", "precision", "images"), rows)
    if pairs := report.confused[:NUM_PAIRS]:
        yield "Its most frequent mistakes:"
        yield _table(
            ("class", "called", "images", "share"),
            [
                (_text(p.label), _text(p.predicted), str(p.num_images), f"{p.share:.1%}")
                for p in pairs
            ],
        )
    if few := [row for row in judged if row.num_samples < MIN_SAMPLES]:
        told = f"{len(few)} of {len(judged)} classes were judged"
        yield f"{told} by fewer than {MIN_SAMPLES} images: their figures are rough."
    untold = len(report.per_class) - len(judged)
    if untold:
        yield f"Classes without any image to judge them by: {untold}."
    calibration = report.calibration
    if calibration is not None and calibration.reject_below is not None:
        bound = calibration.reject_below
        yield f"Predictions with a probability below {bound:.3f} are marked `unknown`."


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """As it is read, whatever Markdown would make of it; on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{text}`"
