"""`skipline evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from skipline.cli import spec_input
from skipline.cli.output import JsonOption
from skipline.cli.watch import announce, watch_to_exit
from skipline.client import Skipline


def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="A job's or a checkpoint's id.")],
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", help="A built-in's name, an id or a name.")
    ],
    split: Annotated[
        str | None, typer.Option(help="train, val or test; by default test, else val.")
    ] = None,
    assignments: spec_input.SetOption = None,
    after: spec_input.AfterOption = None,
    priority: spec_input.PriorityOption = None,
    watch: Annotated[
        bool, typer.Option("--watch/--no-watch", help="Stay and print the report.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a trained model, or with --after one that is still trained, on a split of a
    dataset."""
    document: dict[str, Any] = {"kind": "evaluate", "model": model, "dataset": dataset}
    options = {"split": split, "after": after, "priority": priority}
    document.update({key: value for key, value in options.items() if value is not None})
    spec_input.assign(document, assignments or [])
    spec_input.check(document)
    with Skipline() as client:
        job = client.submit(document)
        if watch:
            watch_to_exit(client, job, as_json)
        else:
            announce(job, as_json)
