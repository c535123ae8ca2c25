"""`skipline compare A B`."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from api.examples import COMPARISON
from skipline.cli import app
from tests.skipline.replay import Server, answer_json


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments])


def told(server: Server, **changes: Any) -> list[str]:
    server.on("GET /compare", answer_json(COMPARISON | changes))
    result = run("one", "two", "--split", "test")
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_the_difference_is_told_with_how_sure_it_is(server: Server) -> None:
    lines = told(server)
    assert lines[0] == "355 images of digits, split test"
    change = "B - A: +1.13 points (95 %: -0.10 to +2.36), p = 0.219: may be chance"
    assert change in lines
    assert (
        "5 wrong -> right, 1 right -> wrong; the same answer for 98.0 % of the images"
    ) in " ".join(lines)
    assert lines[-1].split() == ["8", "34", "91.2", "%", "97.1", "%", "+5.9"]
    [asked] = server.asked
    assert asked.query == {"a": "one", "b": "two", "split": "test"}


def test_a_difference_that_is_no_chance_is_named(server: Server) -> None:
    assert any(line.endswith("p = 0.01: B is better") for line in told(server, p_value=0.01))
    worse = told(server, p_value=0.01, difference=-0.0113)
    assert any(line.endswith("p = 0.01: B is worse") for line in worse)


def test_as_json_it_is_what_the_server_said(server: Server) -> None:
    server.on("GET /compare", answer_json(COMPARISON))
    assert json.loads(run("one", "two", "--json").output) == COMPARISON
