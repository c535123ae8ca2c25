"""`skipline jobs ls | show | watch | cancel`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import yaml
from rich.text import Text

from skipline.cli.output import (
    JsonOption,
    format_age,
    format_bytes,
    format_duration,
    format_kind,
    format_percent,
    format_result,
    format_status,
    make_grid,
    make_table,
    print_json,
    stdout,
)
from skipline.cli.report import render_report
from skipline.cli.watch import watch_to_exit
from skipline.client import Skipline
from skipline.schemas import Checkpoint, Event, Job, JobKind, JobStatus, Page

app = typer.Typer(help="See and steer jobs.", invoke_without_command=True)

NUM_EVENTS_SHOWN = 8
LEVEL_STYLES = {"warning": "yellow", "error": "red"}
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


@app.callback()
def _ls_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        ls()


@app.command()
def ls(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs in this state.")] = None,
    kind: Annotated[JobKind | None, typer.Option(help="Only jobs of this kind.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the jobs."""
    with Skipline() as client:
        found = list(client.jobs(status=status, kind=kind, limit=limit))
    if as_json:
        print_json(Page[Job](items=found, next=None))
    elif found:
        table = make_table("id", "status", ">done", "created", "~job")
        for job in found:
            table.add_row(
                job.id,
                format_status(job.status),
                _progress(job),
                format_age(job.created_at),
                Text(
                    f"{format_kind(job.kind)}: {job.name or _subject(job)}",
                    no_wrap=True,
                    overflow="ellipsis",
                ),
            )
        stdout().print(table)
    else:
        stdout().print("No jobs yet. Start one: skipline train --dataset digits --arch resnet18")


def _progress(job: Job) -> str:
    if job.status is JobStatus.queued and job.queue_position is not None:
        return f"no. {job.queue_position}"
    if job.progress is None or not job.progress.num_steps:
        return ""
    return f"{job.progress.step / job.progress.num_steps:.0%}".replace("%", " %")


def _subject(job: Job) -> str:
    """What a job without a name is about."""
    parts = [job.spec.get("dataset") or job.spec.get("path")]
    if job.kind in (JobKind.train, JobKind.dry_run):
        parts.insert(0, job.spec["model"]["arch"])
    return " on ".join(str(part) for part in parts if part)


@app.command()
def show(
    job_id: JobArgument,
    report: Annotated[bool, typer.Option("--report", help="Show its report instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show one job, or its report."""
    with Skipline() as client:
        if report:
            found = client.report(job_id)
            if as_json:
                print_json(found)
            else:
                stdout().print(render_report(found))
            return
        job = client.job(job_id)
        if as_json:
            print_json(job)
            return
        checkpoints = client.checkpoints(job_id) if job.kind is JobKind.train else []
        events = client.events(job_id)
    _print_job(job, checkpoints, events[-NUM_EVENTS_SHOWN:])


def _print_job(job: Job, checkpoints: list[Checkpoint], events: list[Event]) -> None:
    console = stdout()
    grid = make_grid()
    grid.add_row("job", Text(job.id, style="bold"))
    if job.name:
        grid.add_row("name", job.name)
    grid.add_row("kind", format_kind(job.kind))
    status = format_status(job.status)
    if job.queue_position is not None:
        status.append(f"  no. {job.queue_position} in the queue", style="dim")
    grid.add_row("status", status)
    grid.add_row("attempt", str(job.attempt))
    grid.add_row("created", format_age(job.created_at))
    if job.started_at and job.finished_at:
        grid.add_row("took", format_duration((job.finished_at - job.started_at).total_seconds()))
    elif job.started_at:
        grid.add_row("started", format_age(job.started_at))
    if progress := job.progress:
        steps = f"step {progress.step:,} of {progress.num_steps:,}"
        grid.add_row("progress", f"{steps}, epoch {progress.epoch} of {progress.num_epochs}")
    if job.error:
        grid.add_row("error", Text(f"{job.error.code}: {job.error.message}", style="red"))
        grid.add_row("hint", job.error.hint)
    for key, value in (job.result or {}).items():
        grid.add_row(key.replace("_", " "), format_result(key, value))
    grid.add_row("spec", _spec_text(job.spec))
    console.print(grid)
    if checkpoints:
        console.print()
        console.print(_checkpoint_table(checkpoints))
    if events:
        console.print()
        console.print(_event_table(events))


def _event_table(events: list[Event]) -> Any:
    table = make_table("when", "what", "~message")
    for event in events:
        table.add_row(
            format_age(event.time),
            Text(event.type, style=LEVEL_STYLES.get(event.level, "")),
            event.message,
        )
    return table


def _spec_text(spec: dict[str, Any]) -> str:
    given = {key: value for key, value in spec.items() if key not in ("kind", "name")}
    return yaml.safe_dump(given, sort_keys=False, default_flow_style=None, width=1000).rstrip()


def _checkpoint_table(checkpoints: list[Checkpoint]) -> Any:
    table = make_table("checkpoint", "kind", ">epoch", ">step", ">top-1", ">size")
    for checkpoint in checkpoints:
        top1 = checkpoint.metrics.get("val_top1")
        table.add_row(
            checkpoint.id,
            checkpoint.kind,
            str(checkpoint.epoch),
            f"{checkpoint.step:,}",
            "-" if top1 is None else format_percent(top1),
            format_bytes(checkpoint.num_bytes),
        )
    return table


@app.command()
def watch(job_id: JobArgument, as_json: JsonOption = False) -> None:
    """Watch a job until its end; exit 1 unless it succeeds."""
    with Skipline() as client:
        watch_to_exit(client, client.job(job_id), as_json)


@app.command()
def cancel(job_id: JobArgument, as_json: JsonOption = False) -> None:
    """Ask a job to end and give up its result."""
    with Skipline() as client:
        job = client.cancel(job_id)
    if as_json:
        print_json(job)
    else:
        stdout().print(Text.assemble(f"Job {job.id} is ", format_status(job.status), "."))
