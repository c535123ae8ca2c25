"""Watching a job: a live bar on a terminal, plain lines elsewhere, JSON lines on request.

Looks at the job and its new points in turn rather than at the stream alone, since a bar must move
between two points too; a server that is away for a while is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Protocol, Self

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from skipline.cli.output import (
    STOP_REASONS,
    exit_unless_succeeded,
    format_duration,
    format_kind,
    format_metric,
    format_percent,
    format_place,
    format_result,
    format_start,
    format_status,
    make_grid,
    print_json,
    print_json_line,
    print_sentence,
    stdout,
)
from skipline.cli.report import render_report
from skipline.client import Patience, ServerUnreachable, Skipline
from skipline.schemas import (
    EndEvent,
    Job,
    JobKind,
    JobStatus,
    MetricEvent,
    MetricPoint,
)

LOOK_SECONDS = 0.5
EXIT_DETACHED = 130
EPOCH_METRICS = ("train_loss", "train_top1", "val_loss", "val_top1")
OUTCOME_MARKS = {JobStatus.succeeded: ("✓ ", "green"), JobStatus.paused: ("· ", "magenta")}


@dataclass
class Update:
    """The job as it was last seen, the points that are new, and why the server is away, if so."""

    job: Job
    points: list[tuple[str, MetricPoint]] = field(default_factory=list)
    away: str | None = None


def look(client: Skipline, job: Job) -> Iterator[Update]:
    """The job and its new points again and again, until nothing will follow, or it is paused."""
    patience = Patience(client.patience)
    after: str | None = None
    while True:
        try:
            job = client.job(job.id)
            points: list[tuple[str, MetricPoint]] = []
            if job.kind is JobKind.train:
                metrics = client.metrics(job.id, after=after)
                after = metrics.next or after
                points = [(name, point) for name, row in metrics.series.items() for point in row]
        except ServerUnreachable as error:
            yield Update(job, away=error.reason)
            patience.pause(error)
            continue
        patience.reset()
        yield Update(job, sorted(points, key=lambda item: (item[1].step, item[0])))
        if _is_over(job):
            return
        time.sleep(LOOK_SECONDS)


def _is_over(job: Job) -> bool:
    """Also with a pause: how long that takes, nobody knows."""
    return job.status.is_terminal or job.status is JobStatus.paused


@dataclass
class Curves:
    """What the points said so far: the latest value of each series, and the epochs. Where a series
    goes back, a new attempt began from an earlier checkpoint: what came later is void."""

    latest: dict[str, float] = field(default_factory=dict)
    epochs: dict[int, dict[str, float]] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, point: MetricPoint) -> int | None:
        """Takes a point in; returns its epoch if that is now validated."""
        if point.step <= self._steps.get(name, -1):
            self._go_back(point)
        self._steps[name] = point.step
        self.latest[name] = point.value
        epoch = self.epochs.setdefault(point.epoch, {})
        new = name in ("val_loss", "val_top1")
        epoch[name] = point.value
        return point.epoch if new and {"val_loss", "val_top1"} <= epoch.keys() else None

    def _go_back(self, point: MetricPoint) -> None:
        self._steps = {name: min(step, point.step - 1) for name, step in self._steps.items()}
        self.epochs = {e: row for e, row in self.epochs.items() if e < point.epoch}

    @property
    def best(self) -> tuple[float, int] | None:
        """The highest validation top-1 and its epoch."""
        found = [
            (row["val_top1"], epoch) for epoch, row in self.epochs.items() if "val_top1" in row
        ]
        return max(found, key=lambda pair: pair[0], default=None)


class View(Protocol):
    """Shows updates of one job."""

    curves: Curves

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def show(self, update: Update) -> None: ...


class PlainView:
    """A line a flush of metrics, epoch, or tenth of the way: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.curves = Curves()
        self._console = console
        self._said: set[str] = set()
        self._attempt = 0
        self._tenth = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def show(self, update: Update) -> None:
        job = update.job
        if update.away:
            self._say_once(f"the server is away ({update.away}); trying again")
            return
        progress = job.progress
        if _is_over(job):
            pass  # The outcome says it.
        elif not (job.status is JobStatus.running and progress):
            self._say_once(_situation(job))
        elif job.attempt > self._attempt > 0:
            self._say(f"attempt {job.attempt} takes over")
        self._attempt = job.attempt
        for step, group in groupby(update.points, key=lambda item: item[1].step):
            self._show_step(job, step, dict(group))
        if job.kind is not JobKind.train and progress and progress.num_steps:
            tenth = progress.step * 10 // progress.num_steps
            if tenth > self._tenth:
                self._tenth = tenth
                self._say(f"{progress.step:,} of {progress.num_steps:,}")

    def _show_step(self, job: Job, step: int, points: dict[str, MetricPoint]) -> None:
        validated = [self.curves.add(name, point) for name, point in points.items()]
        if "train_loss" in points:
            self._say(_step_line(job, step, points["train_loss"].epoch, self.curves))
        for epoch in validated:
            if epoch is not None:
                self._say(_epoch_line(job, epoch, self.curves))

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said = {line}
            self._say(line)


