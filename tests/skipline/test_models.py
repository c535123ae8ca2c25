"""`skipline models` and what it asks the server for."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from skipline.cli import app
from tests.skipline.replay import TIME, Answer, Server, answer_json, answer_problem


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", *arguments])


def model_document(**changes: Any) -> dict[str, Any]:
    return {
        "alias": "production",
        "checkpoint_id": "checkpoint-2",
        "former_checkpoint_id": None,
        "job_id": "job-1",
        "arch": "resnet18",
        "dataset": "digits",
        "dataset_id": "ds_1",
        "epoch": 5,
        "step": 60,
        "metrics": {"val_loss": 0.5},
        "num_bytes": 44_000_000,
        "notes": "",
        "tags": ["old", "slow"],
        "number": 1,
        "moved_at": TIME,
        **changes,
    }


def test_aliases_are_listed_with_what_they_stand_for(server: Server) -> None:
    document = {"items": [model_document()], "next": None}
    server.on("GET /models", answer_json(document))
    header, row = run().output.splitlines()
    assert header.split() == [
        *("alias", "checkpoint", "arch", "dataset", "epoch", "tags", "moved"),
    ]
    assert row.split()[:7] == [
        *("production", "checkpoint-2", "resnet18", "digits", "5", "old,", "slow"),
    ]
    assert json.loads(run("ls", "--json").stdout) == document
    server.on("GET /models", answer_json({"items": [], "next": None}))
    assert "skipline models promote JOB" in run("ls").output


def test_a_model_is_promoted_to_production_unless_told_otherwise(server: Server) -> None:
    answer = answer_json(model_document(former_checkpoint_id="checkpoint-1"))
    server.on("PUT /models/production", answer)
    server.on("PUT /models/candidate", answer_json(model_document(alias="candidate")))
    assert run("promote", "job-1").output.splitlines() == [
        "production stands for the checkpoint checkpoint-2; take it back with: "
        "skipline models rollback production"
    ]
    result = run(
        "promote", "job-1", "--as", "candidate", "--notes", "n", "--tag", "a", "--tag", "b"
    )
    assert result.output == "candidate stands for the checkpoint checkpoint-2\n"
    bodies = [json.loads(asked.body) for asked in server.asked]
    assert bodies == [
        {"checkpoint_id": "job-1"},
        {"checkpoint_id": "job-1", "notes": "n", "tags": ["a", "b"]},
    ]


def test_conditions_of_a_promotion_are_passed_on_and_a_refusal_is_told(server: Server) -> None:
    errors = [{"loc": "top1", "message": "It is 0.5; top1 >= 0.9 is required"}]
    refusal = answer_problem(409, "promotion_refused", "production stays what it is", errors)
    server.on("PUT /models/production", refusal)
    options = ("--require", "top1>=0.9", "--against", "production", "--split", "val")
    result = run("promote", "job-1", *options)
    assert result.exit_code == 1
    assert "top1 >= 0.9 is required" in " ".join(result.output.split())
    [asked] = server.asked
    assert asked.query == {"require": "top1>=0.9", "against": "production", "split": "val"}


def test_a_card_is_printed_as_it_is(server: Server) -> None:
    card = "# production\n\nAn image classifier.\n"
    server.on("GET /models/production/card", Answer(card.encode(), 200, "text/markdown"))
    assert run("card").output == card
    assert json.loads(run("card", "--json").output) == {"alias": "production", "text": card}


def test_a_move_is_taken_back_and_told(server: Server) -> None:
    server.on("POST /models/production/rollback", answer_json(model_document()))
    assert "checkpoint-2" in run("rollback").output
    moves = [
        {"number": 2, "checkpoint_id": None, "job_id": None, "submitter": "", "created_at": TIME},
        {
            "number": 1,
            "checkpoint_id": "checkpoint-2",
            "job_id": "job-1",
            "submitter": "",
            "created_at": TIME,
        },
    ]
    document = {"items": moves, "next": None}
    server.on("GET /models/production/history", answer_json(document))
    _, deleted, made = run("history").output.splitlines()
    assert deleted.split()[:3] == ["2", "(deleted)", "-"]
    assert made.split()[:3] == ["1", "checkpoint-2", "job-1"]
    assert json.loads(run("history", "--json").stdout) == document


def test_an_alias_is_taken_away_and_what_is_not_there_is_told(server: Server) -> None:
    server.on("DELETE /models/production", answer_json(None, status=204))
    result = run("rm", "production")
    assert (result.exit_code, result.output) == (0, "production names no model any more\n")
    server.on("DELETE /models/production", answer_problem(404, "alias_not_found", "No alias"))
    result = run("rm", "production")
    assert result.exit_code == 1
    assert "No alias" in result.output
