"""`skipline compare A B`."""

from __future__ import annotations

from typing import Annotated

import typer

from skipline.cli.output import JsonOption, format_percent, make_table, print_json, stdout
from skipline.client import Skipline
from skipline.schemas import Comparison

MAX_CLASSES_SHOWN = 20
CHANCE = 0.05
"""A p-value above it is told as: may be chance."""

ModelArgument = Annotated[str, typer.Argument(help="An alias, or a job's or a checkpoint's id.")]


def compare(
    a: ModelArgument,
    b: ModelArgument,
    dataset: Annotated[str | None, typer.Option(help="What A was trained on by default.")] = None,
    split: Annotated[str | None, typer.Option(help="Of that dataset.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two models on the images that both were evaluated on."""
    with Skipline() as client:
        found = client.compare(a, b, dataset=dataset, split=split)
    if as_json:
        print_json(found)
        return
    console = stdout()
    console.print(f"{found.num_samples:,} images of {found.dataset}, split {found.split}")
    table = make_table("", "arch", "checkpoint", ">top-1")
    table.add_row("A", found.a.arch, found.a.checkpoint_id, format_percent(found.top1_a))
    table.add_row("B", found.b.arch, found.b.checkpoint_id, format_percent(found.top1_b))
    console.print(table)
    console.print(_verdict(found), soft_wrap=True)
    console.print(
        f"{found.num_gained:,} wrong -> right, {found.num_lost:,} right -> wrong; "
        f"the same answer for {format_percent(found.agreement)} of the images",
        soft_wrap=True,
    )
    changed = [row for row in found.per_class if row.difference]
    changed.sort(key=lambda row: row.difference)
    if len(changed) > MAX_CLASSES_SHOWN:  # The most different ones, worst first.
        half = MAX_CLASSES_SHOWN // 2
        changed = changed[:half] + changed[-half:]
    if changed:
        classes = make_table("class", ">images", ">A", ">B", ">difference")
        for row in changed:
            shares = (format_percent(row.accuracy_a), format_percent(row.accuracy_b))
            points = f"{100 * row.difference:+.1f}"
            classes.add_row(row.label, f"{row.num_samples:,}", *shares, points)
        console.print(classes)


def _verdict(found: Comparison) -> str:
    low, high = (f"{100 * bound:+.2f}" for bound in found.difference_interval)
    change = (
        f"{100 * found.difference:+.2f} points (95 %: {low} to {high}), p = {found.p_value:.3g}"
    )
    if found.p_value > CHANCE:
        return f"B - A: {change}: may be chance"
    return f"B - A: {change}: B is {'better' if found.difference > 0 else 'worse'}"
