"""The command line: one file a noun, each a thin layer over `skipline.client`.

Exit codes: 0 done, 1 the job or check failed, 2 wrong usage, 3 the server cannot be reached.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from skipline import server_commands
from skipline.cli import (
    batch_predict,
    compare,
    datasets,
    demo,
    evaluate,
    jobs,
    metrics,
    models,
    predict,
    recipes,
    summary,
    train,
    workers,
)
from skipline.cli.output import exit_code, print_error
from skipline.client import SkiplineError


class _Root(TyperGroup):
    """Turns what the client raises into one message and an exit code, for every command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SkiplineError as error:
            print_error(error)
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    cls=_Root,
    help="Train, evaluate and serve image classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"skipline {version('skipline')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    pass


app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(jobs.app, name="jobs")
app.command("workers")(workers.workers)
app.command("metrics")(metrics.metrics)
app.command("summary")(summary.summary)
app.command("compare")(compare.compare)
app.command("recipes")(recipes.recipes)
app.command("predict")(predict.predict)
app.command("batch-predict")(batch_predict.batch_predict)
app.add_typer(datasets.app, name="datasets")
app.add_typer(models.app, name="models")
app.command("demo")(demo.demo)
server_commands.register(app)


def main() -> None:
    """The console script `skipline`."""
    app(prog_name="skipline")
