"""How the command line writes: tables, numbers, times, JSON, errors. Knows no HTTP."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from skipline.client import ServerUnreachable, SkiplineError
from skipline.schemas import Job, JobKind, JobStatus

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

STATUS_STYLES = {
    JobStatus.queued: "cyan",
    JobStatus.running: "bold blue",
    JobStatus.succeeded: "green",
    JobStatus.failed: "bold red",
    JobStatus.cancelled: "yellow",
}
STOP_REASONS = {
    "user": "ended early, as asked",
    "early_stopping": "ended early, since it did not improve any more",
    "time_budget": "ended early, with its time used up",
}
UNITS = (
    ("s", 1, 60),
    ("min", 60, 3600),
    ("h", 3600, 86_400),
    ("day", 86_400, math.inf),
)
"""Each with its length in seconds, and the span from which on it is not used."""
WIDTH_OF_PIPES = 200
"""Columns of a table that is not shown on a terminal: wide enough to cut nothing."""


def _console(stream: IO[str]) -> Console:
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH_OF_PIPES
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def stdout() -> Console:
    """A console on what `sys.stdout` is now; text is printed as it is, brackets included."""
    return _console(sys.stdout)


def stderr() -> Console:
    return _console(sys.stderr)


def make_table(*columns: str) -> Table:
    """A quiet table. A name that starts with `>` is a column of numbers, aligned to the right, one
    with `~` a column of text that may be broken where the terminal is narrow."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        justify: JustifyMethod = "right" if column.startswith(">") else "left"
        table.add_column(
            column.lstrip(">~"),
            justify=justify,
            no_wrap=not column.startswith("~"),
            overflow="fold",
        )
    return table


def make_grid() -> Table:
    """Two columns: what, and its value."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def print_json(document: BaseModel | dict[str, Any]) -> None:
    """One JSON document, indented."""
    data = document.model_dump(mode="json") if isinstance(document, BaseModel) else document
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_json_line(event: str, document: BaseModel, number: int | None = None) -> None:
    """One event a line, with the same parts as on the wire."""
    line = {"event": event, "id": number, "data": document.model_dump(mode="json")}
    typer.echo(json.dumps(line, ensure_ascii=False))


def print_sentence(console: Console, text: str | Text, style: str = "") -> None:
    """Prints prose: broken between words on a terminal, in one line elsewhere."""
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def print_error(error: SkiplineError, subject: str = "") -> None:
    """`subject` tells what it is about, where that could be several things."""
    console = stderr()
    print_sentence(console, Text.assemble(("error: ", "bold red"), subject, error.detail))
    grid = make_grid()
    for item in error.errors:
        grid.add_row(f"  {item.loc}", item.message)
    if error.errors:
        console.print(grid)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `SkiplineError` where `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise SkiplineError(f"{path} cannot be written: {error}", code="not_written") from None


def exit_code(error: SkiplineError) -> int:
    """3 without a server, 2 for input that is wrong in itself, 1 for all else."""
    if isinstance(error, ServerUnreachable):
        return 3
    return 2 if error.code == "invalid_url" or error.status in (400, 413, 415, 422) else 1


def exit_unless_succeeded(job: Job) -> None:
    if job.status is not JobStatus.succeeded:
        raise typer.Exit(1)


def format_status(status: JobStatus) -> Text:
    return Text(status.value, style=STATUS_STYLES.get(status, "magenta"))


def format_place(job: Job) -> str:
    """What a queued job waits for: `no. 2 in the queue`, `waits for job 0a1b`. Empty for any
    other job."""
    if job.status is not JobStatus.queued:
        return ""
    if job.queue_position is not None:
        return f"no. {job.queue_position} in the queue"
    predecessor = job.spec.get("after")
    return f"waits for job {predecessor}" if predecessor else ""


def format_start(job: Job) -> str:
    """`starts in 4 min`, for a queued job whose turn can be told; else empty."""
    start = job.estimated_start_at
    return "" if start is None else f"starts {format_wait(start)}"


def format_kind(kind: JobKind) -> str:
    return kind.value.replace("_", " ")


def format_percent(fraction: float) -> str:
    return f"{fraction:.1%}".replace("%", " %")


def format_duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def format_age(time: datetime, now: datetime | None = None) -> str:
    """`just now`, `3 min ago`, `5 h ago`, `2 days ago`, then the date."""
    seconds = ((now or datetime.now(UTC)) - time).total_seconds()
    if seconds < 10:
        return "just now"
    return f"{_in_one_unit(seconds)} ago" if seconds < 30 * 86_400 else f"{time:%Y-%m-%d}"


def format_wait(time: datetime, now: datetime | None = None) -> str:
    """`any moment`, also for what should have been; `in 40 s`, `in 4 min`, `in 3 days`."""
    seconds = (time - (now or datetime.now(UTC))).total_seconds()
    if seconds < 10:
        return "any moment"
    half = next(length / 2 for _, length, limit in UNITS if seconds < limit)
    return f"in {_in_one_unit(seconds + half)}"


def _in_one_unit(seconds: float) -> str:
    """Rounded down."""
    unit, length = next((unit, length) for unit, length, limit in UNITS if seconds < limit)
    count = int(seconds // length)
    return f"{count} {unit}{'s' * (unit == 'day' and count > 1)}"


def format_bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_metric(name: str, value: float) -> str:
    """A value with the unit that its name implies."""
    if "top" in name or "accuracy" in name:
        return format_percent(value)
    if name.endswith("_seconds") or name.startswith("seconds_per_"):
        return format_duration(value)
    if name.endswith("_bytes"):
        return format_bytes(int(value))
    if name == "images_per_second":
        return f"{value:,.0f}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 else f"{value:.3g}"


def format_result(key: str, value: Any) -> str:
    """A value of a job's result with the unit that its key implies."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return json.dumps(value)
    is_bare = isinstance(value, int) and not key.endswith("_bytes")
    return f"{value:,}" if is_bare else format_metric(key, value)


def sparkline(values: Sequence[float], width: int = 20) -> str:
    """A curve in one line of text: means of `width` equal parts, from lowest to highest."""
    marks = "▁▂▃▄▅▆▇█"
    width = min(width, len(values))
    bounds = [round(place * len(values) / width) for place in range(width + 1)] if width else []
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(bounds)]
    low, span = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(marks[round((mean - low) / span * 7) if span else 3] for mean in means)
