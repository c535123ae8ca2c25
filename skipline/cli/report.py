"""How a report is shown on a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from skipline.cli.output import format_percent, make_table
from skipline.schemas import Report

MAX_CLASSES_SHOWN = 20
MAX_CONFUSIONS_SHOWN = 5


def render_report(report: Report) -> RenderableType:
    """The report as a headline, a table of classes (the worst first when there are many), and
    what was mistaken for what."""
    headline = Text.assemble(
        ("top-1 ", "dim"),
        (format_percent(report.top1), "bold green"),
        (f"   top-{min(5, len(report.per_class))} ", "dim"),
        format_percent(report.top5),
        ("   mean class accuracy ", "dim"),
        format_percent(report.mean_class_accuracy),
        ("   loss ", "dim"),
        f"{report.loss:.4f}",
    )
    subject = f"{report.num_samples:,} images of {report.dataset}, split {report.split}"
    classes = list(report.per_class)
    note = ""
    if len(classes) > MAX_CLASSES_SHOWN:
        classes = sorted(classes, key=lambda row: row.accuracy)[:MAX_CLASSES_SHOWN]
        note = f"The {MAX_CLASSES_SHOWN} least accurate of {len(report.per_class)} classes."
    table = make_table("class", ">images", ">accuracy", ">precision", ">f1")
    for row in classes:
        shares = [format_percent(share) for share in (row.accuracy, row.precision, row.f1)]
        table.add_row(row.label, f"{row.num_samples:,}", *shares)
    parts: list[RenderableType] = [headline, Text(subject, style="dim"), "", table]
    if note:
        parts.append(Text(note, style="dim"))
    if mistakes := _commonest_confusions(report):
        parts += ["", Text("most often mistaken", style="dim"), *mistakes]
    return Group(*parts)


def _commonest_confusions(report: Report) -> list[str]:
    labels = [row.label for row in report.per_class]
    pairs = [
        (count, labels[true], labels[called])
        for true, row in enumerate(report.confusion)
        for called, count in enumerate(row)
        if true != called and count
    ]
    pairs.sort(key=lambda pair: -pair[0])
    width = len(str(pairs[0][0])) if pairs else 0
    return [
        f"{count:>{width}} x {true} called {called}"
        for count, true, called in pairs[:MAX_CONFUSIONS_SHOWN]
    ]
