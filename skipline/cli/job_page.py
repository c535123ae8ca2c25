"""How a job is shown on a terminal: its state, its attempts, its checkpoints, its last events."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from skipline.cli.output import (
    STOP_REASONS,
    format_age,
    format_bytes,
    format_duration,
    format_kind,
    format_percent,
    format_place,
    format_result,
    format_status,
    format_wait,
    make_grid,
    make_table,
)
from skipline.schemas import Attempt, Checkpoint, Event, Job

NUM_EVENTS_SHOWN = 8
DATASET_PROBLEMS = "dataset_problems"
"""The event in which a job repeats what is odd about its dataset."""
LEVEL_STYLES = {"warning": "yellow", "error": "red"}
OUTCOME_STYLES = {"succeeded": "green", "failed": "red", "lost": "yellow"}


def render_job(
    job: Job,
    attempts: Sequence[Attempt],
    checkpoints: Sequence[Checkpoint],
    events: Sequence[Event],
) -> RenderableType:
    """The job's state as a list of what and value, and a table of each of the others: of events,
    the last ones, and what was odd about the dataset besides."""
    parts: list[RenderableType] = [_state(job)]
    events, odd = events[-NUM_EVENTS_SHOWN:], [e for e in events if e.type == DATASET_PROBLEMS]
    if odd and odd[0] not in events:
        parts += ["", Text(odd[0].message, style=LEVEL_STYLES["warning"])]
    if attempts:
        parts += ["", _attempt_table(attempts)]
    if checkpoints:
        parts += ["", _checkpoint_table(checkpoints)]
    if events:
        parts += ["", _event_table(events)]
    return Group(*parts)


def _state(job: Job) -> Table:
    grid = make_grid()
    grid.add_row("job", Text(job.id, style="bold"))
    if job.name:
        grid.add_row("name", job.name)
    grid.add_row("kind", format_kind(job.kind))
    status = format_status(job.status)
    if note := format_place(job) or STOP_REASONS.get(job.stop_reason or ""):
        status.append(f"  {note}", style="dim")
    grid.add_row("status", status)
    if job.estimated_start_at:
        grid.add_row("starts", format_wait(job.estimated_start_at))
    if "priority" in job.spec:
        grid.add_row("priority", str(job.spec["priority"]))
    if job.parent_id:
        grid.add_row("parent", job.parent_id)
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
        if key == "problems":
            value = ", ".join(f"{problem['code']} {problem['count']:,}" for problem in value) or "-"
        grid.add_row(key.replace("_", " "), format_result(key, value))
    grid.add_row("spec", _spec_text(job.spec))
    return grid


def _spec_text(spec: dict[str, Any]) -> str:
    given = {key: value for key, value in spec.items() if key not in ("kind", "name")}
    return yaml.safe_dump(given, sort_keys=False, default_flow_style=None, width=1000).rstrip()


def _attempt_table(attempts: Sequence[Attempt]) -> Table:
    table = make_table(">attempt", "host", "gpus", "began", "lasted", "outcome", "~why")
    now = datetime.now(UTC)
    for attempt in attempts:
        outcome = attempt.outcome or "runs"
        table.add_row(
            str(attempt.number),
            attempt.host,
            ", ".join(map(str, attempt.gpus)) or "-",
            format_age(attempt.started_at, now),
            format_duration(((attempt.ended_at or now) - attempt.started_at).total_seconds()),
            Text(outcome, style=OUTCOME_STYLES.get(outcome, "")),
            attempt.reason or "",
        )
    return table


def _checkpoint_table(checkpoints: Sequence[Checkpoint]) -> Table:
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


def _event_table(events: Sequence[Event]) -> Table:
    table = make_table("when", "what", "~message")
    for event in events:
        table.add_row(
            format_age(event.time),
            Text(event.type, style=LEVEL_STYLES.get(event.level, "")),
            event.message,
        )
    return table
