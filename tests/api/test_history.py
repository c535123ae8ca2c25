"""Attempts and logs; metrics and events have files of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shared import lifecycle
from skipline import schemas
from skipline.schemas import JobStatus


def test_attempts_say_where_they_ran_and_how_they_ended(
    api: Any, worker: Any, database: Any, assert_problem: Callable[..., Any]
) -> None:
    url = f"/jobs/{api.submit()['id']}/attempts"
    assert api.get(url).json() == {"items": [], "next": None}
    first = worker.claim()
    with database.session_scope() as session:
        lifecycle.note_gpus(session, first.fence, [2, 3])
    [running] = api.get(url).json()["items"]
    assert (running["number"], running["host"], running["gpus"]) == (1, "nowhere", [2, 3])
    assert (running["ended_at"], running["outcome"], running["reason"]) == (None, None, None)
    first.release()
    worker.claim().finish(JobStatus.failed)
    page = api.get(url).json()
    schemas.Page[schemas.Attempt].model_validate(page)
    assert [(a["number"], a["gpus"], a["outcome"], a["reason"]) for a in page["items"]] == [
        (1, [2, 3], "released", "for a test"),
        (2, [], "failed", "The loss is NaN"),
    ]
    assert page["items"][0]["started_at"] <= page["items"][0]["ended_at"]
    part = api.get(url, params={"limit": 1}).json()
    rest = api.get(url, params={"limit": 1, "after": part["next"]}).json()
    assert (part["items"] + rest["items"], rest["next"]) == (page["items"], None)
    refused = api.get(url, params={"after": "3"})
    assert_problem(refused, 422, "invalid_input")


def test_a_log_is_what_an_attempt_printed_by_default_the_last(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    url = f"/jobs/{api.submit()['id']}/logs"
    before = api.get(url)
    assert (before.status_code, before.text) == (200, "")
    first = worker.claim()
    first.print(1, "Größe: 3\n")
    first.print(2, "<b>warning</b>")
    shown = api.get(url)
    assert shown.headers["content-type"] == "text/plain; charset=utf-8"
    assert shown.headers["x-content-type-options"] == "nosniff"
    assert shown.content.decode() == "Größe: 3\n<b>warning</b>"
    first.release()
    worker.claim()
    assert api.get(url).text == api.get(url, params={"attempt": 2}).text == ""
    assert api.get(url, params={"attempt": 1}).text == shown.text
    assert_problem(api.get(url, params={"attempt": 3}), 404, "attempt_not_found")


@pytest.mark.parametrize("attempt", ["0", "-1", "x", str(2**40)])
def test_an_attempt_that_is_no_number_is_refused(
    sqlite_api: Any, attempt: str, assert_problem: Callable[..., Any]
) -> None:
    url = f"/jobs/{sqlite_api.submit()['id']}/logs"
    document = assert_problem(
        sqlite_api.get(url, params={"attempt": attempt}), 422, "invalid_input"
    )
    assert [item["loc"] for item in document["errors"]] == ["attempt"]
