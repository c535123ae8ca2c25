"""`skipline datasets ls | add`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from skipline.cli.output import (
    JsonOption,
    exit_unless_succeeded,
    make_table,
    print_json,
    stdout,
)
from skipline.cli.watch import announce, watch_to_exit
from skipline.client import Skipline
from skipline.schemas import DatasetPage

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
        table = make_table("~name", ">classes", ">train", ">val", ">test", ">px", "id")
        for dataset in page.items:
            sizes = {split: info.num_images for split, info in dataset.splits.items()}
            table.add_row(
                dataset.name,
                f"{dataset.num_classes:,}",
                *_sizes(sizes),
                str(dataset.image_size),
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
        typer.Argument(help="A folder or archive of class folders on the server's disk."),
    ] = None,
    builtin: Annotated[
        str | None, typer.Option(help="A built-in's name, in place of PATH.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="By default the folder's name.")] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="Hold out this share of train as val, class by class.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch/--no-watch", help="Stay until the dataset is there.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Bring a dataset in."""
    if (path is None) == (builtin is None):
        raise typer.BadParameter("give either PATH or --builtin NAME")
    with Skipline() as client:
        job = client.add_dataset(path, builtin=builtin, name=name, val_fraction=val_fraction)
        if watch and as_json:
            job = client.wait(job.id)
            print_json(job)
            exit_unless_succeeded(job)
        elif watch:
            watch_to_exit(client, job, as_json=False)
        else:
            announce(job, as_json)