class LiveView:
    """A bar with the latest numbers below a table that grows by a row an epoch."""

    def __init__(self, console: Console) -> None:
        self.curves = Curves()
        self._console = console
        self._bar = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[eta]}", style="dim"),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, eta="")
        self._numbers = Text()
        self._live = Live(
            Group(self._bar, self._numbers), console=console, transient=True, refresh_per_second=8
        )
        self._has_header = False

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, update: Update) -> None:
        job = update.job
        for name, point in update.points:
            validated = self.curves.add(name, point)
            if validated is not None:
                self._print_epoch(job, validated)
        progress = job.progress
        running = progress is not None and job.status is not JobStatus.queued
        numbers = _numbers(job, self.curves) if running else ""
        if update.away:
            numbers = f"the server is away ({update.away}); trying again"
        self._bar.update(
            self._task,
            description=_headline(job) if running else _situation(job),
            total=progress.num_steps or None if progress else None,
            completed=progress.step if progress else 0,
            eta=_eta(job) if running else format_start(job),
        )
        self._numbers = Text("  " + numbers, style="yellow" if update.away else "")
        self._live.update(Group(self._bar, self._numbers), refresh=True)

    def _print_epoch(self, job: Job, epoch: int) -> None:
        row = self.curves.epochs[epoch]
        if not self._has_header:
            self._has_header = True
            names = ("epoch", "train loss", "top-1", "val loss", "top-1", "took")
            self._print_row(names, style="dim")
        num_epochs = job.progress.num_epochs if job.progress else job.spec["epochs"]
        took = row.get("epoch_seconds")
        best = self.curves.best
        self._print_row(
            (
                f"{epoch}/{num_epochs}",
                *(format_metric(name, row[name]) if name in row else "-" for name in EPOCH_METRICS),
                "" if took is None else format_duration(took),
            ),
            style="green" if best and best[1] == epoch else "",
        )

    def _print_row(self, cells: tuple[str, ...], style: str) -> None:
        widths = (9, 12, 10, 11, 10, 13)
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        self._console.print(Text(line, style=style))


def watch(client: Skipline, job: Job) -> Job:
    """Shows a job until its end, or until it is paused, and returns it as it is then."""
    console = stdout()
    console.print(f"Job {job.id}", style="dim")
    view: View = LiveView(console) if console.is_terminal else PlainView(console)
    with view:
        for update in look(client, job):
            view.show(update)
            job = update.job
    print_outcome(console, job, view.curves)
    return job


def watch_to_exit(client: Skipline, job: Job, as_json: bool) -> None:
    """Watches a job and exits as it ended; Ctrl-C detaches and lets the job go on.

    Raises:
        typer.Exit: 1 when it did not succeed, a pause included; 130 when detached.
    """
    try:
        if as_json:
            job = _stream_json(client, job)
        else:
            job = watch(client, job)
            _print_what_now(client, job)
    except KeyboardInterrupt:
        if not as_json:
            _print_detached(job)
        raise typer.Exit(EXIT_DETACHED) from None
    exit_unless_succeeded(job)


def stay(client: Skipline, job: Job, as_json: bool) -> None:
    """Waits for a job that has no curves; as JSON it is printed once it is over. Raises as
    `watch_to_exit`."""
    if as_json:
        job = client.wait(job.id)
        print_json(job)
        exit_unless_succeeded(job)
    else:
        watch_to_exit(client, job, as_json=False)


def announce(job: Job, as_json: bool) -> None:
    """Says that a job was taken, and how to follow it."""
    if as_json:
        print_json(job)
        return
    console = stdout()
    notes = "".join(f", {note}" for note in (format_place(job), format_start(job)) if note)
    console.print(Text.assemble(f"Job {job.id} is ", format_status(job.status), f"{notes}."))
    console.print(f"Watch it:  skipline jobs watch {job.id}", style="dim", soft_wrap=True)


def print_outcome(console: Console, job: Job, curves: Curves) -> None:
    """One line on how the job ended; for a failure also why, and what to do."""
    line = Text.assemble(OUTCOME_MARKS.get(job.status, ("✗ ", "red")))
    line.append_text(format_status(job.status))
    if job.started_at and job.finished_at:
        line.append(f" in {format_duration((job.finished_at - job.started_at).total_seconds())}")
    if job.stop_reason:
        line.append(f", {STOP_REASONS[job.stop_reason]}")
    if job.status is JobStatus.succeeded and curves.best:
        top1, epoch = curves.best
        line.append(f"   best top-1 {format_percent(top1)} (epoch {epoch})", style="bold")
    console.print(line, soft_wrap=True)
    if job.error:
        print_sentence(console, f"  {job.error.code}: {job.error.message}", style="red")
        print_sentence(console, f"  {job.error.hint}")


