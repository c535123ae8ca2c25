"""`skipline predict`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from skipline.cli.output import JsonOption, format_percent, print_json, stdout
from skipline.client import Skipline
from skipline.schemas import ImagePrediction, Predictions
from skipline.specs import PRODUCTION

BAR_WIDTH = 24


def predict(
    images: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, metavar="IMAGE…")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="An alias, or a job's or a checkpoint's id.")
    ] = PRODUCTION,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Classes to show.")] = 3,
    explain: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture here, as PNG, of where the answer comes from; of several images, "
            "one each, with its number before the suffix."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Classify images with a trained model."""
    with Skipline() as client:
        wants = explain is not None
        predictions = client.predict(images, model=model, top_k=top_k, explain=wants)
    if explain is not None:
        _write_explanations(predictions, explain)
    if as_json:
        print_json(predictions)
    else:
        stdout().print(render_predictions(predictions))


def _write_explanations(predictions: Predictions, path: Path) -> None:
    for place, prediction in enumerate(predictions.predictions, start=1):
        is_only = len(predictions.predictions) == 1
        own = path if is_only else path.with_name(f"{path.stem}-{place}{path.suffix}")
        own.write_bytes(base64.b64decode(prediction.explanation or ""))


def render_predictions(predictions: Predictions) -> RenderableType:
    """One block an image: its classes with probabilities as numbers and bars."""
    width = max(
        (len(row.label) for image in predictions.predictions for row in image.top), default=0
    )
    blocks = [_render_image(image, width) for image in predictions.predictions]
    spaced = [part for block in blocks for part in (block, Text())]
    return Group(*spaced[:-1])


def _render_image(image: ImagePrediction, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=width + 2, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for place, row in enumerate(image.top):
        style = "bold green" if place == 0 else ""
        bar = "█" * round(row.probability * BAR_WIDTH) or "▏"
        table.add_row(
            Text(f"  {row.label}", style=style),
            Text(format_percent(row.probability), style=style),
            Text(bar, style="green" if place == 0 else "dim"),
        )
    note = "  unknown: less sure than right answers are" if image.unknown else ""
    return Group(Text.assemble((image.image, "bold"), (note, "yellow")), table)
