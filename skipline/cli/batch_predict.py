"""`skipline batch-predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skipline.cli import spec_input
from skipline.cli.output import JsonOption, stdout, writing
from skipline.cli.sending import shown_progress
from skipline.cli.watch import announce, stay
from skipline.client import Skipline
from skipline.specs import PRODUCTION


def batch_predict(
    source: Annotated[
        Path | None,
        typer.Argument(exists=True, help="A folder of images, or an archive: it is sent."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="A stored dataset, in place of SOURCE.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of the dataset: train, val or test; by default all.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="An alias, or a job's or a checkpoint's id.")
    ] = PRODUCTION,
    top_k: Annotated[
        int | None, typer.Option("--top-k", "-k", min=1, help="Classes to name; 5 by default.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Stay, and write the answers here: .csv or .json."),
    ] = None,
    assignments: spec_input.SetOption = None,
    after: spec_input.AfterOption = None,
    priority: spec_input.PriorityOption = None,
    watch: Annotated[
        bool, typer.Option("--watch/--no-watch", help="Stay until it is done.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Classify all images of a folder, an archive or a dataset, as a job."""
    if (source is None) == (dataset is None):
        raise typer.BadParameter("give either SOURCE or --dataset")
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    document: dict[str, Any] = {}
    options = {"split": split, "top_k": top_k, "after": after, "priority": priority}
    document.update({key: value for key, value in options.items() if value is not None})
    spec_input.assign(document, assignments or [])
    stand_in = {"upload_id": "to-be-sent"} if dataset is None else {"dataset": dataset}
    spec_input.check({"kind": "predict", "model": model, **stand_in, **document})
    with Skipline() as client:
        with shown_progress() as progress:
            job = client.predict_all(
                source, dataset=dataset, model=model, progress=progress, **document
            )
        if output is None and not watch:
            announce(job, as_json)
            return
        stay(client, job, as_json)
        if output is not None:
            with writing(output):
                client.save_predictions(job.id, output)
            if not as_json:
                stdout().print(f"The answers are in {output}.", soft_wrap=True)
