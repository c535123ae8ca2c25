from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from skipline.cli.spec_input import assign, check, parse_yaml, read_spec_file
from skipline.client import SkiplineError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E4", 50_000.0),
        (".5", 0.5),
        ("-2", -2),
        ("007", 7),
        ("true", True),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("2026-01-31", "2026-01-31"),
        ("1:30", "1:30"),
        ("[random_crop, 1e-2]", ["random_crop", 0.01]),
        ("{name: adam, lr: 1e-3}", {"name": "adam", "lr": 0.001}),
    ],
)
def test_values_have_the_types_of_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_yaml_makes_no_objects() -> None:
    document: dict[str, Any] = {}
    with pytest.raises(typer.BadParameter, match="no YAML"):
        assign(document, ["name=!!python/object/apply:os.getcwd []"])


def test_dotted_keys_win_over_the_spec_file_and_leave_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("dataset: digits\noptimizer: {name: adam, lr: 0.1}\n")
    document = read_spec_file(path)
    assign(document, ["optimizer.lr=1e-3", "model.arch=vgg11", "tags=[a, b]"])
    assert document == {
        "dataset": "digits",
        "optimizer": {"name": "adam", "lr": 0.001},
        "model": {"arch": "vgg11"},
        "tags": ["a", "b"],
    }


@pytest.mark.parametrize(
    "pair", ["lr", "=1", "optimizer.=1", "optimizer..lr=1", ".lr=1", "epochs.x=1"]
)
def test_a_malformed_assignment_is_wrong_usage(pair: str) -> None:
    with pytest.raises(typer.BadParameter):
        assign({"epochs": 3}, [pair])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words", ""])
def test_a_spec_file_holds_keys_and_values(text: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(typer.BadParameter):
        read_spec_file(path)


def test_all_wrong_keys_are_named_at_once() -> None:
    document = {"dataset": "digits", "optimizer": {"lr": 0}, "epoch": 3}
    with pytest.raises(SkiplineError) as caught:
        check(document)
    assert [(item.loc, item.message) for item in caught.value.errors] == [
        ("optimizer.lr", "Input should be greater than 0"),
        ("epoch", "Unknown key"),
    ]
