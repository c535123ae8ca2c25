"""`skipline summary`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group, RenderableType

from skipline.cli.output import JsonOption, format_bytes, make_grid, make_table, print_json, stdout
from skipline.client import Skipline
from skipline.schemas import Summary


def summary(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    as_json: JsonOption = False,
) -> None:
    """Show a training's network, layer by layer."""
    with Skipline() as client:
        found = client.summary(job_id)
    if as_json:
        print_json(found)
    else:
        stdout().print(render_summary(found))


def render_summary(summary: Summary) -> RenderableType:
    """A row a layer, and the totals below."""
    table = make_table("layer", "type", ">output", ">parameters")
    for layer in summary.layers:
        shape = " x ".join(map(str, layer.output_shape))
        parameters = f"{layer.num_parameters:,}" if layer.num_parameters else ""
        table.add_row(layer.name, layer.type, shape, parameters)
    totals = make_grid()
    totals.add_row("parameters", f"{summary.num_parameters:,}")
    num_frozen = summary.num_parameters - summary.num_trainable_parameters
    if num_frozen:
        totals.add_row("of them frozen", f"{num_frozen:,}")
    totals.add_row("multiply-adds", f"{summary.multiply_adds:,} an image")
    totals.add_row("forward memory", f"{format_bytes(summary.forward_bytes)} an image")
    return Group(table, "", totals)
