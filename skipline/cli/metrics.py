"""`skipline metrics`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated

import typer

from skipline.cli.output import (
    JsonOption,
    format_metric,
    make_table,
    print_json,
    sparkline,
    stdout,
)
from skipline.cli.plot import plot_metrics, write_picture
from skipline.client import Skipline
from skipline.plots import title_of
from skipline.schemas import Metrics

SERIES = (
    "train_loss",
    "train_top1",
    "val_loss",
    "val_top1",
    "val_top5",
    "lr",
    "images_per_second",
    "epoch_seconds",
    "gpu_memory_bytes",
)
"""The order of the rows; series that a newer server adds come after."""


def metrics(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    names: Annotated[
        str | None, typer.Option(help="Only these series, such as val_loss,val_top1.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the curves to this file (.png, .svg).")
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Write images that it is trained on to this file (.png)."
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print all points as CSV.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a job's metrics as a table, a picture, CSV or JSON."""
    if as_csv and as_json:
        raise typer.BadParameter("give either --csv or --json")
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    with Skipline() as client:
        found = client.metrics(job_id, names=wanted)
        if plot is not None:
            plot_metrics(found, plot, title_of(client.job(job_id)))
        if samples is not None:
            write_picture(samples, client.plot(job_id, "samples"))
    if as_csv:
        _write_csv(found)
    elif as_json:
        print_json(found)
    elif plot is not None or samples is not None:
        written = " and ".join(str(path) for path in (plot, samples) if path is not None)
        stdout().print(f"Wrote {written}", soft_wrap=True)
    else:
        _print_table(found)


def _write_csv(found: Metrics) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["name", "step", "epoch", "value", "time"])
    for name, points in found.series.items():
        for point in points:
            time = point.model_dump(mode="json")["time"]
            writer.writerow([name, point.step, point.epoch, point.value, time])


def _print_table(found: Metrics) -> None:
    if not any(found.series.values()):
        stdout().print(f"The job is {found.status} and has no metrics yet.")
        return
    table = make_table("metric", ">last", ">lowest", ">highest", ">points", "curve")
    places = {name: place for place, name in enumerate(SERIES)}
    for name in sorted(found.series, key=lambda name: places.get(name, len(places))):
        points = found.series[name]
        if not points:
            continue
        values = [point.value for point in points]
        table.add_row(
            name,
            *(format_metric(name, value) for value in (values[-1], min(values), max(values))),
            f"{len(points):,}",
            sparkline(values),
        )
    stdout().print(table)
