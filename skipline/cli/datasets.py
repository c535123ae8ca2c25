"""`skipline datasets ls | add | show | rm | check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from skipline import server_commands
from skipline.cli.output import (
    JsonOption,
    format_age,
    format_bytes,
    make_grid,
    make_table,
    print_json,
    stdout,
)
from skipline.cli.sending import shown_progress
from skipline.cli.watch import announce, stay
from skipline.client import Skipline
from skipline.schemas import Dataset, DatasetPage, Job, JobStatus, Problem

MAX_CLASSES_SHOWN = 20
LEVEL_STYLES = {"warning": "yellow", "error": "bold red"}

app = typer.Typer(help="List datasets, and bring new ones in.", invoke_without_command=True)


@app.callback()
def _ls_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        ls()


@app.command()
def ls(as_json: JsonOption = False) -> None:
    """List the stored datasets, and the built-in ones."""
    with Skipline() as client:
        page = client.datasets()
    if as_json:
        print_json(page)
    else:
        _print_datasets(page)


def _print_datasets(page: DatasetPage) -> None:
    console = stdout()
    if page.items:
        table = make_table(
            "~dataset", ">classes", ">train", ">val", ">test", ">px", ">problems", "id"
        )
        for dataset in page.items:
            sizes = {split: info.num_images for split, info in dataset.splits.items()}
            label = Text(", ".join(dataset.labels) or dataset.name)
            if dataset.dropped_at:
                label.append("  (images deleted)", style="dim")
            table.add_row(
                label,
                f"{dataset.num_classes:,}",
                *_sizes(sizes),
                str(dataset.image_size),
                str(len(dataset.problems) or "-"),
                dataset.id,
            )
        console.print(table)
        console.print()
    table = make_table("built in", ">classes", ">train", ">val", ">test", ">px", "~")
    for builtin in page.builtin:
        table.add_row(
            builtin.name,
            f"{builtin.num_classes:,}",
            *_sizes(builtin.splits),
            str(builtin.image_size),
            builtin.description,
        )
    console.print(table)


def _sizes(splits: Mapping[str, int]) -> list[str]:
    """The number of images in train, val and test."""
    return [f"{splits[name]:,}" if name in splits else "-" for name in ("train", "val", "test")]


@app.command()
def add(
    path: Annotated[
        str | None,
        typer.Argument(help="A folder of class folders, or a zip or tar archive of one."),
    ] = None,
    builtin: Annotated[
        str | None, typer.Option(help="A built-in's name, in place of PATH.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="By default the folder's name.")] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="Hold out this share of train as val, class by class.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Chooses what is held out.")] = None,
    upload: Annotated[
        bool | None,
        typer.Option(
            "--upload/--no-upload",
            help="Send the files, or let the server read PATH itself. By default the latter where "
            "the server is on this machine and may.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch/--no-watch", help="Stay until the dataset is there.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Bring a dataset in. What is sent goes on where it was broken off: run the same command
    again."""
    if (path is None) == (builtin is None):
        raise typer.BadParameter("give either PATH or --builtin NAME")
    with Skipline() as client:
        with shown_progress() as progress:
            job = client.add_dataset(
                path,
                builtin=builtin,
                name=name,
                val_fraction=val_fraction,
                seed=seed,
                upload=upload,
                progress=progress,
            )
        if not watch:
            announce(job, as_json)
            return
        try:
            stay(client, job, as_json)
        finally:
            if not as_json:
                _print_what_came(client, job)


def _print_what_came(client: Skipline, job: Job) -> None:
    """What is odd about the dataset that is there now."""
    job = client.job(job.id)
    if job.status is JobStatus.succeeded and job.result:
        problems = client.dataset(job.result["dataset_id"]).problems
        if problems:
            stdout().print()
            stdout().print(problem_table(problems))


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(help="An id, a name, or name:version.")],
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of its classes here, as PNG.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Write a grid of its images here, as PNG.")
    ] = None,
    split: Annotated[str, typer.Option(help="That the images are of.")] = "train",
    label: Annotated[str | None, typer.Option(help="Of this class alone.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the images.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show a dataset: its classes, its images, and what is odd about it."""
    with Skipline() as client:
        found = client.dataset(dataset)
        if plot is not None:
            plot.write_bytes(client.dataset_picture(dataset, "classes"))
        if samples is not None:
            png = client.dataset_picture(dataset, "samples", split=split, label=label, seed=seed)
            samples.write_bytes(png)
    if as_json:
        print_json(found)
    else:
        stdout().print(render_dataset(found))


@app.command()
def rm(
    dataset: Annotated[str, typer.Argument(help="An id, a name, or name:version.")],
    force: Annotated[
        bool,
        typer.Option(help="Also where models or jobs depend on it: these keep the record of it."),
    ] = False,
) -> None:
    """Delete a dataset, under all its names."""
    with Skipline() as client:
        client.delete_dataset(dataset, force=force)
    stdout().print(f"{dataset} is deleted")


app.command()(server_commands.check)


def render_dataset(dataset: Dataset) -> RenderableType:
    """What is known of it as a list, its classes, and its problems."""
    grid = make_grid()
    grid.add_row("dataset", Text(dataset.id, style="bold"))
    grid.add_row("names", ", ".join(dataset.labels) or dataset.name)
    grid.add_row("hash", dataset.hash)
    grid.add_row("created", format_age(dataset.created_at))
    if dataset.dropped_at:
        grid.add_row("images", f"deleted {format_age(dataset.dropped_at)}")
    for split, info in dataset.splits.items():
        grid.add_row(split, f"{info.num_images:,} images")
    num_bytes = format_bytes(dataset.num_bytes)
    grid.add_row("size", f"{num_bytes}, trained on at {dataset.image_size} px")
    if sizes := dataset.image_sizes:
        common = sizes.most_common[0]
        grid.add_row(
            "images",
            f"{sizes.width.min} to {sizes.width.max} px wide, {sizes.height.min} to "
            f"{sizes.height.max} px high; most often {common.width} x {common.height} "
            f"({common.num_images:,})",
        )
    grid.add_row("mean", ", ".join(f"{value:.4f}" for value in dataset.channel_mean))
    grid.add_row("std", ", ".join(f"{value:.4f}" for value in dataset.channel_std))
    parts: list[RenderableType] = [grid, "", _class_table(dataset)]
    rest = dataset.num_classes - MAX_CLASSES_SHOWN
    if rest > 0:
        parts.append(Text(f"and {rest:,} more classes", style="dim"))
    if dataset.problems:
        parts += ["", problem_table(dataset.problems)]
    return Group(*parts)


def _class_table(dataset: Dataset) -> RenderableType:
    table = make_table("class", *(f">{split}" for split in dataset.splits))
    for place, label in enumerate(dataset.classes[:MAX_CLASSES_SHOWN]):
        counts = [f"{info.per_class[place]:,}" for info in dataset.splits.values()]
        table.add_row(label, *counts)
    return table


def problem_table(problems: Sequence[Problem]) -> RenderableType:
    """What is odd, how often, and for example where."""
    table = make_table("problem", ">count", "~what", "~for example")
    for problem in problems:
        table.add_row(
            Text(problem.code, style=LEVEL_STYLES[problem.level]),
            f"{problem.count:,}",
            problem.message,
            "\n".join(problem.examples[:3]),
        )
    return table
