"""`skipline recipes`."""

from __future__ import annotations

from skipline.cli.output import JsonOption, make_table, print_json, stdout
from skipline.client import Skipline
from skipline.schemas import Page, Recipe


def recipes(as_json: JsonOption = False) -> None:
    """List the trainings that can be started by name."""
    with Skipline() as client:
        found = client.recipes()
    if as_json:
        print_json(Page[Recipe](items=found, next=None))
        return
    table = make_table("recipe", "dataset", "~what")
    for recipe in found:
        table.add_row(recipe.name, recipe.dataset, recipe.description)
    console = stdout()
    console.print(table)
    console.print()
    console.print("Start one:  skipline train --recipe NAME", style="dim")
