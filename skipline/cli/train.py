"""`skipline train`."""

from __future__ import annotations

from typing import Annotated

import typer

from skipline.cli import spec_input
from skipline.cli.output import JsonOption
from skipline.cli.watch import announce, watch_to_exit
from skipline.client import Skipline


def train(
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="A named training to start from: skipline recipes."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="A built-in's name, an id or a name.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option("--arch", "-a", help="The network, such as resnet18.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="How often to see every image.")] = None,
    name: Annotated[str | None, typer.Option(help="A name to find the job by.")] = None,
    spec: spec_input.SpecOption = None,
    assignments: spec_input.SetOption = None,
    after: spec_input.AfterOption = None,
    priority: spec_input.PriorityOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure what it would cost, instead of training.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch/--no-watch", help="Stay and show the progress.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a classifier on a dataset. With --recipe, all else is optional and wins over it."""
    document = {"kind": "train", **spec_input.read_spec_file(spec)}
    if document["kind"] != "train":
        raise typer.BadParameter(f"{spec} is not the spec of a training")
    options = {
        "recipe": recipe,
        "dataset": dataset,
        "epochs": epochs,
        "name": name,
        "after": after,
        "priority": priority,
    }
    document.update({key: value for key, value in options.items() if value is not None})
    if arch is not None:
        spec_input.assign(document, [f"model.arch={arch}"])
    spec_input.assign(document, assignments or [])
    spec_input.check(document)
    with Skipline() as client:
        job = client.submit(document, dry_run=dry_run)
        if watch:
            watch_to_exit(client, job, as_json)
        else:
            announce(job, as_json)
