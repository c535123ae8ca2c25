"""From `--spec file.yaml` and `--set key=value` to the document of a job request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from skipline.client import SkiplineError
from skipline.schemas import ErrorItem
from skipline.specs import error_items, parse_request

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the spec, such as optimizer.lr=0.05; wins over --spec. Repeatable.",
    ),
]
SpecOption = Annotated[
    Path | None,
    typer.Option("--spec", exists=True, dir_okay=False, help="A spec as YAML or JSON."),
]
AfterOption = Annotated[
    str | None,
    typer.Option("--after", metavar="JOB", help="Wait until this job has succeeded."),
]
PriorityOption = Annotated[
    int | None,
    typer.Option("--priority", help="From -10 to 10; higher ones run first, 0 by default."),
]


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `1e-3` is a number, `no` and `2026-01-31` are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _kind, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _starts
    )


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (derives from SafeLoader)


def read_spec_file(path: Path | None) -> dict[str, Any]:
    """The keys of a spec file; none without a file."""
    if path is None:
        return {}
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(document, dict):
        raise typer.BadParameter(f"{path} does not hold a spec, which is a list of `key: value`")
    return document


def assign(document: dict[str, Any], pairs: Sequence[str]) -> None:
    """Sets dotted keys: `optimizer.lr=0.05` sets `document["optimizer"]["lr"]`."""
    for pair in pairs:
        key, equals, text = pair.partition("=")
        *parents, last = key.strip().split(".")
        if not equals or not last or not all(parents):
            raise typer.BadParameter(f"--set {pair!r}: write it as key=value")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise typer.BadParameter(f"--set {pair!r}: the value is no YAML") from None
        place = document
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise typer.BadParameter(f"--set {pair!r}: {parent} has no keys of its own")
        place[last] = value


def check(document: dict[str, Any]) -> dict[str, Any]:
    """The document, if a server could accept it; says which keys are wrong as the server does."""
    try:
        parse_request(document)
    except ValidationError as error:
        raise SkiplineError(
            "The spec holds invalid values",
            code="invalid_spec",
            status=422,
            errors=[ErrorItem(**item) for item in error_items(error)],
        ) from None
    return document