def _print_what_now(client: Skipline, job: Job) -> None:
    """What the job has made, or what can be done about it."""
    console = stdout()
    if job.status is not JobStatus.succeeded:
        _print_commands(console, _ways_on(job))
    elif job.kind is JobKind.evaluate:
        console.print()
        console.print(render_report(client.report(job.id)))
    elif job.kind is JobKind.predict:
        _print_commands(console, {"Answers": f"skipline jobs predictions {job.id} answers.csv"})
    elif job.kind is JobKind.import_:
        _print_commands(console, {"Classify": f"skipline predict IMAGE --model {job.id}"})
    elif job.kind is JobKind.ingest:
        console.print(f"Dataset {(job.result or {}).get('dataset_id')} is ready.", soft_wrap=True)
    elif job.kind is JobKind.dry_run:
        grid = make_grid()
        for key, value in (job.result or {}).items():
            grid.add_row(key.replace("_", " "), format_result(key, value))
        console.print(grid)
    else:
        _print_commands(
            console,
            {
                "Classify": f"skipline predict IMAGE --model {job.id}",
                "Curves": f"skipline metrics {job.id} --plot out.png",
                "Report": f"skipline jobs show {job.id} --report",
            },
        )


def _ways_on(job: Job) -> dict[str, str]:
    """From a job that is paused, failed or cancelled."""
    if job.status is JobStatus.paused:
        return {"Resume": f"skipline jobs resume {job.id}"}
    ways = {"Retry": f"skipline jobs retry {job.id}"}
    if job.status is JobStatus.failed and job.attempt:
        ways = {"Output": f"skipline jobs logs {job.id}"} | ways
    return ways


def _print_commands(console: Console, commands: Mapping[str, str]) -> None:
    for what, command in commands.items():
        console.print(f"  {what + ':':<10}{command}", style="dim", soft_wrap=True)


def _print_detached(job: Job) -> None:
    console = stdout()
    console.print("Detached; the job goes on.")
    console.print(f"  Watch:  skipline jobs watch {job.id}", soft_wrap=True)
    console.print(f"  End:    skipline jobs cancel {job.id}", soft_wrap=True)


def _stream_json(client: Skipline, job: Job) -> Job:
    """JSON lines: the job, each event as it comes, the job as it ended, an evaluation's report."""
    print_json_line("job", job)
    for event in client.stream_metrics(job.id):
        if isinstance(event, MetricEvent):
            print_json_line("metric", event, event.id)
        else:
            kind = "end" if isinstance(event, EndEvent) else "rewind"
            print_json_line(kind, event, event.id)
    job = client.wait(job.id)
    print_json_line("job", job)
    if job.kind is JobKind.evaluate and job.status is JobStatus.succeeded:
        print_json_line("report", client.report(job.id))
    return job


def _situation(job: Job) -> str:
    """The job's state in words, where there are no numbers yet."""
    again = f", attempt {job.attempt}" if job.attempt > 1 else ""
    if job.status is JobStatus.queued:
        queued = "queued again" if job.attempt else "queued"
        return ", ".join(part for part in (queued, format_place(job)) if part)
    if job.status is JobStatus.running and job.progress is None:
        return f"getting ready{again}"
    return f"{job.status.value}{again}"


def _headline(job: Job) -> str:
    progress = job.progress
    if job.kind is not JobKind.train or progress is None:
        return format_kind(job.kind)
    again = f" attempt {job.attempt}" if job.attempt > 1 else ""
    return f"{job.spec['model']['arch']}{again} epoch {progress.epoch}/{progress.num_epochs}"


def _numbers(job: Job, curves: Curves) -> str:
    progress = job.progress
    parts = [f"step {progress.step:,}/{progress.num_steps:,}"] if progress else []
    parts += _latest(curves, ("loss", "train_loss"), ("top-1", "train_top1"))
    speed = progress.images_per_second if progress else None
    if speed:
        parts.append(f"{speed:,.0f} images/s")
    return "   ".join(parts)


def _latest(curves: Curves, *wanted: tuple[str, str]) -> list[str]:
    return [
        f"{label} {format_metric(name, curves.latest[name])}"
        for label, name in wanted
        if name in curves.latest
    ]


def _eta(job: Job) -> str:
    seconds = job.progress.eta_seconds if job.progress else None
    if seconds is None:
        return ""
    return f"ETA {seconds:.0f} s" if seconds < 59.5 else f"ETA {format_duration(seconds)}"


def _step_line(job: Job, step: int, epoch: int, curves: Curves) -> str:
    num_steps = f"/{job.progress.num_steps}" if job.progress else ""
    parts = [f"step {step}{num_steps}", f"epoch {epoch}/{job.spec['epochs']}"]
    parts += _latest(curves, ("loss", "train_loss"), ("top-1", "train_top1"))
    if "images_per_second" in curves.latest:
        parts.append(f"{curves.latest['images_per_second']:,.0f} images/s")
    parts += [_eta(job)] if _eta(job) else []
    return "  ".join(parts)


def _epoch_line(job: Job, epoch: int, curves: Curves) -> str:
    row = curves.epochs[epoch]
    labels = {"val_loss": "val loss", "val_top1": "val top-1"}
    values = [f"{label} {format_metric(name, row[name])}" for name, label in labels.items()]
    return "  ".join([f"epoch {epoch}/{job.spec['epochs']} done", *values])
