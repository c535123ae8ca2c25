"""`skipline jobs ls | show | watch | logs | cancel | pause | resume | stop | retry | rm`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from skipline.cli.job_page import render_job
from skipline.cli.output import (
    JsonOption,
    format_age,
    format_kind,
    format_status,
    format_wait,
    make_table,
    print_error,
    print_json,
    stderr,
    stdout,
    writing,
)
from skipline.cli.report import render_report
from skipline.cli.watch import announce, watch_to_exit
from skipline.client import ServerUnreachable, Skipline, SkiplineError
from skipline.schemas import Job, JobKind, JobStatus, Page

app = typer.Typer(help="See and steer jobs.", invoke_without_command=True)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


@app.callback()
def _ls_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        ls()


# See.


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
    """How much is done; of a queued job, its place and when its turn is expected."""
    if job.status is JobStatus.queued and job.queue_position is not None:
        start = job.estimated_start_at
        return f"no. {job.queue_position}" + ("" if start is None else f", {format_wait(start)}")
    if job.status is JobStatus.queued and job.spec.get("after"):
        return "waits"
    if job.progress is None or not job.progress.num_steps:
        return ""
    return f"{job.progress.step / job.progress.num_steps:.0%}".replace("%", " %")


def _subject(job: Job) -> str:
    """What a job without a name is about."""
    parts = [job.spec.get("dataset") or job.spec.get("path") or job.spec.get("name")]
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
        attempts = client.attempts(job_id) if job.attempt else []
        checkpoints = client.checkpoints(job_id) if job.kind is JobKind.train else []
        events = client.events(job_id)
    stdout().print(render_job(job, attempts, checkpoints, events))


@app.command()
def watch(job_id: JobArgument, as_json: JsonOption = False) -> None:
    """Watch a job until its end; exit 1 unless it succeeds. A pause ends the watch too, but not
    with --json, which follows the stream."""
    with Skipline() as client:
        watch_to_exit(client, client.job(job_id), as_json)


@app.command()
def logs(
    job_id: JobArgument,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Of this attempt; by default of the last.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a job's trainer printed."""
    with Skipline() as client:
        text = client.logs(job_id, attempt)
    if as_json:
        print_json({"job_id": job_id, "attempt": attempt, "text": text})
    elif text:
        typer.echo(text, nl=not text.endswith("\n"))
    else:
        stderr().print("Its trainer has printed nothing.")


# Steer.


@app.command()
def cancel(job_id: JobArgument, as_json: JsonOption = False) -> None:
    """Ask a job to end and give up its result."""
    _act(Skipline.cancel, job_id, as_json)


@app.command()
def pause(job_id: JobArgument, as_json: JsonOption = False) -> None:
    """Ask a running job to keep its state and leave its worker."""
    _act(Skipline.pause, job_id, as_json, "Resume", f"skipline jobs resume {job_id}")


@app.command()
def resume(job_id: JobArgument, as_json: JsonOption = False) -> None:
    """Queue a paused job again; it goes on where it was."""
    _act(Skipline.resume, job_id, as_json, "Watch", f"skipline jobs watch {job_id}")


@app.command()
def stop(job_id: JobArgument, as_json: JsonOption = False) -> None:
    """Ask a running training to end early and keep its result."""
    _act(Skipline.stop, job_id, as_json, "Watch", f"skipline jobs watch {job_id}")


def _act(
    ask: Callable[[Skipline, str], Job],
    job_id: str,
    as_json: bool,
    what_next: str = "",
    command: str = "",
) -> None:
    with Skipline() as client:
        job = ask(client, job_id)
    if as_json:
        print_json(job)
        return
    console = stdout()
    console.print(Text.assemble(f"Job {job.id} is ", format_status(job.status), "."))
    if command:
        console.print(f"{what_next} it:  {command}", style="dim", soft_wrap=True)


@app.command()
def predictions(
    job_id: JobArgument,
    output: Annotated[Path, typer.Argument(help="The file to write: .csv, or else JSON.")],
) -> None:
    """Write what a batch prediction answered to a file."""
    with Skipline() as client, writing(output):
        client.save_predictions(job_id, output)
    stdout().print(f"The answers are in {output}.", soft_wrap=True)


@app.command()
def retry(
    job_id: JobArgument,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Afresh, not from its last checkpoint.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch/--no-watch", help="Stay and show the progress.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Do a failed or cancelled job again, as a new job, from its last checkpoint."""
    with Skipline() as client:
        job = client.retry(job_id, from_start=from_start)
        if watch:
            watch_to_exit(client, job, as_json)
        else:
            announce(job, as_json)


@app.command()
def rm(
    job_ids: Annotated[list[str], typer.Argument(metavar="JOB…", help="The jobs' ids.")],
    as_json: JsonOption = False,
) -> None:
    """Delete jobs that nobody works at, with their metrics, logs and checkpoints. Exit 1 when one
    of them was refused."""
    deleted: list[str] = []
    refused: list[tuple[str, SkiplineError]] = []
    with Skipline() as client:
        for job_id in job_ids:
            try:
                client.delete(job_id)
            except ServerUnreachable:
                raise
            except SkiplineError as error:
                refused.append((job_id, error))
            else:
                deleted.append(job_id)
    if as_json:
        told = [{"id": name, "code": why.code, "detail": why.detail} for name, why in refused]
        print_json({"deleted": deleted, "refused": told})
    else:
        for job_id in deleted:
            stdout().print(f"Job {job_id} is deleted.")
        for job_id, why in refused:
            print_error(why, subject=f"{job_id}: ")
    if refused:
        raise typer.Exit(1)
