"""`skipline models ls | promote | rollback | history | card | export | import | rm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipline.cli.output import (
    JsonOption,
    format_age,
    format_bytes,
    make_table,
    print_json,
    print_sentence,
    stdout,
    writing,
)
from skipline.cli.sending import shown_progress
from skipline.cli.watch import stay
from skipline.client import Skipline
from skipline.schemas import AliasMove, ExportFormat, Model, Page
from skipline.specs import PRODUCTION

app = typer.Typer(help="Name the models that are served.", invoke_without_command=True)

AliasArgument = Annotated[str, typer.Argument(metavar="ALIAS")]
AliasOption = Annotated[
    str, typer.Option("--as", metavar="ALIAS", help="Predictions ask for `production` by default.")
]


@app.callback()
def _ls_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        ls()


@app.command()
def ls(as_json: JsonOption = False) -> None:
    """List what each alias stands for."""
    with Skipline() as client:
        found = client.models()
    if as_json:
        print_json(Page[Model](items=found, next=None))
    elif found:
        table = make_table("alias", "checkpoint", "arch", "dataset", ">epoch", "~tags", "moved")
        for model in found:
            table.add_row(
                model.alias,
                model.checkpoint_id,
                model.arch,
                model.dataset,
                str(model.epoch),
                ", ".join(model.tags) or "-",
                format_age(model.moved_at),
            )
        stdout().print(table)
    else:
        stdout().print("No model has a name yet. Give it one: skipline models promote JOB")


@app.command()
def promote(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A job's or a checkpoint's id, or an alias.")
    ],
    alias: AliasOption = PRODUCTION,
    notes: Annotated[str | None, typer.Option(help="What there is to say of it.")] = None,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", help="In place of those it has; repeatable.")
    ] = None,
    require: Annotated[
        str | None, typer.Option(help="Only if its report says so: top1>=0.93,ece<=0.05")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Only if it is no worse than this one.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="To judge it by; what it was trained on by default.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of that dataset.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Let an alias stand for a model, if you like on conditions; 1 where it is refused."""
    with Skipline() as client:
        promoted = client.promote(
            model,
            alias,
            notes=notes,
            tags=tags,
            require=require,
            against=against,
            dataset=dataset,
            split=split,
        )
        _tell(promoted, as_json)


@app.command()
def rollback(alias: AliasArgument = PRODUCTION, as_json: JsonOption = False) -> None:
    """Take an alias's last move back."""
    with Skipline() as client:
        _tell(client.rollback(alias), as_json)


@app.command()
def history(alias: AliasArgument = PRODUCTION, as_json: JsonOption = False) -> None:
    """List what an alias has stood for, the newest first."""
    with Skipline() as client:
        moves = client.model_history(alias)
    if as_json:
        print_json(Page[AliasMove](items=moves, next=None))
        return
    table = make_table(">move", "checkpoint", "job", "when")
    for move in moves:
        what = move.checkpoint_id or "(deleted)"
        table.add_row(str(move.number), what, move.job_id or "-", format_age(move.created_at))
    stdout().print(table)


@app.command()
def card(alias: AliasArgument = PRODUCTION, as_json: JsonOption = False) -> None:
    """Print a model's card in Markdown: data, training, figures, limits."""
    with Skipline() as client:
        text = client.model_card(alias)
    if as_json:
        print_json({"alias": alias, "text": text})
    else:
        typer.echo(text, nl=False)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="An alias, or a job's or a checkpoint's id.")
    ] = PRODUCTION,
    format: Annotated[
        ExportFormat | None,
        typer.Option(help="By default what the file's suffix says: .safetensors, .onnx, .pt, .pt2"),
    ] = None,
) -> None:
    """Write a model to a file: as ONNX, TorchScript or torch.export to be used elsewhere, as
    safetensors to be taken in by another Skipline."""
    with Skipline() as client:
        try:
            with writing(output):
                client.export_model(output, model, format=format)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    told = f"{output} has {format_bytes(output.stat().st_size)}."
    stdout().print(told, soft_wrap=True)


@app.command("import")
def import_(
    path: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A model exported as .safetensors.")
    ],
    alias: Annotated[
        str | None, typer.Option("--as", metavar="ALIAS", help="Give it this name, too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Take in a model that another Skipline has exported."""
    with Skipline() as client:
        with shown_progress() as progress:
            job = client.import_model(path, progress=progress)
        stay(client, job, as_json)
        if alias is not None:
            promoted = client.promote(job.id, alias)
            if not as_json:
                _tell(promoted, as_json=False)


@app.command()
def rm(alias: AliasArgument) -> None:
    """Take an alias away; the model stays."""
    with Skipline() as client:
        client.delete_alias(alias)
    stdout().print(f"{alias} names no model any more")


def _tell(model: Model, as_json: bool) -> None:
    if as_json:
        print_json(model)
        return
    former = model.former_checkpoint_id
    back = f"; take it back with: skipline models rollback {model.alias}" if former else ""
    told = f"{model.alias} stands for the checkpoint {model.checkpoint_id}{back}"
    print_sentence(stdout(), told)
