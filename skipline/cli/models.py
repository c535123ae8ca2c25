"""`skipline models ls | promote | rollback | history | card | rm`."""

from __future__ import annotations

from typing import Annotated

import typer

from skipline.cli.output import (
    JsonOption,
    format_age,
    make_table,
    print_json,
    print_sentence,
    stdout,
)
from skipline.client import Skipline
from skipline.schemas import AliasMove, Model, Page
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
